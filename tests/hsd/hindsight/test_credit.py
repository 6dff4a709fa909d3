"""Credit statistics against loops over single rollouts, and coverage against all outcomes of a group."""

import itertools
import math

import pytest
import torch

from hsd.hindsight.credit import (
    coverage,
    coverage_peak,
    credit,
    credit_at_divergence,
    credit_mass,
    credit_profile,
    divergence_position,
)

NAN = float("nan")


@pytest.mark.parametrize(
    ("rollout", "peer", "tau"),
    [
        ([1, 2, 3], [1, 9, 3], 1),
        ([1, 2, 3], [9, 2, 3], 0),
        ([1, 2, 3], [1, 2, 4, 5], 2),
        ([1, 2, 3], [1, 2], 2),  # the rollout goes on where the peer stopped
        ([1, 2, 3], [], 0),
        ([1, 2], [1, 2, 3], None),
        ([1, 2], [1, 2], None),
    ],
)
def test_divergence_position(rollout: list[int], peer: list[int], tau: int | None):
    assert divergence_position(rollout, peer) == tau


def test_credit_is_teacher_minus_student_in_fp32():
    teacher = torch.tensor([[-1.0, -0.5]], dtype=torch.bfloat16)
    student = torch.tensor([[-1.0078125, -3.0]], dtype=torch.bfloat16)
    result = credit(teacher, student)
    assert result.dtype == torch.float32
    assert result.tolist() == [[0.0078125, 2.5]]
    assert credit(teacher.double(), student.double()).dtype == torch.float64
    with pytest.raises(ValueError, match=r"^student_logps_BT: "):
        credit(teacher, student[:, :1])


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Seven rollouts of several lengths, NaN in the padding, two without a divergence position."""
    generator = torch.Generator().manual_seed(3)
    credit_BT = torch.randn(7, 50, generator=generator, dtype=torch.float64)
    length_B = torch.tensor([50, 31, 12, 1, 50, 40, 20])
    tau_B = torch.tensor([17, 30, 0, 0, -1, 39, -1])
    mask_BT = torch.arange(50) < length_B[:, None]
    return credit_BT.where(mask_BT, NAN), mask_BT, tau_B


def test_credit_mass_against_a_loop(batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor]):
    credit_BT, mask_BT, tau_B = batch
    windows = (0, 2, 5, 100)
    expected = []
    for w in windows:
        shares = []
        for row, mask, tau in zip(credit_BT.tolist(), mask_BT.tolist(), tau_B.tolist(), strict=True):
            if tau >= 0:
                a = [abs(x) for x, m in zip(row, mask, strict=True) if m]
                shares.append(sum(x for t, x in enumerate(a) if abs(t - tau) <= w) / sum(a))
        expected.append(sum(shares) / len(shares))
    result = credit_mass(credit_BT, mask_BT, tau_B, windows)
    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    assert result[-1].item() == pytest.approx(1.0)
    assert torch.equal(credit_mass(credit_BT, mask_BT.long(), tau_B, windows), result)


def test_credit_mass_averages_shares_not_sums():
    credit_BT = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, -100.0]])
    mask_BT = torch.ones(2, 3, dtype=torch.bool)
    assert credit_mass(credit_BT, mask_BT, torch.tensor([0, 0]), (0, 1, 2)).tolist() == [0.5, 0.5, 1.0]


def test_credit_mass_leaves_out_silent_rollouts_and_shows_nan():
    mask_BT = torch.ones(2, 2, dtype=torch.bool)
    silent = torch.tensor([[0.0, 0.0], [3.0, 1.0]])
    assert credit_mass(silent, mask_BT, torch.tensor([0, 0]), (0,)).tolist() == [0.75]
    assert credit_mass(silent, mask_BT, torch.tensor([0, -1])).isnan().tolist() == [True] * 5
    broken = torch.tensor([[NAN, 1.0], [3.0, 1.0]])
    assert credit_mass(broken, mask_BT, torch.tensor([0, 0])).isnan().all()


def test_credit_profile_against_a_loop(batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor]):
    credit_BT, mask_BT, tau_B = batch
    offsets, mean_abs, count = credit_profile(credit_BT, mask_BT, tau_B, before=20, after=35)
    assert offsets.tolist() == list(range(-20, 36))
    for offset, mean, n in zip(offsets.tolist(), mean_abs.tolist(), count.tolist(), strict=True):
        there = [
            abs(credit_BT[b, tau + offset].item())
            for b, tau in enumerate(tau_B.tolist())
            if tau >= 0 and 0 <= tau + offset < mask_BT[b].sum()
        ]
        assert n == len(there)
        assert mean == pytest.approx(sum(there) / n, rel=1e-12) if there else math.isnan(mean)
    assert count[20] == 5  # at tau itself, everyone who diverges
    assert (count == 0).any()


def test_credit_at_divergence(batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor]):
    credit_BT, mask_BT, tau_B = batch
    expected = sum(abs(credit_BT[b, t].item()) for b, t in enumerate(tau_B.tolist()) if t >= 0) / 5
    result = credit_at_divergence(credit_BT, mask_BT, tau_B)
    assert result.shape == ()
    assert result.item() == pytest.approx(expected, rel=1e-12)
    assert credit_at_divergence(credit_BT, mask_BT, torch.full_like(tau_B, -1)).isnan()


@pytest.mark.parametrize("statistic", [credit_mass, credit_profile, credit_at_divergence])
def test_statistics_check_their_arguments(statistic):
    credit_BT, mask_BT, tau_B = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool), torch.tensor([0, -1])
    statistic(credit_BT, mask_BT, tau_B)
    with pytest.raises(ValueError, match=r"^credit_BT: "):
        statistic(credit_BT[0], mask_BT, tau_B)
    with pytest.raises(ValueError, match=r"^mask_BT: "):
        statistic(credit_BT, mask_BT[:, :2], tau_B)
    with pytest.raises(ValueError, match=r"^tau_B: expected shape"):
        statistic(credit_BT, mask_BT, tau_B[:1])
    with pytest.raises(TypeError, match=r"^tau_B: expected an integer tensor, got torch.float32"):
        statistic(credit_BT, mask_BT, tau_B.float())
    for wrong in (3, -2):
        with pytest.raises(ValueError, match=rf"^tau_B: .*\[-1, 3\), got {wrong}"):
            statistic(credit_BT, mask_BT, torch.tensor([0, wrong]))


@pytest.mark.parametrize(("argument", "kwargs"), [("before", {"before": -1}), ("after", {"after": -1})])
def test_credit_profile_refuses_negative_ranges(argument: str, kwargs: dict[str, int]):
    with pytest.raises(ValueError, match=rf"^{argument}: "):
        credit_profile(torch.ones(1, 3), torch.ones(1, 3), torch.tensor([0]), **kwargs)


@pytest.mark.parametrize("group_size", range(2, 9))
@pytest.mark.parametrize("p", [0.0, 0.1, 0.257, 0.5, 0.9, 1.0])
def test_coverage_against_all_outcomes(group_size: int, p: float):
    expected = 0.0
    for outcome in itertools.product([0, 1], repeat=group_size):
        successes = sum(outcome)
        probability = p**successes * (1 - p) ** (group_size - successes)
        failing_with_a_peer = group_size - successes if successes else 0
        expected += probability * failing_with_a_peer / group_size
    assert coverage(p, group_size) == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(
    ("group_size", "p_star", "f_star"),
    [
        (4, 0.3700, 0.4725),
        (8, 0.2570, 0.6501),
        (16, 0.1688, 0.7793),
        (32, 0.1058, 0.8663),
        (64, 0.0639, 0.9215),
    ],
)
def test_coverage_peak(group_size: int, p_star: float, f_star: float):
    p, f = coverage_peak(group_size)
    assert p == pytest.approx(p_star, abs=5e-5)
    assert f == pytest.approx(f_star, abs=5e-5)
    assert f == pytest.approx(coverage(p, group_size), rel=1e-12)
    assert all(coverage(p + step, group_size) < f for step in (-1e-3, 1e-3))


def test_coverage_errors():
    for p in (-0.1, 1.1, NAN):
        with pytest.raises(ValueError, match=r"^p: "):
            coverage(p, 8)
    with pytest.raises(ValueError, match=r"^group_size: "):
        coverage(0.5, 0)
    with pytest.raises(ValueError, match=r"^group_size: "):
        coverage_peak(1)
    assert coverage(0.5, 1) == 0.0
