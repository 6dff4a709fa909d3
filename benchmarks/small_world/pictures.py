"""The experiment's three pictures; each is drawn where there are data for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.small_world.plan import ABLATIONS, BASE_ROW
from benchmarks.small_world.results import coverage_bins, final, interval, rows, warm_starts
from hsd.credit import coverage

# Okabe and Ito's colours, told apart with any common colour vision.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P")
PANELS = (("hsd", "opsd", "sdpo", "grpo+opsd"), ("hsd", "grpo", "dr_grpo", "dapo", "rlsd"))
DPI = 110


def draw(folder: Path, facts: dict[str, Any]) -> list[str]:
    """Writes what can be drawn; returns the file names."""
    makers = {"curves.png": curves, "coverage.png": covered, "sweeps.png": sweeps}
    return [name for name, make in makers.items() if make(folder / name, facts)]


def curves(path: Path, facts: dict[str, Any]) -> bool:
    """Success on the validation questions, mean over seeds with its interval, from the shared warm starts."""
    runs, warm = facts["runs"], {w["seed"]: w["validation"]["mean"] for w in warm_starts(facts)}
    if not rows(runs, "main", "hsd"):
        return False
    fig = Figure(figsize=(9.6, 3.9), layout="constrained")
    for axes, methods in zip(fig.subplots(1, 2, sharey=True), PANELS, strict=True):
        for i, method in enumerate(m for m in methods if rows(runs, "main", m)):
            by_seed = rows(runs, "main", method)
            points: dict[int, list[float]] = {}
            for seed, run in by_seed.items():
                for step, value in [(0, warm[seed]), *run["curve"]]:
                    points.setdefault(step, []).append(value)
            here = [interval(values) for values in points.values()]
            style = _style(i)
            axes.plot(list(points), [x.mean for x in here], label=method, **style)
            if all(x.half is not None for x in here) and len(by_seed) > 2:
                low, high = [x.mean - x.half for x in here], [x.mean + x.half for x in here]  # type: ignore[operator]
                axes.fill_between(list(points), low, high, color=style["color"], alpha=0.13, linewidth=0)
        axes.set_xlabel("training step")
        axes.legend(loc="center right", bbox_to_anchor=(1, 0.62), framealpha=0.9, edgecolor="none")
        _clean(axes)
        axes.set_ylim(0, 1.02)
    fig.axes[0].set_ylabel("success, held-out questions")
    fig.axes[0].set_title("learning from a teacher's distribution", fontsize=10, loc="left")
    fig.axes[1].set_title("HSD and policy gradients", fontsize=10, loc="left")
    fig.savefig(path, dpi=DPI)
    return True


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
        axes.legend(framealpha=0.9, edgecolor="none")
        _clean(axes)
    fig.savefig(path, dpi=DPI)
    return True


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _style(i: int) -> dict[str, Any]:
    return {"color": _COLOURS[i % 6], "marker": _MARKERS[i % 6], "linewidth": 1.6, "markersize": 4}


def _clean(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
