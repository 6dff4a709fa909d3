"""pass@k over problems, with bootstrap intervals; samples that the verifier could not judge are counted apart."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from typing import Any

import numpy as np

RESAMPLES = 10_000


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Probability that k of the ``samples``, drawn without replacement, hold a correct one: ``1 - C(n-c, k)/C(n, k)``.

    An unbiased estimate of pass@k for any ``k <= samples`` (arXiv 2107.03374).
    """
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise ValueError(f"expected 0 <= correct <= samples and 1 <= k <= samples, got {correct=}, {samples=}, {k=}")
    return 1.0 - comb(samples - correct, k) / comb(samples, k)


def bootstrap(values: Sequence[float], *, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of the mean under resampling of problems, with 10,000 resamples and a fixed seed.

    Equal values give an interval of no width: 0 of 200 is not known to be 0.
    """
    array, rng = np.asarray(values, dtype=np.float64), np.random.default_rng(0)
    # A resample is a vector of counts: what it draws does not depend on the order of equal values.
    counts = rng.multinomial(len(array), np.full(len(array), 1 / len(array)), size=RESAMPLES)
    low, high = np.quantile(counts @ array / len(array), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def summarize(rewards: Sequence[Sequence[float | None]]) -> dict[str, Any]:
    """pass@1 and pass@k of problems x samples; None is a sample that the verifier failed on.

    Such samples count neither as right nor as wrong: a problem's rate is over its judged samples, and one without any
    is left out. Where there are any, ``pass@1_bounds`` says what pass@1 is if all of them are wrong, and all right.
    pass@k is given for powers of two up to the number of samples and needs k judged ones of each problem it counts.
    """
    for values in rewards:
        if wrong := [r for r in values if r not in (0.0, 1.0, None)]:
            raise ValueError(f"rewards: expected 0, 1 or None (verifier failed), got {wrong[0]!r}")
    judged = [[r for r in values if r is not None] for values in rewards]
    failures = sum(r is None for values in rewards for r in values)
    rates = [sum(values) / len(values) for values in judged if values]
    summary: dict[str, Any] = {"pass@1": None, "interval": None, "problems_judged": len(rates)}
    if rates:
        summary |= {"pass@1": sum(rates) / len(rates), "interval": bootstrap(rates)}
    most = max(map(len, rewards), default=0)
    ks = sorted({2**i for i in range(1, most.bit_length()) if 2**i <= most} | ({most} if most > 1 else set()))
    for k in ks:
        values = [pass_at_k(len(v), int(sum(v)), k) for v in judged if len(v) >= k]
        if values:
            summary[f"pass@{k}"] = {"value": sum(values) / len(values), "interval": bootstrap(values)}
    summary["verifier_failures"] = failures
    if failures:
        bounds = [[sum(fill if r is None else r for r in v) / len(v) for v in rewards] for fill in (0.0, 1.0)]
        summary["pass@1_bounds"] = [sum(b) / len(b) for b in bounds]
    return summary
