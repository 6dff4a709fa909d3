"""The pictures: written, of the right size, not blank."""

import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from hsd.evaluate import Success
from hsd.viewer import plots
from hsd.viewer.plots import (
    plot_coverage,
    plot_credit_mass,
    plot_credit_profile,
    plot_curves,
    plot_methods,
    plot_silence,
)

DPI = 120


def colours(path: Path) -> set[tuple[int, int, int]]:
    with Image.open(path) as picture:
        return {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


BLUE, ORANGE = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)


def test_credit_profile(tmp_path):
    offsets = list(range(-16, 33))
    peer = [math.exp(-abs(o)) for o in offsets]
    one, two, three = tmp_path / "one.png", tmp_path / "two.png", tmp_path / "three.png"
    plot_credit_profile(one, {"": {"peer": (offsets, peer, [0.0] * 49)}}, title="Credit")
    both = {"peer": (offsets, peer, [0.1] * 49), "answer": (torch.tensor(offsets), torch.full((49,), 0.4), [0.1] * 49)}
    plot_credit_profile(str(two), {"": both}, title="Credit")
    plot_credit_profile(three, {"before": both, "after": both}, title="Credit")
    assert size(one) == size(two) == (6.4 * DPI, 3.8 * DPI) and size(three) == pytest.approx((1229, 456), abs=1)
    assert BLUE in colours(one) and ORANGE not in colours(one)
    assert {BLUE, ORANGE} <= colours(two)


def test_the_band_is_the_interval(tmp_path):
    """A band of 1.96 standard errors on both sides; none where the error is unknown."""
    drawn = []
    for error in (0.0, 0.2, math.nan):
        path = tmp_path / f"{error}.png"
        plot_credit_profile(path, {"": {"peer": (range(3), [1.0] * 3, [error] * 3)}}, title="Credit")
        with Image.open(path) as picture:
            pixels = picture.convert("RGB").load()
            column = [pixels[384, y] for y in range(picture.height)]
            drawn.append(sum(c == (191, 219, 235) for c in column) / picture.height)  # a quarter of blue on white
    assert drawn[0] == drawn[2] == 0 and drawn[1] > 0.2


def test_a_profile_with_gaps_is_drawn(tmp_path):
    """Offsets that no rollout reaches are NaN; all of them are when no rollout leaves its peer."""
    for name, values in (("some", [math.nan, 0.5, 1.0]), ("all", [math.nan] * 3)):
        path = tmp_path / f"{name}.png"
        plot_credit_profile(path, {"": {"peer": ([-1, 0, 1], values, [math.nan, 0.1, 0.1])}}, title=name)
        assert size(path) == (768, 456)


def test_credit_mass(tmp_path):
    path = tmp_path / "mass.png"
    windows = (2, 4, 8, 16, 32)
    plot_credit_mass(path, {"": {"peer": [0.2, 0.4, 0.6, 0.8, 1.0], "answer": [0.1] * 5}}, windows, title="Mass")
    assert size(path) == (768, 456)
    assert {BLUE, ORANGE} <= colours(path)


def test_coverage(tmp_path):
    path = tmp_path / "coverage.png"
    bins = [(0.1, 0.5, 0.02, 7), (0.9, 0.1, math.nan, 1)]
    plot_coverage(path, {"": (bins, (0.4, 0.5))}, 8, title="Coverage")
    assert size(path) == (768, 456)
    assert {BLUE, ORANGE} <= colours(path)


def test_the_sizes_of_bins_that_lie_together_are_in_the_legend(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("hsd.viewer.plots._save", lambda figure, path: drawn.append(figure))
    bins = [(0.1, 0.5, math.nan, 2), (0.1, 0.5, math.nan, 1), (0.0, 0.0, math.nan, 3)]
    plot_coverage(tmp_path / "coverage.png", {"": (bins, (0.4, 0.5))}, 8, title="Coverage")
    (axes,) = drawn[0].axes
    said = [text.get_text() for text in axes.get_legend().get_texts()]
    assert "measured, by difficulty\n(groups from the left: 3, 1, 2)" in said and not list(axes.texts)


def test_silence(tmp_path):
    path = tmp_path / "silence.png"
    values = ([0.5, 0.0, 2.0], [0.01, 0.0, 1e-6])  # zeros on a log scale
    plot_silence(path, {"": values}, title="Silence")
    assert size(path) == pytest.approx((4.8 * DPI, 4.4 * DPI), abs=1)
    assert ORANGE in colours(path)


def test_methods(tmp_path):
    path = tmp_path / "methods.png"
    low, high = (Success(mean, mean - 0.1, mean + 0.05, 512, 1, 0.0, 36.0) for mean in (0.4, 0.9))
    curves = {"hsd": ([1, 2, 3], [0.4, 0.6, 0.9]), "grpo": ([1, 2, 3], [0.4, math.nan, 0.5])}
    plot_methods(path, curves, low, {"hsd": high, "grpo": low}, title="Methods")
    assert size(path) == pytest.approx((9.6 * DPI, 3.8 * DPI), abs=1)
    assert {BLUE, ORANGE} <= colours(path)


@pytest.mark.parametrize(
    ("panels", "inches"), [(1, (4.2, 2.6)), (2, (6.4, 2.6)), (3, (9.6, 2.6)), (4, (6.4, 4.9)), (7, (9.6, 7.2))]
)
def test_curves_grow_with_their_panels(panels, inches, tmp_path):
    path = tmp_path / "curves.png"
    values = [0.1, math.nan, 0.3, 0.2, 0.5]
    plot_curves(path, {f"metric {i}": {"run": (range(1, 6), values)} for i in range(panels)}, xlabel="step")
    assert size(path) == pytest.approx([x * DPI for x in inches], abs=1)
    assert BLUE in colours(path)


@pytest.mark.parametrize("steps", [1, 200])
def test_a_run_of_any_length_is_drawn(steps, tmp_path):
    path = tmp_path / "curves.png"
    plot_curves(path, {"loss": {"run": (range(steps), [1 / (1 + i) for i in range(steps)])}}, xlabel="step")
    assert BLUE in colours(path)


def test_runs_have_colours_and_names(tmp_path):
    path = tmp_path / "runs.svg"
    plot_curves(path, {"loss": {"first": ([1, 2], [0.5, 0.4]), "other": ([1, 2, 3], [0.6, 0.5, 0.2])}}, xlabel="step")
    text = path.read_text()
    assert "#0072b2" in text.lower() and "#d55e00" in text.lower() and "<!-- other -->" in text


def test_the_suffix_picks_the_format(tmp_path):
    path = tmp_path / "mass.svg"
    plot_credit_mass(path, {"": {"peer": [0.2, 0.4]}}, (2, 4), title="A title of its own")
    assert path.read_text().lstrip().startswith("<?xml")


@pytest.mark.parametrize("steps", [[0], [1], [1, 2], list(range(1, 41))])
def test_steps_are_whole_numbers(steps, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda fig, path: drawn.append(fig))
    plot_curves("x.png", {"loss": {"run": (steps, [0.5] * len(steps))}}, xlabel="step")
    (axes,) = drawn[0].axes
    ticks = [tick for tick in axes.get_xticks() if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]]
    assert ticks and all(tick == round(tick) for tick in ticks)
