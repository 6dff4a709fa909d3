"""Pictures of credit and training. matplotlib is imported on use and draws to a file, without a display.

``path`` is the file to write, whose suffix picks the format; ``title`` stands above the picture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hsd.hindsight.credit import coverage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with any common colour vision; each curve also has its own marker.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_GREY = "#555555"
_DPI = 120


def plot_credit_profile(
    path: str | Path, profiles: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, title: str
) -> None:
    """Mean ``|A|`` (nats) around the divergence position, one curve for each teacher.

    Args:
        profiles: ``{teacher: (offsets, mean_abs)}``, as :func:`hsd.hindsight.credit.credit_profile` returns them.
    """
    fig, axes = _figure(6.4, 3.8)
    axes.axvline(0, color=_GREY, linewidth=1, linestyle="--", zorder=1)
    for i, (name, (offsets, values)) in enumerate(profiles.items()):
        axes.plot(offsets, values, label=name, markersize=3, **_style(i))
    axes.set_ylim(bottom=0)
    axes.margins(x=0.01)
    axes.annotate(
        r"$\tau$",
        (0, 1),
        xycoords=("data", "axes fraction"),
        xytext=(4, -4),
        textcoords="offset points",
        va="top",
        fontsize=12,
        color=_GREY,
    )
    axes.set_xlabel(r"offset from the divergence position, $t - \tau$ (tokens)")
    axes.set_ylabel(r"mean credit $|A|$ (nats)")
    _finish(fig, axes, path, title)


def plot_credit_mass(
    path: str | Path, masses: Mapping[str, Sequence[float]], windows: Sequence[int], *, title: str
) -> None:
    """Share of the credit within ``w`` tokens of the divergence position, one curve for each teacher.

    Args:
        masses: ``{teacher: shares}`` with shares in [0, 1], as :func:`hsd.hindsight.credit.credit_mass` returns them.
        windows: The half-widths ``w`` in tokens, positive.
    """
    fig, axes = _figure(6.4, 3.8)
    for i, (name, shares) in enumerate(masses.items()):
        axes.plot(windows, [100 * s for s in shares], label=name, markersize=6, **_style(i))
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(windows), labels=[str(w) for w in windows])
    axes.minorticks_off()
    axes.set_ylim(0, 102)
    axes.set_xlabel(r"window $w$ (tokens on each side of $\tau$)")
    axes.set_ylabel(r"share of $|A|$ within $w$ of $\tau$ (%)")
    _finish(fig, axes, path, title)


def plot_coverage(
    path: str | Path,
    bins: Sequence[tuple[float, float, float, int]],
    overall: tuple[float, float],
    group_size: int,
    *,
    title: str,
) -> None:
    """Coverage, the share of all rollouts that fail and have a successful peer, over the success rate.

    Args:
        bins: ``(success, coverage, error, groups)`` of questions of like difficulty: two shares, the standard error of
            the second (NaN where there is none) and the number of groups. Drawn with 95 % intervals beside ``f(p, G)``
            of :func:`hsd.hindsight.credit.coverage`.
        overall: ``(success, coverage)`` of all questions together.
        group_size: G.
    """
    fig, axes = _figure(6.4, 3.8)
    ps = [i / 200 for i in range(201)]
    axes.plot(ps, [coverage(p, group_size) for p in ps], color=_GREY, linewidth=1.2, label=f"f(p, {group_size})")
    success, covered, error, groups = zip(*bins, strict=True)
    bars = [0.0 if math.isnan(e) else 1.96 * e for e in error]
    axes.errorbar(success, covered, yerr=bars, label="measured, by difficulty", capsize=3, linestyle="", **_style(0))
    for x, y, n in zip(success, covered, groups, strict=True):
        label = f"{n} group{'s' * (n > 1)}"
        axes.annotate(label, (x, y), (6, 6), textcoords="offset points", fontsize=8, color=_GREY)
    axes.plot([overall[0]], [overall[1]], label="measured, all", **_star())
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("success rate of the rollouts, p")
    axes.set_ylabel("share failing, with a peer")
    _finish(fig, axes, path, title)


def plot_silence(path: str | Path, with_peer: Sequence[float], answer_only: Sequence[float], *, title: str) -> None:
    """Rollout-averaged ``|A|`` (nats) of the answer-only teacher against the peer teacher's, a point for each rollout.

    Below the diagonal the answer alone says less than a peer. Logarithmic; values under 1e-4 nats are drawn there.

    Args:
        with_peer, answer_only: One value for each rollout, nats.
    """
    fig, axes = _figure(4.8, 4.4)
    floor = 1e-4
    xs, ys = ([max(floor, v) for v in values] for values in (with_peer, answer_only))
    low, high = floor * 0.8, 1.5 * max(*xs, *ys, 1.0)
    axes.plot([low, high], [low, high], color=_GREY, linewidth=1, linestyle="--", label="equal")
    axes.scatter(xs, ys, s=14, color=_COLOURS[0], alpha=0.5, edgecolors="none", label=f"{len(xs)} rollouts")
    mean_x, mean_y = (sum(values) / len(values) for values in (with_peer, answer_only))
    axes.plot([max(floor, mean_x)], [max(floor, mean_y)], label=f"mean: {mean_x:.3f} and {mean_y:.3f}", **_star())
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), aspect="equal")
    axes.set_xlabel("peer teacher, mean $|A|$ of a rollout (nats)")
    axes.set_ylabel("answer-only teacher, mean $|A|$ (nats)")
    _finish(fig, axes, path, title)


def plot_curves(
    path: str | Path, curves: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]], *, xlabel: str
) -> None:
    """Metrics over the training steps: a panel for each metric, a line for each run.

    Args:
        curves: ``{metric: {run: (steps, values)}}``; NaN leaves a gap. A metric's name holds its unit.
            Several runs get a legend.
        xlabel: What the steps are.
    """
    fig, panels = _panels(list(curves), xlabel)
    for axes, lines in zip(panels, curves.values(), strict=True):
        for i, (run, (steps, values)) in enumerate(lines.items()):
            style = _style(i) | {"linestyle": ("-", "--", ":")[i // len(_COLOURS) % 3], "markersize": 3}
            style["marker"] = style["marker"] if len(steps) <= 40 else ""
            axes.plot(steps, values, label=run, **style)
        axes.margins(x=0.01)
    if len(next(iter(curves.values()))) > 1:
        panels[0].legend(fontsize=8, framealpha=0.9, edgecolor="none")
    fig.savefig(path, dpi=_DPI)


def _panels(titles: Sequence[str], xlabel: str) -> tuple[Figure, list[Axes]]:
    """A figure with a panel for each title: two beside each other for four, else three."""
    columns = 2 if len(titles) == 4 else min(3, len(titles))
    rows = math.ceil(len(titles) / columns)
    fig = _bare_figure(max(3.2 * columns, 4.2), 2.3 * rows + 0.3)
    fig.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    panels: list[Axes] = list(fig.subplots(rows, columns, squeeze=False, sharex=True).flat)
    for axes in panels[len(titles) :]:
        axes.set_visible(False)
    for i, (axes, title) in enumerate(zip(panels, titles, strict=False)):
        axes.set_title(title, fontsize=10, loc="left")
        _clean(axes)
        if i + columns >= len(titles):  # the lowest panel of its column
            axes.set_xlabel(xlabel)
            axes.tick_params(labelbottom=True)
    return fig, panels[: len(titles)]


def _bare_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # not pyplot: no global state, and saving a bare figure uses Agg

    return Figure(figsize=(width, height), layout="constrained")


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    fig = _bare_figure(width, height)
    return fig, fig.subplots()


def _style(i: int) -> dict[str, Any]:
    return {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[i % len(_MARKERS)], "linewidth": 1.6}


def _star() -> dict[str, Any]:
    return _style(1) | {"marker": "*", "markersize": 12, "linestyle": ""}


def _clean(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)


def _finish(fig: Figure, axes: Axes, path: str | Path, title: str) -> None:
    axes.set_title(title, fontsize=11, loc="left")
    axes.legend(framealpha=0.9, edgecolor="none")
    _clean(axes)
    fig.savefig(path, dpi=_DPI)
