"""Pictures of credit and training. matplotlib is imported on use and draws to a file, without a display.

``path`` is the file to write, whose suffix picks the format; ``title`` stands above the picture. Pictures of credit
have a panel for each measurement: before training, and after it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hsd.files import replacing
from hsd.progress import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hsd.evaluate import Success

# Okabe and Ito's colours, told apart with any common colour vision; each curve also has its own marker.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_GREY = "#555555"
_DPI = 120

SUCCESS = "hsd/success_rate"
CURVES = {  # the panel of each metric of metrics.jsonl
    SUCCESS: "success",
    "hsd/kl": "divergence from the teacher (nats/token)",
    "hsd/coverage": "coverage: failing with a peer",
    "hsd/credit_at_tau": "|A| at tau (nats)",
    "hsd/student_entropy": "student entropy (nats/token)",
    "completions/mean_length": "rollout length (tokens)",
}

Bin = tuple[float, float, float, int]  # success, coverage, its standard error (NaN where there is none), groups
Profile = tuple[Sequence[float], Sequence[float], Sequence[float]]  # offsets, mean |A|, its standard error


def plot_credit_profile(path: str | Path, panels: Mapping[str, Mapping[str, Profile]], *, title: str) -> None:
    """Mean ``|A|`` (nats) around the divergence position with its 95 % interval, one curve for each teacher.

    Args:
        panels: ``{panel: {teacher: (offsets, mean_abs, error)}}``, as
            :func:`hsd.hindsight.credit.credit_profile` returns them; NaN has no point, and no band.
    """
    fig, row = _row(len(panels))
    for axes, (panel, profiles) in zip(row, panels.items(), strict=True):
        axes.axvline(0, color=_GREY, linewidth=1, linestyle="--", zorder=1)
        for i, (name, (offsets, values, error)) in enumerate(profiles.items()):
            axes.plot(offsets, values, label=name, markersize=3, **_style(i))
            low, high = ([v + z * e for v, e in zip(values, error, strict=True)] for z in (-1.96, 1.96))
            axes.fill_between(list(offsets), low, high, color=_COLOURS[i], alpha=0.25, linewidth=0)
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
        axes.locator_params(axis="x", integer=True)
        axes.set_title(panel, fontsize=10)
    row[0].set_ylim(bottom=0)  # of all panels, once all of them are drawn
    row[0].set_ylabel(r"mean credit $|A|$ (nats)")
    _finish(fig, row, path, title)


def plot_credit_mass(
    path: str | Path, panels: Mapping[str, Mapping[str, Sequence[float]]], windows: Sequence[int], *, title: str
) -> None:
    """Share of the credit within ``w`` tokens of the divergence position, one curve for each teacher.

    Args:
        panels: ``{panel: {teacher: shares}}`` with the shares of :func:`hsd.hindsight.credit.credit_mass`.
        windows: The half-widths ``w`` in tokens, positive.
    """
    fig, row = _row(len(panels))
    for axes, (panel, masses) in zip(row, panels.items(), strict=True):
        for i, (name, shares) in enumerate(masses.items()):
            axes.plot(windows, [100 * s for s in shares], label=name, markersize=6, **_style(i))
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(windows), labels=[str(w) for w in windows])
        axes.minorticks_off()
        axes.set_ylim(0, 102)
        axes.set_xlabel(r"window $w$ (tokens on each side of $\tau$)")
        axes.set_title(panel, fontsize=10)
    row[0].set_ylabel(r"share of $|A|$ within $w$ of $\tau$ (%)")
    _finish(fig, row, path, title)


def plot_coverage(
    path: str | Path,
    panels: Mapping[str, tuple[Sequence[Bin], tuple[float, float]]],
    group_size: int,
    *,
    title: str,
) -> None:
    """Coverage, the share of all rollouts that fail and have a successful peer, over the success rate.

    Args:
        panels: ``{panel: (bins, overall)}``: questions of like difficulty, with 95 % intervals, and ``(success,
            coverage)`` of all of them. Beside them stands ``f(p, G)`` of :func:`hsd.hindsight.credit.coverage`.
        group_size: G.
    """
    from hsd.hindsight.credit import coverage  # imports torch, which `hsd --help` need not wait for

    fig, row = _row(len(panels))
    ps = [i / 200 for i in range(201)]
    for axes, (panel, (bins, overall)) in zip(row, panels.items(), strict=True):
        axes.plot(ps, [coverage(p, group_size) for p in ps], color=_GREY, linewidth=1.2, label=f"f(p, {group_size})")
        success, covered, error, groups = zip(*sorted(bins), strict=True)
        bars = [0.0 if math.isnan(e) else 1.96 * e for e in error]
        # Beside the points such labels would lie over each other: bins of few groups may have one success rate.
        label = f"measured, by difficulty\n(groups from the left: {', '.join(map(str, groups))})"
        points = {"label": label, "capsize": 3, "linestyle": ""}
        axes.errorbar(success, covered, yerr=bars, **points, **_style(0))
        axes.plot([overall[0]], [overall[1]], label="measured, all", **_star())
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("success rate of the rollouts, p")
        axes.set_title(panel, fontsize=10)
    row[0].set_ylabel("share failing, with a peer")
    _finish(fig, row, path, title)


def plot_silence(
    path: str | Path, panels: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, title: str
) -> None:
    """Rollout-averaged ``|A|`` (nats) of the answer-only teacher against the peer teacher's, a point for each rollout.

    Below the diagonal the answer alone says less than a peer. Logarithmic; values under 1e-4 nats are drawn there.

    Args:
        panels: ``{panel: (with_peer, answer_only)}``, one value for each rollout, nats.
    """
    fig, row = _row(len(panels), 4.8, 4.4)
    floor = 1e-4
    high = 1.5 * max(1.0, *(v for both in panels.values() for values in both for v in values))
    low = floor * 0.8
    for axes, (panel, both) in zip(row, panels.items(), strict=True):
        xs, ys = ([max(floor, v) for v in values] for values in both)
        axes.plot([low, high], [low, high], color=_GREY, linewidth=1, linestyle="--", label="equal")
        axes.scatter(xs, ys, s=14, color=_COLOURS[0], alpha=0.5, edgecolors="none", label=counted(len(xs), "rollout"))
        mean_x, mean_y = (sum(values) / len(values) for values in both)
        axes.plot([max(floor, mean_x)], [max(floor, mean_y)], label=f"mean: {mean_x:.3f} and {mean_y:.3f}", **_star())
        axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), aspect="equal")
        axes.set_xlabel("peer teacher, mean $|A|$ of a rollout (nats)")
        axes.set_title(panel, fontsize=10)
    row[0].set_ylabel("answer-only teacher, mean $|A|$ (nats)")
    _finish(fig, row, path, title)


def plot_methods(
    path: str | Path,
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    before: Success,
    after: Mapping[str, Success],
    *,
    title: str,
) -> None:
    """Methods from one initial policy: success of their rollouts over the steps, and on held-out questions at the end.

    Args:
        curves: ``{method: (steps, success)}``.
        before: success of the initial policy on the held-out questions.
        after: ``{method: success}`` on the same questions, drawn with their 95 % intervals.
    """
    fig = _bare_figure(9.6, 3.8)
    learning, held_out = fig.subplots(1, 2, sharey=True, width_ratios=(5, 3))
    for i, (name, (steps, values)) in enumerate(curves.items()):
        learning.plot(steps, values, label=name, **_style(i) | {"markersize": 3})
    learning.set(xlabel="training step", ylabel="success", ylim=(0, 1.02), title="rollouts in training")
    grey = {"color": _GREY, "marker": "o"}
    for i, (measured, style) in enumerate([(before, grey), *((s, _style(i)) for i, s in enumerate(after.values()))]):
        ends = [[measured.mean - measured.low], [measured.high - measured.mean]]
        held_out.errorbar([i], [measured.mean], yerr=ends, capsize=4, markersize=6, linestyle="", **style)
        held_out.annotate(f"{measured.mean:.2f}", (i, measured.mean), (8, 0), textcoords="offset points", fontsize=9)
    held_out.set_xticks(range(1 + len(after)), labels=["before", *after])
    held_out.margins(x=0.15)
    held_out.set_title(f"{counted(before.questions, 'held-out question')}, 95 % intervals")
    _clean(held_out)
    _finish(fig, [learning], path, title)


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
        axes.locator_params(axis="x", integer=True, min_n_ticks=1)  # also where there is one step
    if len(next(iter(curves.values()))) > 1:
        panels[0].legend(fontsize=8, framealpha=0.9, edgecolor="none")
    _save(fig, path)


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


def _row(panels: int, width: float = 6.4, height: float = 3.8) -> tuple[Figure, list[Axes]]:
    """Panels of one size beside each other, with shared axes: of several, each has 0.8 of ``width``."""
    fig = _bare_figure(width * (1 if panels == 1 else 0.8 * panels), height)
    return fig, list(fig.subplots(1, panels, squeeze=False, sharex=True, sharey=True).flat)


def _style(i: int) -> dict[str, Any]:
    return {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[i % len(_MARKERS)], "linewidth": 1.6}


def _star() -> dict[str, Any]:
    return _style(1) | {"marker": "*", "markersize": 12, "linestyle": ""}


def _clean(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)


def _finish(fig: Figure, row: Sequence[Axes], path: str | Path, title: str) -> None:
    for axes in row:
        axes.legend(framealpha=0.9, edgecolor="none", fontsize="medium" if len(row) == 1 else "small")
        _clean(axes)
    fig.suptitle(title, fontsize=11)
    _save(fig, path)


def _save(fig: Figure, path: str | Path) -> None:
    with replacing(Path(path)) as part:
        fig.savefig(part, dpi=_DPI, format=Path(path).suffix[1:])
