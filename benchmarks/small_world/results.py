"""Finished runs as one table of facts, and intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hsd.hindsight.credit import coverage

# 97.5 % quantiles of Student's t for n - 1 degrees of freedom, n = 2, 3, ...
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Interval:
    """Mean over seeds and the half-width of its 95 % interval by Student's t; None for a single seed."""

    mean: float
    half: float | None
    n: int

    def __str__(self) -> str:
        if self.half is None or self.n < 3:  # of two seeds the interval says nothing: 12.7 standard errors
            return f"{self.mean:.3f}"
        return f"{self.mean:.3f} ± {self.half:.3f}"


def interval(values: Sequence[float]) -> Interval:
    n = len(values)
    if not 1 <= n <= len(_T) + 1:
        raise ValueError(f"values: expected 1 to {len(_T) + 1} seeds, got {n}")
    mean = sum(values) / n
    if n == 1:
        return Interval(mean, None, 1)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    return Interval(mean, _T[n - 2] * deviation / math.sqrt(n), n)


def rows(runs: Sequence[dict[str, Any]], part: str, name: str) -> dict[int, dict[str, Any]]:
    """{seed: run} of one row of one part."""
    return {r["run"]["seed"]: r for r in runs if (r["run"]["part"], r["run"]["name"]) == (part, name)}


def warm_starts(facts: dict[str, Any], part: str = "main") -> list[dict[str, Any]]:
    """The warm starts that the runs of a part began with; of "main" while nothing has run, the longest ones."""
    steps = {r["run"]["warm_steps"] for r in facts["runs"] if r["run"]["part"] == part}
    if not steps and part == "main":
        steps = {max((w["warm_steps"] for w in facts["warm"]), default=0)}
    return [w for w in facts["warm"] if w["warm_steps"] in steps]


def final(run: dict[str, Any]) -> float:
    return run["final"]["mean"]


def curve_mean(run: dict[str, Any]) -> float:
    """Mean success over the points of the learning curve: how fast, where all end alike."""
    return sum(y for _, y in run["curve"]) / len(run["curve"])


def paired(a: dict[int, dict], b: dict[int, dict], what: Any = final) -> Interval | None:
    """a - b over the seeds that both have, None if there is none."""
    seeds = sorted(a.keys() & b.keys())
    return interval([what(a[s]) - what(b[s]) for s in seeds]) if seeds else None


def coverage_bins(runs: Sequence[dict], size: int) -> list[tuple[float, float, float, int]]:
    """(p, measured coverage, f(p, G), steps) by tenths of p, over all training steps of runs with this group size."""
    points: dict[int, list[tuple[float, float]]] = {}
    for run in runs:
        if run["run"]["group_size"] == size:
            steps = run["steps"]
            for p, c in zip(steps["hsd/success_rate"], steps["hsd/coverage"], strict=True):
                points.setdefault(min(int(10 * p), 9), []).append((p, c))
    bins = []
    for _, here in sorted(points.items()):
        n = len(here)
        formula = sum(coverage(p, size) for p, _ in here) / n
        bins.append((sum(p for p, _ in here) / n, sum(c for _, c in here) / n, formula, n))
    return bins
