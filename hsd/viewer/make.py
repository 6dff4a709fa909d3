"""Sample groups, measure their credit, write credit.json and the page credit.html."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hsd.evaluate import sample, score
from hsd.files import replacing
from hsd.hindsight.groups import Group, Rollout, shown_answer
from hsd.progress import counter
from hsd.tasks.task import Policy, Question, Task
from hsd.viewer.measure import draw_peers, failing_with_peer, measure
from hsd.viewer.page import write_page
from hsd.viewer.summary import summarise


def sample_groups(task: Task, policy: Policy, questions: Sequence[Question], seed: int, size: int = 8) -> list[Group]:
    """One scored group for each question."""
    repeated = [q for q in questions for _ in range(size)]
    prompts = [q["prompt"] for q in repeated]
    rollouts = sample(*policy, prompts, task.sampling, seed=seed + 1, progress=counter("sampled"))
    rewards = score(policy.tokenizer, repeated, rollouts, task.reward)
    least = task.success_reward
    unjudged = least - 1.0  # a rollout without a verdict is no success
    scored = [Rollout(tuple(ids), unjudged if r is None else r) for ids, r in zip(rollouts, rewards, strict=True)]
    groups = [tuple(scored[g * size : (g + 1) * size]) for g in range(len(questions))]
    answers = [shown_answer(q["answer"]) for q in questions]
    return [Group(q["prompt"], a, g, least) for q, a, g in zip(questions, answers, groups, strict=True)]


def make_credit(
    folder: Path,
    task: Task,
    policy: Policy,
    questions: Sequence[Question],
    *,
    seed: int,
    note: str,
    size: int = 8,
    shown: int = 6,
) -> dict[str, Any]:
    """Write ``folder/credit.json`` and ``folder/credit.html``; returns what the former holds.

    Each question gets two groups of ``size`` rollouts. Credit is measured on the first; the second says how hard the
    question is. The page shows ``shown`` groups, those with successes and failures first, with the numbers behind the
    figures.
    """
    groups, again = (sample_groups(task, policy, questions, seed + n, size) for n in (0, 1))
    peers = draw_peers(policy.tokenizer, groups, seed)
    chosen = sorted(sorted(range(len(groups)), key=lambda g: not groups[g].is_mixed)[:shown])
    on_page = [(g, i) for g in chosen for i in range(len(groups[g].rollouts))]
    failing = failing_with_peer(groups, peers)
    rest = [place for place in on_page if place not in failing]
    parts = [measure(policy, groups, peers, task.template, places, shown=chosen) for places in (failing, rest)]
    found = {(r.group, r.rollout): r for part in parts for r in part}
    measured = [replace(found[g, i], group=chosen.index(g)) for g, i in on_page]
    title = f"Credit, token by token: {task.title}"
    write_page(folder / "credit.html", policy.tokenizer, [groups[g] for g in chosen], measured, title=title, note=note)
    credit = summarise(parts[0], groups, again, policy.tokenizer)
    with replacing(folder / "credit.json") as part:
        part.write_text(json.dumps(credit, indent=1))
    return credit
