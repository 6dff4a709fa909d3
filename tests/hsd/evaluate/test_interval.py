"""The interval of a share: Wilson's for one sample a question, coverage by simulation for one and several."""

import random

import pytest
from scipy.stats import binomtest

from hsd.evaluate.interval import interval, share


@pytest.mark.parametrize("questions", [1, 2, 30, 200])
def test_with_one_sample_a_question_it_is_wilsons(questions):
    for right in {0, 1, questions // 3, questions - 1, questions}:
        expected = binomtest(right, questions).proportion_ci(0.95, "wilson")
        shares = [1.0] * right + [0.0] * (questions - right)
        assert interval(shares) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_none_right_is_not_known_to_be_zero():
    assert interval([0.0] * 30) == (0.0, pytest.approx(0.1135, abs=1e-4))
    assert interval([1.0] * 30, 16) == (pytest.approx(0.8865, abs=1e-4), 1.0)


def test_samples_that_differ_narrow_it_and_copies_do_not():
    def width(shares: list[float], samples: int) -> float:
        low, high = interval(shares, samples)
        return high - low

    copies = [1.0] * 15 + [0.0] * 15
    assert width(copies, 16) == pytest.approx(width(copies, 1))
    assert width([0.5] * 30, 16) < 0.5 * width(copies, 1)
    # At most as narrow as N * samples independent draws.
    many = binomtest(15 * 16, 30 * 16).proportion_ci(method="wilson")
    assert width([0.5] * 30, 16) >= many.high - many.low - 1e-12
    assert width([0.5] * 30, 2) == pytest.approx(binomtest(30, 60).proportion_ci(method="wilson").high * 2 - 1)


@pytest.mark.parametrize(("samples", "alike"), [(1, None), (4, 0.3), (16, 0.1), (16, 0.5)])
@pytest.mark.parametrize("success", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("questions", [30, 40, 200])
def test_it_covers(questions, success, samples, alike):
    """``alike``: the correlation of two samples of a question, from a Beta distribution of the questions' rates."""
    rng, covered, runs = random.Random(f"{questions} {success} {samples} {alike}"), 0, 400
    for _ in range(runs):
        shares = []
        for _ in range(questions):
            scale = None if alike is None else 1 / alike - 1
            p = success if scale is None else rng.betavariate(success * scale, (1 - success) * scale)
            shares.append(sum(rng.random() < p for _ in range(samples)) / samples)
        low, high = interval(shares, samples)
        covered += low <= success <= high
    assert covered / runs >= 0.91  # 95 % less what Wilson's may lack there and what 400 runs may


@pytest.mark.parametrize("shares", [[], [1.1], [-0.1, 0.5], [float("nan")]])
def test_what_is_no_share(shares):
    with pytest.raises(ValueError, match="shares: expected numbers from 0 to 1, at least one, got"):
        interval(shares)


def test_a_sample_without_a_verdict_is_wrong_below_and_right_above():
    found = share([[1.0, None], [0.0, 0.0]])
    assert (found.mean, found.most) == (0.25, 0.5)
    assert found.low == interval([0.5, 0.0], 2)[0] and found.high == interval([1.0, 0.0], 2)[1]
