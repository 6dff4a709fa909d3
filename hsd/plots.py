"""Pictures of credit and training. matplotlib is imported on use and draws to a file, without a display."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
        path: The picture to write; its suffix picks the format.
        profiles: ``{teacher: (offsets, mean_abs)}``, as :func:`hsd.credit.credit_profile` returns them.
        title: Stands above the picture.

    Raises:
        ValueError: No profile, or offsets and values of different lengths.
    """
    _check_lengths("profiles", {name: (offsets, values) for name, (offsets, values) in profiles.items()})
    fig, axes = _figure(6.4, 3.8)
    axes.axvline(0, color=_GREY, linewidth=1, linestyle="--", zorder=1)
    for i, (name, (offsets, values)) in enumerate(profiles.items()):
        axes.plot(_floats(offsets), _floats(values), label=name, markersize=3, **_style(i))
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
        path: The picture to write; its suffix picks the format.
        masses: ``{teacher: shares}`` with shares in [0, 1], as :func:`hsd.credit.credit_mass` returns them.
        windows: The half-widths ``w`` in tokens, positive.
        title: Stands above the picture.

    Raises:
        ValueError: No curve, or a curve that does not match ``windows`` in length.
    """
    _check_lengths("masses", {name: (windows, shares) for name, shares in masses.items()})
    fig, axes = _figure(6.4, 3.8)
    for i, (name, shares) in enumerate(masses.items()):
        axes.plot(_floats(windows), [100 * s for s in _floats(shares)], label=name, markersize=6, **_style(i))
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(windows), labels=[str(w) for w in windows])
    axes.minorticks_off()
    axes.set_ylim(0, 102)
    axes.set_xlabel(r"window $w$ (tokens on each side of $\tau$)")
    axes.set_ylabel(r"share of $|A|$ within $w$ of $\tau$ (%)")
    _finish(fig, axes, path, title)


def plot_training(path: str | Path, steps: Sequence[float], curves: Mapping[str, Sequence[float]]) -> None:
    """Small multiples: one panel for each metric over the training steps.

    Args:
        path: The picture to write; its suffix picks the format.
        steps: Training steps, shared by all curves.
        curves: ``{metric: values}``; NaN leaves a gap. The name stands above the panel, so put the unit into
            it.

    Raises:
        ValueError: No curve, or a curve that does not match ``steps`` in length.
    """
    _check_lengths("curves", {name: (steps, values) for name, values in curves.items()})
    columns = 2 if len(curves) == 4 else min(3, len(curves))
    rows = math.ceil(len(curves) / columns)
    fig = _bare_figure(max(3.2 * columns, 4.2), 2.3 * rows + 0.3)
    fig.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    grid = fig.subplots(rows, columns, squeeze=False, sharex=True)
    panels: list[Axes] = list(grid.flat)
    for axes, (name, values) in zip(panels, curves.items(), strict=False):
        marker = "o" if len(steps) <= 40 else ""
        style = _style(0) | {"marker": marker, "markersize": 3}
        axes.plot(_floats(steps), _floats(values), **style)
        axes.set_title(name, fontsize=10, loc="left")
        axes.margins(x=0.01)
        _clean(axes)
    for axes in panels[len(curves) :]:
        axes.set_visible(False)
    for i in range(len(curves)):
        if i + columns >= len(curves):  # the lowest panel of its column
            panels[i].set_xlabel("training step")
            panels[i].tick_params(labelbottom=True)
    fig.savefig(path, dpi=_DPI)


def _bare_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # not pyplot: no global state, and saving a bare figure uses Agg

    return Figure(figsize=(width, height), layout="constrained")


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    fig = _bare_figure(width, height)
    return fig, fig.subplots()


def _style(i: int) -> dict[str, Any]:
    return {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[i % len(_MARKERS)], "linewidth": 1.6}


def _clean(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)


def _finish(fig: Figure, axes: Axes, path: str | Path, title: str) -> None:
    axes.set_title(title, fontsize=11, loc="left")
    axes.legend(framealpha=0.9, edgecolor="none")
    _clean(axes)
    fig.savefig(path, dpi=_DPI)


def _floats(values: Sequence[float]) -> list[float]:
    return [float(v) for v in values]  # tensors too


def _check_lengths(name: str, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> None:
    if not curves:
        raise ValueError(f"{name}: expected at least one curve, got none")
    for curve, (xs, ys) in curves.items():
        if len(xs) != len(ys):
            raise ValueError(f"{name}[{curve!r}]: expected {len(xs)} values, got {len(ys)}")
