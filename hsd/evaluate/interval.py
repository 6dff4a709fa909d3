"""The interval of a share over questions that are sampled once or several times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import fsum, sqrt
from statistics import NormalDist, fmean, pvariance

Grid = Sequence[Sequence[float | None]]  # questions x samples: 1 right, 0 wrong, None where the verifier failed


def interval(shares: Sequence[float], samples: int = 1) -> tuple[float, float]:
    """Wilson's 95 % score interval for the mean of ``shares``, one number from 0 to 1 a question.

    With one sample a question it is ``scipy.stats.binomtest(k, n).proportion_ci(0.95, "wilson")``. With several, the
    samples of one question are no independent draws: Wilson's n is the effective number of samples,
    ``N q (1 - q) / variance``, at least the N questions and at most all ``N * samples``. Mean q and variance are those
    of the shares with one all-right and one all-wrong question added, because few successes say little about the
    variance. Coverage by simulation: benchmarks/results/intervals.md.

    Raises ValueError for no shares and for one outside [0, 1].
    """
    if not shares or not all(0 <= share <= 1 for share in shares):
        raise ValueError(f"shares: expected numbers from 0 to 1, at least one, got {list(shares)[:5]!r}")
    questions, mean = len(shares), fsum(shares) / len(shares)
    added = [*shares, 0.0, 1.0]
    q = fmean(added)
    n = min(max(questions * q * (1 - q) / pvariance(added), questions), questions * samples)
    z = NormalDist().inv_cdf(0.975)
    middle = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z * sqrt(mean * (1 - mean) / n + (z / (2 * n)) ** 2) / (1 + z * z / n)
    return max(0.0, middle - half) if mean else 0.0, min(1.0, middle + half) if mean < 1 else 1.0


def with_interval(mean: float, low: float, high: float) -> str:
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


@dataclass(frozen=True)
class Share:
    """The mean over questions of their share of right samples, and a 95 % interval over questions.

    A sample without a verdict is wrong in ``mean`` and ``low`` and right in ``high`` and ``most``.
    """

    mean: float
    low: float
    high: float
    most: float


def share(grid: Grid, estimate: Callable[[list[float]], float] = fmean, draws: int | None = None) -> Share:
    """``estimate`` of each question's samples, averaged; ``draws`` independent ones a question, by default all."""
    least, most = ([estimate([fill if x is None else x for x in row]) for row in grid] for fill in (0.0, 1.0))
    draws = len(grid[0]) if draws is None else draws
    return Share(fmean(least), interval(least, draws)[0], interval(most, draws)[1], fmean(most))
