"""From scored rollouts to the teacher's prompt for each of them: peers, contexts, divergence positions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hsd.hindsight.context import ContextParts, ContextTemplate, PrivilegedContext, build_context
from hsd.hindsight.credit import divergence_position
from hsd.hindsight.groups import Member, Prompt
from hsd.hindsight.peers import choose_peers, peer_rng


@dataclass(frozen=True)
class RolloutView:
    """All that a method may use to choose the teacher's context for one rollout."""

    member: Member
    row: Mapping[str, Any]  # of the data set
    peer: int | None  # index in the group; None where there is none, or the method draws none
    feedback: str | None  # of the environment on this very rollout
    show_answer: bool  # beside a demonstration, if it is not blank (LiveCodeBench has no answers)
    fallback: str  # without a demonstration or feedback: "answer", or nothing ("mask")

    @property
    def answer(self) -> str | None:
        answer = self.member.group.answer
        return answer if self.show_answer and answer.strip() else None

    @property
    def peer_ids(self) -> Sequence[int] | None:
        """The peer's tokens."""
        return None if self.peer is None else self.member.group.rollouts[self.peer].token_ids


# None where there is nothing to show: the rollout is left out of the divergence.
ContextOf = Callable[[RolloutView], ContextParts | None]


@dataclass(frozen=True)
class TeacherPrompt:
    """``[q ; c_i]`` of one rollout, and where the rollout leaves the peer in it (None: there is no peer in it, or it
    never leaves it)."""

    context: PrivilegedContext
    tau: int | None


@dataclass(frozen=True)
class TeacherPrompts:
    """Makes the teacher's prompts of a run.

    Args:
        context_of: The method's choice of the teacher's context.
        peer_rule: As in :func:`hsd.hindsight.peers.choose_peers`; None where the method draws no peers.
        template_for: The wording for a prompt.
        max_length, chat_template_kwargs: As in :func:`hsd.hindsight.context.build_context`.
    """

    context_of: ContextOf
    tokenizer: Any
    template_for: Callable[[Prompt], ContextTemplate]
    peer_rule: str | None = "uniform"
    show_answer: bool = True
    fallback: str = "answer"
    seed: int = 0
    max_length: int | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None

    def make(
        self,
        members: Sequence[Member],
        rows: Sequence[Mapping[str, Any]],
        feedback: Sequence[str | None],
        *,
        step: int,
    ) -> list[TeacherPrompt]:
        """One for each of ``members``, whose data-set rows and feedback these are."""
        drawn: dict[int, list[int | None]] = {}
        prompts = []
        for m, row, text in zip(members, rows, feedback, strict=True):
            if self.peer_rule is not None and m.number not in drawn:
                drawn[m.number] = choose_peers(m.group, self.peer_rule, rng=peer_rng(self.seed, step, m.number))
            peer = drawn[m.number][m.index] if drawn else None
            prompts.append(self._prompt(RolloutView(m, row, peer, text, self.show_answer, self.fallback)))
        return prompts

    def _prompt(self, view: RolloutView) -> TeacherPrompt:
        parts = self.context_of(view) or ContextParts()
        question = view.member.group.prompt
        context = build_context(
            self.tokenizer,
            question,
            parts.answer,
            parts.demonstration,
            self.template_for(question),
            feedback=parts.feedback,
            max_length=self.max_length,
            chat_template_kwargs=self.chat_template_kwargs,
        )
        tau = None
        if view.peer_ids is not None and context.kind == "peer":  # it may have been left out for length
            tau = divergence_position(view.member.group.rollouts[view.member.index].token_ids, view.peer_ids)
        return TeacherPrompt(context, tau)
