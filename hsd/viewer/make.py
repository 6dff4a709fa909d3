"""Sample groups, measure their credit, write credit.json and the page credit.html, for the demo and `hsd credit`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsd.evaluate import RewardFn, Sampling, sample, score
from hsd.hindsight.context import ContextTemplate
from hsd.hindsight.groups import Group, Rollout
from hsd.hindsight.lessons import shown_answer
from hsd.viewer.measure import draw_peers, measure_credit, read_tokens
from hsd.viewer.page import write_page
from hsd.viewer.summary import summarise


@dataclass(frozen=True)
class Subject:
    """Whose credit is looked at: a policy, how it is sampled and scored, and what its teacher is shown."""

    title: str
    model: Any
    tokenizer: Any
    reward: RewardFn
    template: ContextTemplate
    sampling: Sampling
    success_reward: float = 1.0


def sample_groups(subject: Subject, questions: list[dict], seed: int, size: int = 8) -> list[Group]:
    """One scored group for each question."""
    repeated = [q for q in questions for _ in range(size)]
    prompts = [q["prompt"] for q in repeated]
    rollouts = sample(subject.model, subject.tokenizer, prompts, subject.sampling, seed=seed + 1, progress=_counter)
    rewards = score(subject.tokenizer, repeated, rollouts, subject.reward)
    least = subject.success_reward
    unjudged = least - 1.0  # a rollout without a verdict is no success
    scored = [Rollout(tuple(ids), unjudged if r is None else r) for ids, r in zip(rollouts, rewards, strict=True)]
    groups = [tuple(scored[g * size : (g + 1) * size]) for g in range(len(questions))]
    answers = [shown_answer(q["answer"]) for q in questions]
    return [Group(q["prompt"], a, g, least) for q, a, g in zip(questions, answers, groups, strict=True)]


def make_credit(
    folder: Path, subject: Subject, groups: list[Group], again: list[Group], *, seed: int, note: str, shown: int = 6
) -> dict[str, Any]:
    """Write ``folder/credit.json`` and ``folder/credit.html``; returns what the former holds.

    Credit is measured on ``groups``; ``again``, a second group for each question, says how hard the question is. The
    page shows ``shown`` groups, those with successes and failures first, with the peers that the figures were measured
    with.
    """
    measured = measure_credit(subject.model, subject.tokenizer, groups, subject.template, seed=seed)
    peers = draw_peers(subject.tokenizer, groups, seed)
    chosen = sorted(sorted(range(len(groups)), key=lambda g: not groups[g].is_mixed)[:shown])
    kept = [groups[g] for g in chosen]
    read = read_tokens(subject.model, subject.tokenizer, kept, [peers[g] for g in chosen], subject.template)
    title = f"Credit, token by token: {subject.title}"
    write_page(folder / "credit.html", subject.tokenizer, kept, read, title=title, note=note)
    credit = summarise(measured, groups, again, subject.tokenizer)
    (folder / "credit.json").write_text(json.dumps(credit, indent=1))
    return credit


def _counter(done: int, total: int) -> None:
    print(f"  sampled {done}/{total}", flush=True)
