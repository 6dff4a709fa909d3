"""What a method's contexts and draw read, found by calling them on groups that are made up for it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hsd.hindsight.context import Content, Context
from hsd.hindsight.groups import Group, Member, Rollout
from hsd.hindsight.teacher_prompts import RolloutView
from hsd.methods.draw import Ask, Drawn, GroupView, Reply, converse
from hsd.methods.method import REQUIRED, Method

MIXED, FAILED, SOLVED, ALONE = (1.0, 0.0, 1.0, 0.0), (0.0,) * 4, (1.0,) * 4, (0.0, 1.0, 0.0, 0.0)


@dataclass(frozen=True)
class Reads:
    columns: tuple[str, ...]  # of the data set, beside prompt and answer
    peers: bool  # whether a teacher is shown other rollouts than the one that it judges


@dataclass
class _Row(Mapping[str, Any]):
    """Has a text in every column, and remembers which were asked for."""

    asked: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> str:
        if name not in (*self.asked, "prompt", "answer"):
            self.asked.append(name)
        return f"{name} 1\n{name} 2"

    def __iter__(self) -> Iterator[str]:
        return iter(self.asked)

    def __len__(self) -> int:
        return len(self.asked)


def reads(method: Method) -> Reads:
    """What is read for any of four groups: a mixed one, one without and one of nothing but successes, and one success.

    A function that fails on a made-up row has read what it has read until then.
    """
    row, shown = _Row(), False
    for rewards in (MIXED, FAILED, SOLVED, ALONE):
        groups = [_rollouts(rewards, first=100), _rollouts(MIXED, first=200)]
        group = Group("question", "answer", groups[0])
        try:
            state = None if method.state is None else method.state()
            drawn = _drawn(method, group, row, state)
            for i, own in enumerate(groups[0]):
                others = [r.token_ids for rollouts in groups for r in rollouts if r is not own]
                texts = [_text(j) for j in range(len(rewards)) if j != i]
                found = _contexts(method, Member(group, i, 0), groups, row, drawn.notes.get(i), state)
                found += [context for extra in drawn.rows.get(i, ()) for context in extra.contexts]
                shown |= any(_shows(context, others, texts) for context in found)
        except Exception:  # a method of a user's own may ask more of a row than a text
            continue
    return Reads(tuple(row.asked), shown)


def _rollouts(rewards: Sequence[float], first: int) -> tuple[Rollout, ...]:
    return tuple(Rollout((first + i,) * (i + 1), reward=r, mean_logp=-1.0) for i, r in enumerate(rewards))


def _text(i: int) -> str:
    return f"attempt {i}\nits end"


def _settings(method: Method) -> dict[str, Any]:
    return {"max_completion_length": 8} | {k: 1.0 if v is REQUIRED else v for k, v in method.settings.items()}


def _drawn(method: Method, group: Group, row: _Row, state: Any) -> Drawn:
    if method.draw is None:
        return Drawn()
    texts = [_text(i) for i in range(len(group.rollouts))]
    pieces, feedback = lambda i: texts[i].split(" "), ["feedback"] * len(texts)
    view = GroupView(group, row, texts, pieces, feedback, random.Random(0), _settings(method), state, spare=lambda: row)

    def answer(asked: list[tuple[int, Ask]], number: int) -> list[Reply]:
        return [Reply("1", (1,), scores=(1.0,), reward=1.0) for _ in asked]

    return converse([method.draw(view)], answer, 100).drawn[0]


def _contexts(
    method: Method, member: Member, groups: Sequence[Sequence[Rollout]], row: _Row, note: Any, state: Any
) -> list[Context]:
    if method.contexts is None:
        return []
    peer = next(iter(member.group.success_peers(member.index)), None) if method.draws_peers else None
    return method.contexts(
        RolloutView(
            member,
            row,
            peer,
            feedback="feedback" if method.uses_feedback else None,
            show_answer=True,
            fallback="answer",
            groups=groups,
            settings=_settings(method),
            note=note,
            state=state,
        )
    )


def _shows(context: Context, rollouts: Sequence[tuple[int, ...]], texts: Sequence[str]) -> bool:
    def is_one(content: Content) -> bool:
        return any(t in content for t in texts) if isinstance(content, str) else tuple(content) in rollouts

    return any(is_one(content) for _, content in context.parts)
