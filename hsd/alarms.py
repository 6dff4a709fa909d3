"""Naming a collapse: what went wrong with a run, read off its metrics.

In the small world a live teacher lets success rise to 0.5 and then turns rollouts into one repeated digit; on
SmolLM2 at too high a learning rate KL and success fall to 0. Each sign alone has innocent causes, so every alarm
compares the last `WINDOW` steps with the run's own past.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

WINDOW = 5


def alarms(history: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """{name: sentence} for every alarm that holds at the end of ``history``, one mapping of metrics per step."""
    if len(history) < 2 * WINDOW:
        return {}
    found = {}
    best, success = _best(history, "hsd/success_rate"), _last(history, "hsd/success_rate")
    if best is not None and success is not None and best > 0.05 and success < 0.5 * best:
        found["success"] = f"success fell from {best:.3f} at best to {success:.3f}"
    first, entropy = _first(history, "hsd/student_entropy"), _last(history, "hsd/student_entropy")
    start = _first(history, "hsd/success_rate")
    learned = start is not None and success is not None and success > start  # a model that has learned is sure, too
    if first and entropy is not None and entropy < 0.1 * first and not learned:
        found["entropy"] = f"entropy of the student collapsed from {first:.3f} to {entropy:.4f} nats a token"
    if first and entropy is not None and entropy > 3.0 * first:
        found["entropy"] = f"entropy of the student grew from {first:.3f} to {entropy:.3f} nats a token"
    short, cut = _first(history, "completions/clipped_ratio"), _last(history, "completions/clipped_ratio")
    if short is not None and cut is not None and cut > max(2.0 * short, 0.5):
        found["length"] = f"{cut:.0%} of the rollouts run into the length limit, {short:.0%} did at the start"
    return found


def _window(history: Sequence[Mapping[str, float]], key: str, start: int) -> float | None:
    # None and NaN are steps that had nothing to measure.
    values = [v for h in history[start : start + WINDOW] if (v := h.get(key)) is not None and not math.isnan(v)]
    return sum(values) / len(values) if values else None


def _first(history: Sequence[Mapping[str, float]], key: str) -> float | None:
    return _window(history, key, 0)


def _last(history: Sequence[Mapping[str, float]], key: str) -> float | None:
    return _window(history, key, len(history) - WINDOW)


def _best(history: Sequence[Mapping[str, float]], key: str) -> float | None:
    means = [m for start in range(len(history) - WINDOW + 1) if (m := _window(history, key, start)) is not None]
    return max(means, default=None)
