"""The pictures: written, of the right size, not blank, and refused when lengths do not match."""

import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from hsd.viewer.plots import plot_coverage, plot_credit_mass, plot_credit_profile, plot_silence, plot_training

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
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    plot_credit_profile(one, {"peer": (offsets, peer)}, title="Credit")
    both = {"peer": (offsets, peer), "answer": (torch.tensor(offsets), torch.full((49,), 0.4))}
    plot_credit_profile(str(two), both, title="Credit")
    assert size(one) == size(two) == (6.4 * DPI, 3.8 * DPI)
    assert BLUE in colours(one) and ORANGE not in colours(one)
    assert {BLUE, ORANGE} <= colours(two)


def test_a_profile_with_gaps_is_drawn(tmp_path):
    """Offsets that no rollout reaches are NaN; all of them are when no rollout leaves its peer."""
    for name, values in (("some", [math.nan, 0.5, 1.0]), ("all", [math.nan] * 3)):
        path = tmp_path / f"{name}.png"
        plot_credit_profile(path, {"peer": ([-1, 0, 1], values)}, title=name)
        assert size(path) == (768, 456)


def test_credit_mass(tmp_path):
    path = tmp_path / "mass.png"
    windows = (2, 4, 8, 16, 32)
    plot_credit_mass(path, {"peer": [0.2, 0.4, 0.6, 0.8, 1.0], "answer": [0.1] * 5}, windows, title="Mass")
    assert size(path) == (768, 456)
    assert {BLUE, ORANGE} <= colours(path)


def test_coverage(tmp_path):
    path = tmp_path / "coverage.png"
    plot_coverage(path, [(0.1, 0.5, 0.02, 7), (0.9, 0.1, math.nan, 1)], (0.4, 0.5), 8, title="Coverage")
    assert size(path) == (768, 456)
    assert {BLUE, ORANGE} <= colours(path)
    with pytest.raises(ValueError, match=r"^bins: expected at least one bin"):
        plot_coverage(path, [], (0.4, 0.5), 8, title="")


def test_silence(tmp_path):
    path = tmp_path / "silence.png"
    plot_silence(path, [0.5, 0.0, 2.0], torch.tensor([0.01, 0.0, 1e-6]), title="Silence")  # zeros on a log scale
    assert size(path) == pytest.approx((4.8 * DPI, 4.4 * DPI), abs=1)
    assert ORANGE in colours(path)
    with pytest.raises(ValueError, match=r"^answer_only\['rollouts'\]: expected 2 values, got 1"):
        plot_silence(path, [0.1, 0.2], [0.1], title="")
    with pytest.raises(ValueError, match=r"^answer_only: "):
        plot_silence(path, [], [], title="")


@pytest.mark.parametrize(
    ("panels", "inches"), [(1, (4.2, 2.6)), (2, (6.4, 2.6)), (3, (9.6, 2.6)), (4, (6.4, 4.9)), (7, (9.6, 7.2))]
)
def test_training_grows_with_its_panels(panels, inches, tmp_path):
    path = tmp_path / "training.png"
    steps = list(range(1, 6))
    plot_training(path, steps, {f"metric {i}": [0.1, math.nan, 0.3, 0.2, float(i)] for i in range(panels)})
    assert size(path) == pytest.approx([x * DPI for x in inches], abs=1)
    assert BLUE in colours(path)


def test_a_long_run_is_drawn(tmp_path):
    path = tmp_path / "training.png"
    plot_training(path, range(200), {"loss": [1 / (1 + i) for i in range(200)]})
    assert BLUE in colours(path)


def test_the_suffix_picks_the_format(tmp_path):
    path = tmp_path / "mass.svg"
    plot_credit_mass(path, {"peer": [0.2, 0.4]}, (2, 4), title="A title of its own")
    assert path.read_text().lstrip().startswith("<?xml")


def test_mismatched_lengths_are_named(tmp_path):
    path = tmp_path / "none.png"
    with pytest.raises(ValueError, match=r"^profiles\['peer'\]: expected 3 values, got 2"):
        plot_credit_profile(path, {"peer": ([0, 1, 2], [0.1, 0.2])}, title="")
    with pytest.raises(ValueError, match=r"^masses\['answer'\]: expected 2 values, got 3"):
        plot_credit_mass(path, {"peer": [0.1, 0.2], "answer": [0.1, 0.2, 0.3]}, (2, 4), title="")
    with pytest.raises(ValueError, match=r"^curves\['loss'\]: expected 4 values, got 0"):
        plot_training(path, [1, 2, 3, 4], {"loss": []})
    assert not path.exists()


def test_no_curve_is_refused(tmp_path):
    path = tmp_path / "none.png"
    with pytest.raises(ValueError, match=r"^profiles: expected at least one curve, got none"):
        plot_credit_profile(path, {}, title="")
    with pytest.raises(ValueError, match=r"^masses: "):
        plot_credit_mass(path, {}, (2, 4), title="")
    with pytest.raises(ValueError, match=r"^curves: "):
        plot_training(path, [1], {})
    assert not path.exists()
