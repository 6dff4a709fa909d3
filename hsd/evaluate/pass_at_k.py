"""pass@1 and pass@k over questions, with intervals; samples that the verifier could not judge are counted apart."""

from __future__ import annotations

from math import comb
from typing import Any

from hsd.evaluate.interval import Grid, share


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Probability that k of the ``samples``, drawn without replacement, hold a correct one: ``1 - C(n-c, k)/C(n, k)``.

    An unbiased estimate of pass@k for any ``k <= samples`` (arXiv 2107.03374).
    """
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise ValueError(f"expected 0 <= correct <= samples and 1 <= k <= samples, got {correct=}, {samples=}, {k=}")
    return 1.0 - comb(samples - correct, k) / comb(samples, k)


def summarize(rewards: Grid) -> dict[str, Any]:
    """pass@1 and pass@k of questions x samples; None is a sample that the verifier failed on.

    Such a sample counts as wrong. Where there are any, ``pass@1_bounds`` says what pass@1 is if all of them are wrong,
    and all right, and an interval reaches from the low end of the one to the high end of the other. pass@1 is None
    where nothing was judged. pass@k is given for powers of two and for all samples.
    """
    for values in rewards:
        if wrong := [r for r in values if r not in (0.0, 1.0, None)]:
            raise ValueError(f"rewards: expected 0, 1 or None (verifier failed), got {wrong[0]!r}")
    failures = sum(r is None for values in rewards for r in values)
    summary: dict[str, Any] = {"pass@1": None, "interval": None, "verifier_failures": failures}
    if not any(r is not None for values in rewards for r in values):
        return summary
    once, samples = share(rewards), len(rewards[0])
    summary |= {"pass@1": once.mean, "interval": (once.low, once.high)}
    for k in sorted({2**i for i in range(1, samples.bit_length())} | {samples} - {1}):
        found = share(rewards, lambda values, k=k: pass_at_k(samples, int(sum(values)), k), samples // k)
        summary[f"pass@{k}"] = {"value": found.mean, "interval": (found.low, found.high)}
    if failures:
        summary["pass@1_bounds"] = [once.mean, once.most]
    return summary
