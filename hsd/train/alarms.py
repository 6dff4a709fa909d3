"""Alarms: signs in a run's metrics that training collapses, or learns nothing.

A live teacher at a high learning rate ends at success 0 (docs/teachers.md). Each sign alone has innocent causes, so
every alarm but "no verdict" compares the last `WINDOW` steps with the run's own past. A fall must also be larger than
chance makes it with the number of questions: with 4 a step the mean of five steps falls by half in most runs of a
policy that stays.

The paper's run without a reference term ends in repeated trailing tokens (arXiv 2606.15576, beta = 0 at step 1,200).
`repeated_tail` detects them in one rollout; the share of such rollouts is the metric ``hsd/repeated_tail``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hsd.progress import counted

WINDOW = 5
DEVIATIONS = 3.0  # of the difference between two windows, where the questions' difficulty is all that varies
TAIL, COPIES, LONGEST_CYCLE = 20, 4, 32  # tokens, times, tokens


def repeated_tail(token_ids: Sequence[int]) -> bool:
    """Whether a rollout ends in at least 4 copies, and at least 20 tokens, of a cycle of at most 32 tokens.

    One end token behind the cycle is allowed. A shorter rollout is never one: `1, 1, 1` may be an answer.
    """
    return any(_cycles(ids, period) for ids in (token_ids, token_ids[:-1]) for period in range(1, LONGEST_CYCLE + 1))


def _cycles(ids: Sequence[int], period: int) -> bool:
    span = max(TAIL, COPIES * period)
    # The last token first: nearly every call ends here.
    if len(ids) < span or ids[-1] != ids[-1 - period]:
        return False
    tail = list(ids[-span:])
    return tail[period:] == tail[:-period]


def alarms(history: Sequence[Mapping[str, float]], questions: float | None = None) -> dict[str, str]:
    """{name: sentence} for every alarm that holds at the end of ``history``, one mapping of metrics per step.

    ``questions``: of a step. Without their number every fall by half counts.
    """
    found = {}
    unscored = _mean(history[-WINDOW:], "hsd/unscored")
    if unscored is not None and unscored > 0.5:  # from the first step on: such a run has no past to compare with
        found["no verdict"] = f"{unscored:.0%} of the rollouts have no verdict: every reward function gave None"
    if len(history) < 2 * WINDOW:
        return found
    (best, end), success = _best(history, "hsd/success_rate"), _last(history, "hsd/success_rate")
    if best is not None and success is not None and best > 0.05 and _halved(best, success, questions):
        found["success"] = (
            f"success fell from {best:.3f}, the mean of the best {WINDOW} steps, which ended "
            f"{counted(len(history) - end, 'step')} ago, to {success:.3f} in the last {WINDOW}"
        )
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
    begun, length = _first(history, "completions/mean_length"), _last(history, "completions/mean_length")
    if begun and length is not None and length > 2.0 * begun and not learned and "length" not in found:
        found["length"] = f"rollouts grew from {begun:.0f} to {length:.0f} tokens, and success did not"
    clean, tails = _first(history, "hsd/repeated_tail"), _last(history, "hsd/repeated_tail")
    if clean is not None and tails is not None and tails > max(2.0 * clean, 0.1):
        found["repetition"] = f"{tails:.0%} of the rollouts end in a repeated cycle, {clean:.0%} did at the start"
    # Not hsd/coverage, which falls in every run that learns: f(p, G) goes to 0 with the failures.
    helped, helps = _first(history, "hsd/failing_with_peer"), _last(history, "hsd/failing_with_peer")
    if helped is not None and helps is not None and _halved(helped, helps, questions) and not learned:
        found["coverage"] = f"failing rollouts with a successful peer fell from {helped:.0%} to {helps:.0%}"
    alike = _since_mixed(history)
    if alike >= 2 * WINDOW and success is not None and success < 1.0:
        found["alike"] = (
            f"no group has both a success and a failure since {alike} steps: no failing rollout has a peer, and "
            "none an advantage"
        )
    empty, leaks = _last(history, "hsd/drawn_empty"), _last(history, "hsd/drawn_leaks")
    if empty is not None and empty > 0.5:
        found["empty texts"] = f"{empty:.0%} of the texts that the model writes between rollouts and teacher are empty"
    if leaks is not None and leaks > 0.1:
        found["leaks"] = f"{leaks:.0%} of the texts that must not give the answer away do"
    return found


def _halved(before: float, now: float, questions: float | None) -> bool:
    """Whether a share fell by half, and by more than `DEVIATIONS` of two windows of ``questions`` a step each."""
    pooled = (before + now) / 2.0
    deviation = 0.0 if questions is None else math.sqrt(2.0 * pooled * (1.0 - pooled) / (WINDOW * questions))
    return now < 0.5 * before and before - now > DEVIATIONS * deviation


def _since_mixed(history: Sequence[Mapping[str, float]]) -> int:
    """Steps at the end of ``history`` whose groups were all alike."""
    return next((n for n, row in enumerate(reversed(history)) if row.get("hsd/mixed_groups") != 0.0), len(history))


def _window(history: Sequence[Mapping[str, float]], key: str, start: int) -> float | None:
    return _mean(history[start : start + WINDOW], key)


def _first(history: Sequence[Mapping[str, float]], key: str) -> float | None:
    return _window(history, key, 0)


def _last(history: Sequence[Mapping[str, float]], key: str) -> float | None:
    return _window(history, key, len(history) - WINDOW)


def _best(history: Sequence[Mapping[str, float]], key: str) -> tuple[float | None, int]:
    """The largest mean of a window, and the number of steps up to its end."""
    ends = range(WINDOW, len(history) + 1)
    means = [(m, end) for end in ends if (m := _window(history, key, end - WINDOW)) is not None]
    return max(means, default=(None, 0))


def moving_mean(rows: Sequence[Mapping[str, Any]], key: str, window: int) -> list[float]:
    """At each step the mean of the last ``window`` values; NaN where none of them was measured."""
    means = [_mean(rows[max(0, end - window) : end], key) for end in range(1, len(rows) + 1)]
    return [math.nan if m is None else m for m in means]


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    # None and NaN are steps that had nothing to measure.
    values = [v for row in rows if (v := row.get(key)) is not None and not math.isnan(v)]
    return sum(values) / len(values) if values else None
