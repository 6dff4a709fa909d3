"""From scored rollouts to the teacher's prompts for each of them: peers, contexts, divergence positions."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hsd.hindsight.context import (
    Content,
    Context,
    ContextTemplate,
    PrivilegedContext,
    render_context,
    says_something,
    without_thinking,
)
from hsd.hindsight.credit import divergence_position
from hsd.hindsight.groups import Group, Member, Prompt, Rollout
from hsd.hindsight.peers import choose_peers, peer_rng


@dataclass(frozen=True)
class RolloutView:
    """All that a method may use to choose the teacher's contexts for one rollout."""

    member: Member
    row: Mapping[str, Any]  # of the data set
    peer: int | None  # index in the group; None where there is none to show, or the method draws none
    feedback: str | None  # of the environment on this very rollout
    show_answer: bool  # beside a demonstration, if it is not blank (LiveCodeBench has no answers)
    fallback: str  # without a demonstration or feedback: "answer", "solution", or nothing ("mask")
    groups: Sequence[Sequence[Rollout]] = ()  # of the whole step, over all ranks, by `Member.number`
    rng: random.Random = field(default_factory=random.Random)  # this rollout's own
    settings: Mapping[str, Any] = field(default_factory=dict)  # method_args
    # What a teacher is shown of a rollout's tokens: without its thinking under `strip_thinking`; none of blank ones.
    shown: Callable[[Sequence[int]], Sequence[int]] = lambda ids: ids
    note: Any = None  # what the method's draw left for this rollout
    state: Any = None  # the method's

    @property
    def group(self) -> Group:
        return self.member.group

    @property
    def i(self) -> int:
        """The rollout's index in its group."""
        return self.member.index

    @property
    def answer(self) -> str | None:
        answer = self.member.group.answer
        return answer if self.show_answer and answer.strip() else None

    @property
    def peer_ids(self) -> Sequence[int] | None:
        """What is shown of the peer's tokens."""
        return None if self.peer is None else self.rollout(self.peer)

    def rollout(self, j: int) -> Sequence[int]:
        """What is shown of the tokens of the group's rollout ``j``."""
        return self.shown(self.group.rollouts[j].token_ids)


# An empty list where there is nothing to show: the rollout is left out of the divergence.
Contexts = Callable[[RolloutView], list[Context]]


@dataclass(frozen=True)
class TeacherPrompt:
    """``[q ; c_i]`` of one rollout, where the rollout leaves the peer in it (None: there is no peer in it, or it never
    leaves it), and the index in the group of the peer that is shown."""

    context: PrivilegedContext
    tau: int | None
    peer: int | None = None


@dataclass(frozen=True)
class TeacherPrompts:
    """Makes the teacher's prompts of a run.

    Args:
        contexts: The method's choice of the teacher's contexts.
        count: How many there are at most.
        peer_rule: As in :func:`hsd.hindsight.peers.choose_peers`; None where the method draws no peers.
        template_for: The wording for a prompt.
        strip_thinking: Show rollouts without their thinking.
        max_length, chat_template_kwargs: As in :func:`hsd.hindsight.context.build_context`.
    """

    contexts: Contexts
    tokenizer: Any
    template_for: Callable[[Prompt], ContextTemplate]
    count: int = 1
    peer_rule: str | None = "uniform"
    show_answer: bool = True
    fallback: str = "answer"
    strip_thinking: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    max_length: int | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None

    def make(
        self,
        members: Sequence[Member],
        rows: Sequence[Mapping[str, Any]],
        feedback: Sequence[str | None],
        *,
        generation: int,
        groups: Sequence[Sequence[Rollout]] = (),
        notes: Mapping[tuple[int, int], Any] | None = None,
        state: Any = None,
    ) -> list[list[TeacherPrompt]]:
        """``count`` for each of ``members``, whose data-set rows and feedback these are; ``generation`` as in
        `hsd.hindsight.peers.peer_rng`, ``groups`` and ``state`` as in `RolloutView`, ``notes`` by (`Member.number`,
        index).

        Where a rollout has fewer contexts the question alone, of kind "nothing", stands for the others.
        """
        drawn: dict[int, list[int | None]] = {}
        prompts = []
        for m, row, text in zip(members, rows, feedback, strict=True):
            if self.peer_rule is not None and m.number not in drawn:
                drawn[m.number] = choose_peers(m.group, self.peer_rule, rng=peer_rng(self.seed, generation, m.number))
            peer = drawn[m.number][m.index] if drawn else None
            if peer is not None and not self._shown(m.group.rollouts[peer].token_ids):
                peer = None
            view = RolloutView(
                m,
                row,
                peer=peer,
                feedback=text,
                show_answer=self.show_answer,
                fallback=self.fallback,
                groups=groups,
                # Negative numbers are not groups'.
                rng=peer_rng(self.seed, generation, -1 - m.number * len(m.group.rollouts) - m.index),
                settings=self.settings,
                shown=self._shown,
                note=(notes or {}).get((m.number, m.index)),
                state=state,
            )
            found = self.contexts(view)
            if len(found) > self.count:
                raise ValueError(f"contexts: expected {self.count} for a rollout at most, got {len(found)}")
            padded = [*found, *[Context()] * (self.count - len(found))]
            prompts.append([self._prompt(view, context) for context in padded])
        return prompts

    def render(self, question: Prompt, context: Context) -> PrivilegedContext:
        return render_context(
            self.tokenizer,
            question,
            context,
            self.template_for(question),
            max_length=self.max_length,
            chat_template_kwargs=self.chat_template_kwargs,
        )

    def _shown(self, ids: Sequence[int]) -> Sequence[int]:
        shown = without_thinking(self.tokenizer, ids) if self.strip_thinking else ids
        return shown if says_something(self.tokenizer, shown) else ()

    def _prompt(self, view: RolloutView, context: Context) -> TeacherPrompt:
        made = self.render(view.group.prompt, context)
        if view.peer is None or made.kind != "peer":  # it may have been left out for length
            return TeacherPrompt(made, None)
        rollouts = view.group.rollouts
        tau = divergence_position(rollouts[view.i].token_ids, rollouts[view.peer].token_ids)
        is_shown = view.peer_ids in [content for _, content in context.parts]  # `hsd_unpaired` shows another's
        return TeacherPrompt(made, tau, view.peer if is_shown else None)


def parts(**contents: Content | None) -> tuple[tuple[str, Content], ...]:
    """A context's parts, by kind and in order; None and an empty text are left out."""
    return tuple((kind, content) for kind, content in contents.items() if content)
