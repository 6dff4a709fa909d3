"""The experiment's pictures; each is drawn where there are data for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.small_world.plan import ABLATIONS, BASE_ROW, LEAGUE, MAIN
from benchmarks.small_world.results import Interval, coverage_bins, curve_mean, final, interval, rows, warm_starts
from hsd.hindsight.credit import coverage

# Okabe and Ito's colours, told apart with any common colour vision.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555", "#B8A900")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DPI = 110


def draw(folder: Path, facts: dict[str, Any]) -> list[str]:
    """Writes what can be drawn; returns the file names."""
    makers = {"curves.png": curves, "league.png": league, "coverage.png": covered, "sweeps.png": sweeps}
    return [name for name, make in makers.items() if make(folder / name, facts)]


def curves(path: Path, facts: dict[str, Any]) -> bool:
    """Success on the validation questions from the shared warm starts, mean over seeds with its interval; and, because
    the seeds differ far more than the methods, each method minus HSD on the same seed."""
    runs, warm = facts["runs"], {w["seed"]: w["validation"]["mean"] for w in warm_starts(facts)}
    found = {method: rows(runs, "main", method) for method in MAIN}
    curve = {
        method: {seed: dict([(0, warm[seed]), *map(tuple, run["curve"])]) for seed, run in by_seed.items()}
        for method, by_seed in found.items()
        if by_seed
    }
    if "hsd" not in curve:
        return False
    fig = Figure(figsize=(10.4, 4.2), layout="constrained")
    left, right = fig.subplots(1, 2)
    for i, (method, by_seed) in enumerate(curve.items()):
        steps = sorted(next(iter(by_seed.values())))
        values = [interval([c[step] for c in by_seed.values()]) for step in steps]
        _bars(left, steps, values, i, method)
        both = [s for s in by_seed if s in curve["hsd"]]
        if method != "hsd" and both:
            gaps = [interval([by_seed[s][step] - curve["hsd"][s][step] for s in both]) for step in steps]
            _bars(right, steps, gaps, i, method)
    right.axhline(0, color=_COLOURS[0], linewidth=1.6)
    left.set_ylabel("success, validation questions")
    left.set_ylim(0, 1.05)
    right.set_ylim(-0.32, 0.2)  # opsd leaves the picture
    right.set_ylabel("minus HSD on the same seed")
    for axes in (left, right):
        axes.set_xlabel("training step")
        _clean(axes)
    fig.legend(*left.get_legend_handles_labels(), loc="outside right center", frameon=False)
    fig.savefig(path, dpi=DPI)
    return True


def league(path: Path, facts: dict[str, Any]) -> bool:
    """Each method minus HSD on the same seed, a point a seed and a bar at their mean: the curve's mean, and the end."""
    runs = facts["runs"]
    hsd = rows(runs, "main", "hsd")
    found = {m: rows(runs, "main", m) or rows(runs, "league", m) for m in (*MAIN, *LEAGUE) if m != "hsd"}
    found = {m: {s: by_seed[s] for s in by_seed if s in hsd} for m, by_seed in found.items()}
    if not any(found[m] for m in LEAGUE):
        return False
    gaps = {
        what: {m: [what(r) - what(hsd[s]) for s, r in by_seed.items()] for m, by_seed in found.items() if by_seed}
        for what in (curve_mean, final)
    }
    names = sorted(gaps[curve_mean], key=lambda m: sum(gaps[curve_mean][m]) / len(gaps[curve_mean][m]))
    fig = Figure(figsize=(9.6, 0.27 * len(names) + 0.9), layout="constrained")
    titles = {curve_mean: "mean of the curve", final: "final success"}
    for axes, (what, gap) in zip(fig.subplots(1, 2, sharey=True), gaps.items(), strict=True):
        for y, name in enumerate(names):
            axes.plot(gap[name], [y] * len(gap[name]), "o", color=_COLOURS[0], markersize=4, alpha=0.6)
            axes.plot(sum(gap[name]) / len(gap[name]), y, "|", color=_COLOURS[1], markersize=13, markeredgewidth=2.2)
        axes.axvline(0, color=_COLOURS[6], linewidth=1.2)
        axes.set_yticks(range(len(names)), labels=names)
        axes.set_xlabel(f"{titles[what]}, minus HSD on the same seed")
        _clean(axes)
    fig.savefig(path, dpi=DPI)
    return True


def _bars(axes: Any, steps: Sequence[int], values: Sequence[Interval], i: int, label: str) -> None:
    """A line with the intervals as bars, a little beside those of the other methods."""
    half = [x.half if x.half is not None and x.n > 2 else 0.0 for x in values]
    beside = [step + 0.35 * (i - 3.5) for step in steps]
    axes.errorbar(beside, [x.mean for x in values], yerr=half, label=label, elinewidth=0.9, capsize=2, **_style(i))


def covered(path: Path, facts: dict[str, Any]) -> bool:
    """Measured coverage by tenths of p, over f(p, G)."""
    bins = {size: coverage_bins(facts["runs"], size) for size in (4, 8, 16)}
    if not any(bins.values()):
        return False
    fig = Figure(figsize=(6.2, 3.9), layout="constrained")
    axes = fig.subplots()
    grid = [i / 200 for i in range(201)]
    for i, (size, here) in enumerate(bins.items()):
        style = _style(i)
        axes.plot(grid, [coverage(p, size) for p in grid], color=style["color"], linewidth=1.2, label=f"f(p, {size})")
        if here:
            xs, ys = [b[0] for b in here], [b[1] for b in here]
            axes.plot(xs, ys, linestyle="", marker=style["marker"], color=style["color"], label=f"measured, G = {size}")
    axes.set_xlabel("success p of a step's rollouts")
    axes.set_ylabel("failing, with a successful peer")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.legend(framealpha=0.9, edgecolor="none")
    _clean(axes)
    fig.savefig(path, dpi=DPI)
    return True


def sweeps(path: Path, facts: dict[str, Any]) -> bool:
    """Final success against the group size and against the reference coefficient, a point a seed."""
    parts = [p for p in ("G", "reference_coef") if any(rows(facts["runs"], p, name) for name in ABLATIONS[p])]
    if not parts:
        return False
    fig = Figure(figsize=(4.6 * len(parts), 3.5), layout="constrained")
    for axes, part in zip(fig.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        found = {name: rows(facts["runs"], part, name) for name in ABLATIONS[part]}
        seeds = {s for by_seed in found.values() for s in by_seed}
        base = rows(facts["runs"], "main", "hsd")
        found[BASE_ROW[part]] = {s: base[s] for s in seeds & base.keys()}
        names = sorted((n for n in found if found[n]), key=float)
        for i, seed in enumerate(sorted(seeds)):
            have = [(x, final(found[n][seed])) for x, n in enumerate(names) if seed in found[n]]
            axes.plot(*_columns(have), label=f"seed {seed}", **_style(i))
        axes.set_xticks(range(len(names)), labels=names)
        axes.set_xlabel("group size G, 64 rollouts a step" if part == "G" else "reference coefficient")
        axes.set_ylabel("final success")
        axes.set_ylim(top=1.0, bottom=min(0.9, axes.get_ylim()[0]))
        axes.legend(framealpha=0.9, edgecolor="none")
        _clean(axes)
    fig.savefig(path, dpi=DPI)
    return True


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _style(i: int) -> dict[str, Any]:
    return {"color": _COLOURS[i % 8], "marker": _MARKERS[i % 8], "linewidth": 1.6, "markersize": 4}


def _clean(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
