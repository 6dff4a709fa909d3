"""From scored rollouts to what the teacher reads: groups, peers, privileged contexts, divergence positions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hsd.hindsight.context import ContextTemplate, PrivilegedContext, build_context
from hsd.hindsight.credit import divergence_position
from hsd.hindsight.groups import Group, Prompt, Rollout
from hsd.hindsight.peers import choose_peers, peer_rng
from hsd.methods import Method, Shown, shown_to_teacher


@dataclass(frozen=True)
class Lesson:
    """One rollout as the teacher meets it."""

    success: bool
    has_peer: bool  # another rollout of its group succeeds: what coverage counts
    context: PrivilegedContext | None  # None for a method without a teacher
    tau: int | None  # where the rollout leaves the peer that the teacher is shown


def make_lessons(
    method: Method,
    rows: Sequence[Mapping[str, Any]],
    rollouts: Sequence[Rollout],
    *,
    first: int,
    group_size: int,
    success_reward: float,
    peer_rule: str,
    show_answer: bool,
    fallback: str,
    seed: int,
    step: int,
    feedback: Sequence[str | None],
    tokenizer: Any,
    template_for: Callable[[Prompt], ContextTemplate],
    max_length: int | None,
    chat_template_kwargs: Mapping[str, Any],
) -> list[Lesson]:
    """One lesson for each of ``rows``, the data-set rows of this process.

    ``rollouts`` are those of all processes and ``first`` is the position of this one's first: a group may be split
    between ranks, and all of them see it whole.
    """
    lessons = []
    for i, row in enumerate(rows):
        g, place = divmod(first + i, group_size)
        members = tuple(rollouts[g * group_size : (g + 1) * group_size])
        group = Group(row["prompt"], shown_answer(row["answer"]), members, success_reward)
        success, has_peer = place in group.successes, bool(group.success_peers(place))
        if method.trl_loss:
            lessons.append(Lesson(success, has_peer, None, None))
            continue
        peer = None
        if method.demonstration == "peer":
            peer = choose_peers(group, peer_rule, rng=peer_rng(seed, step, g))[place]
        shown = (
            shown_to_teacher(method, group, peer, row, feedback[i], show_answer=show_answer, fallback=fallback)
            or Shown()
        )
        context = build_context(
            tokenizer,
            row["prompt"],
            shown.answer,
            shown.demonstration,
            template_for(row["prompt"]),
            feedback=shown.feedback,
            max_length=max_length,
            chat_template_kwargs=chat_template_kwargs,
        )
        tau = None
        if peer is not None and context.kind == "peer":  # it may have been left out for length
            tau = divergence_position(members[place].token_ids, members[peer].token_ids)
        lessons.append(Lesson(success, has_peer, context, tau))
    return lessons


def shown_answer(answer: Any) -> str:
    """What a teacher reads of a data set's ``answer``: the text, the first of several accepted ones, "" for None."""
    first = answer[0] if isinstance(answer, list) else answer
    return "" if first is None else str(first)
