"""How often a 95 % interval of a success rate holds the true rate, and how wide it is, by simulation.

    python benchmarks/bench_intervals.py --json benchmarks/results/intervals.json

The rates of questions come from a Beta distribution with the given mean and correlation of two samples of a question,
and each is sampled `samples` times. The report is written beside the JSON, as .md. About 6 minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import bootstrap
from timing import environment

from hsd.evaluate.interval import interval

QUESTIONS, RATES = (30, 40, 200), (0.02, 0.05, 0.2, 0.5, 0.95)
SAMPLING = ((1, 0.0), (4, 0.3), (4, 0.8), (16, 0.1), (16, 0.5))  # samples a question, correlation within a question
Ends = Callable[[np.ndarray, int], tuple[float, float]]


def percentile(shares: np.ndarray, samples: int) -> tuple[float, float]:
    return _scipy(shares, "percentile")


def bca(shares: np.ndarray, samples: int) -> tuple[float, float]:
    return _scipy(shares, "BCa")


def ours(shares: np.ndarray, samples: int) -> tuple[float, float]:
    return interval(shares.tolist(), samples)


def _scipy(shares: np.ndarray, method: Any) -> tuple[float, float]:
    if np.ptp(shares) == 0:  # no resample differs: BCa is not defined and the percentile has no width
        return shares[0], shares[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = bootstrap((shares,), np.mean, n_resamples=1000, method=method, rng=np.random.default_rng(0))
    return found.confidence_interval.low, found.confidence_interval.high


CONTENDERS: dict[str, tuple[Ends, int]] = {"ours": (ours, 10), "percentile bootstrap": (percentile, 1), "BCa": (bca, 1)}


def measure(questions: int, samples: int, alike: float, rate: float, runs: int) -> dict[str, Any]:
    """Coverage and mean width of each contender; the quick ones get more runs."""
    rng = np.random.default_rng([questions, samples, int(alike * 100), int(rate * 100)])
    row: dict[str, Any] = {"questions": questions, "samples": samples, "correlation": alike, "rate": rate}
    rates: Any = rate
    for name, (ends, more) in CONTENDERS.items():
        covered, width = 0, 0.0
        for _ in range(runs * more):
            if alike:
                scale = 1 / alike - 1
                rates = rng.beta(rate * scale, (1 - rate) * scale, questions)
            low, high = ends(rng.binomial(samples, rates, questions) / samples, samples)
            covered += low <= rate <= high
            width += high - low
        row[name] = {"coverage": covered / (runs * more), "width": width / (runs * more), "runs": runs * more}
    return row


def report(rows: list[dict[str, Any]], facts: dict[str, Any], command: str) -> str:
    lines = [
        "# Coverage of 95 % intervals of a success rate",
        "",
        f"`{command}`, commit {facts['commit']}. "
        "Coverage is the share of simulated evaluations whose interval holds the "
        "true rate. The mean width is in brackets. Ours is `hsd.evaluate.interval`, "
        f"{rows[0]['ours']['runs']:,} evaluations a row. The others are `scipy.stats.bootstrap` over questions, "
        f"{rows[0]['BCa']['runs']:,} evaluations a row with 1,000 resamples each.",
        "",
        "| questions | samples | correlation | rate | " + " | ".join(CONTENDERS) + " |",
        "|---" * (4 + len(CONTENDERS)) + "|",
    ]
    for row in rows:
        cells = [f"{row[name]['coverage']:.1%} ({row[name]['width']:.3f})" for name in CONTENDERS]
        cells = [row["questions"], row["samples"], row["correlation"], row["rate"], *cells]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    worst = {name: min(row[name]["coverage"] for row in rows) for name in CONTENDERS}
    lines += ["", "Least coverage: " + ", ".join(f"{name} {least:.1%}" for name, least in worst.items()) + "."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=400, help="evaluations a row for the bootstraps, a tenth of ours")
    args = parser.parse_args()
    rows = []
    for questions in QUESTIONS:
        for samples, alike in SAMPLING:
            for rate in RATES:
                rows.append(measure(questions, samples, alike, rate, args.runs))
                print(rows[-1], flush=True)
    facts = environment("cpu")
    args.json.write_text(json.dumps({"environment": facts, "rows": rows}, indent=1) + "\n")
    command = f"python benchmarks/bench_intervals.py --json {args.json}"
    args.json.with_suffix(".md").write_text(report(rows, facts, command))


if __name__ == "__main__":
    main()
