"""Sample groups, measure their credit, write the numbers, and the page credit.html."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from hsd.evaluate import sample, score
from hsd.hindsight.groups import Group, Rollout, shown_answer
from hsd.json_files import write_json
from hsd.progress import counter
from hsd.tasks.task import Policy, Question, Task
from hsd.viewer.measure import draw_peers, failing_with_peer, measure
from hsd.viewer.page import payload, read_page, write_page
from hsd.viewer.summary import summarise

PAGE = "credit.html"


def sample_groups(task: Task, policy: Policy, questions: Sequence[Question], seed: int, size: int = 8) -> list[Group]:
    """One group for each question. A rollout without a verdict is neither a success nor a failure."""
    repeated = [q for q in questions for _ in range(size)]
    prompts = [q["prompt"] for q in repeated]
    rollouts = sample(*policy, prompts, task.sampling, seed=seed + 1, progress=counter("sampled"))
    rewards = score(policy.tokenizer, repeated, rollouts, task.reward)
    judged = [
        Rollout(tuple(ids), 0.0 if r is None else r, scored=r is not None)
        for ids, r in zip(rollouts, rewards, strict=True)
    ]
    groups = [tuple(judged[g * size : (g + 1) * size]) for g in range(len(questions))]
    answers = [shown_answer(q["answer"]) for q in questions]
    least = task.success_reward
    return [Group(q["prompt"], a, g, least) for q, a, g in zip(questions, answers, groups, strict=True)]


class Credit(NamedTuple):
    summary: dict[str, Any]  # the numbers behind the figures (`hsd.viewer.summary.summarise`)
    page: dict[str, Any]  # every token of the shown groups (`hsd.viewer.page.payload`)


def measure_credit(
    task: Task,
    policy: Policy,
    questions: Sequence[Question],
    *,
    seed: int,
    size: int = 8,
    shown: int | Sequence[int] = 6,
) -> Credit:
    """The credit of ``policy`` as its own teacher, ready for JSON.

    Each question gets two groups of ``size`` rollouts. Credit is measured on the first; the second says how hard the
    question is. The page shows those of the indices ``shown`` or, of a number, as many groups, those with successes and
    failures first. ``summary["shown"]`` has the indices.
    """
    groups, again = (sample_groups(task, policy, questions, seed + n, size) for n in (0, 1))
    peers = draw_peers(policy.tokenizer, groups, seed)
    mixed_first = sorted(range(len(groups)), key=lambda g: not groups[g].is_mixed)
    chosen = sorted(mixed_first[:shown]) if isinstance(shown, int) else list(shown)
    on_page = [(g, i) for g in chosen for i in range(len(groups[g].rollouts))]
    failing = failing_with_peer(groups, peers)
    rest = [place for place in on_page if place not in failing]
    parts = [measure(policy, groups, peers, task.template, places, shown=chosen) for places in (failing, rest)]
    found = {(r.group, r.rollout): r for part in parts for r in part}
    measured = [replace(found[g, i], group=chosen.index(g)) for g, i in on_page]
    numbers = summarise(parts[0], groups, again, policy.tokenizer) | {"shown": chosen}
    return Credit(numbers, payload(policy.tokenizer, [groups[g] for g in chosen], measured))


def write_credit(
    folder: Path, task: Task, credit: Credit, *, note: str, name: str = "", numbers: str = "credit.json"
) -> None:
    """Write the page credit.html and the numbers behind the figures.

    A measurement with a ``name`` joins those that the page has.
    """
    page = folder / PAGE
    earlier = read_page(page) if name and page.exists() else {}
    title = f"Credit, token by token: {task.title}"
    write_page(page, {**earlier, name: credit.page}, title=title, note=note)
    write_json(folder / numbers, credit.summary)
