"""The active-vocabulary filter: what it leaves out is what it says, and never more than it may."""

from fractions import Fraction

import pytest
import torch

from hsd_kernels import fused_hsd_kl
from hsd_kernels.vocab_filter import (
    BLOCK_ROWS,
    FILTER_AUTO,
    ROUNDING_SHARE,
    WORTHWHILE,
    active_columns,
    column_norms,
    take_columns,
)

ONE = torch.tensor(1.0)


def peaked(tokens=40, dim=24, vocab=3000, dtype=torch.float32, noise=0.1):
    """A head and states whose distributions have a few likely tokens each and nearly agree."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(vocab, dim, generator=g)
    weight[:60] *= 4.0
    student = torch.randn(tokens, dim, generator=g)
    teacher = student + noise * torch.randn(tokens, dim, generator=g)
    return [t.to(dtype) for t in (student, teacher, weight)]


def grads(student, teacher, weight, **options):
    leaves = student.clone().requires_grad_(), weight.clone().requires_grad_()
    out = fused_hsd_kl(leaves[0], teacher, leaves[1], return_stats=True, **options)
    out.loss.backward()
    return out, *(t.grad for t in leaves)


def relative_l1(got, want):
    return ((got - want).double().abs().sum() / want.double().abs().sum()).item()


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("filter_eps", [1e-5, 1e-3])
def test_error_is_bounded_by_the_measured_share(divergence, filter_eps):
    tensors = peaked()
    exact = grads(*tensors, divergence=divergence)
    found = grads(*tensors, divergence=divergence, filter_eps=filter_eps, chunk_bytes=2 * 16 * 3000 * 4)
    share = found[0].filtered_share.item()
    assert 0.0 < share < 0.2
    assert found[0].loss.item() == pytest.approx(exact[0].loss.item(), rel=1e-5)  # the loss is never filtered
    # dz is off by `share` of its L1 mass, in the columns that carry the least: no GEMM turns that into more than
    # a few times as much of its output.
    for got, want in zip(found[1:], exact[1:], strict=True):
        assert 0.0 < relative_l1(got, want) <= 3.0 * share


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [1, BLOCK_ROWS, 2 * BLOCK_ROWS + 5])
def test_norms_and_columns_of_strided_rows(rows, dtype):
    dz = torch.randn(rows, 80, generator=torch.Generator().manual_seed(rows)).to(dtype)[:, :50]
    mass, largest = column_norms(dz)
    torch.testing.assert_close(mass, dz.double().abs().sum(0), rtol=1e-6, atol=0.0)
    assert torch.equal(largest, dz.abs().amax(0))
    columns = torch.tensor([0, 7, 49])
    assert torch.equal(take_columns(dz, columns), dz[:, columns])


def test_a_column_is_dropped_only_below_the_threshold():
    dz = torch.zeros(5, 100)
    dz[2, 7], dz[1, 50], dz[0, 99] = 3e-4, -2e-4, 1e-4
    active = active_columns(dz, 1e-4, torch.tensor(2.0), torch.float32)  # the threshold is 2e-4
    assert active.columns.tolist() == [7]
    assert active.dropped.item() == pytest.approx(3e-4) and active.total.item() == pytest.approx(6e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_auto_drops_no_more_than_rounding(dtype):
    g = torch.Generator().manual_seed(1)
    dz = torch.randn(16, 2000, generator=g) * torch.exp(-8.0 * torch.rand(2000, generator=g) ** 0.3)
    dz[:, ::2] *= 1e-9
    active = active_columns(dz, FILTER_AUTO, ONE, dtype)
    allowed = ROUNDING_SHARE * torch.finfo(dtype).eps
    share = (active.dropped / active.total).item()
    assert 0.0 < share <= allowed
    kept = torch.zeros(2000, dtype=torch.bool)
    kept[active.columns] = True
    mass = dz.abs().sum(0).double()
    assert (mass[~kept].sum() / mass.sum()).item() == pytest.approx(share, rel=1e-6)
    # One more column would have been too much.
    assert (mass[~kept].sum() + mass[kept].min()) / mass.sum() > allowed


def test_share_that_rounding_loses():
    """ROUNDING_SHARE, measured: what rounding to bf16 takes from the L1 mass of numbers of many sizes."""
    g = torch.Generator().manual_seed(2)
    x = torch.exp(torch.rand(100_000, generator=g, dtype=torch.float64) * 20.0)
    lost = ((x - x.bfloat16().double()).abs().sum() / x.sum()).item()
    by_binade = ((x - x.bfloat16().double()).abs() / x).mean().item()
    assert lost == pytest.approx(ROUNDING_SHARE * torch.finfo(torch.bfloat16).eps, rel=0.1)
    assert by_binade == pytest.approx(ROUNDING_SHARE * torch.finfo(torch.bfloat16).eps, rel=0.02)


def test_auto_in_bf16_is_within_rounding_of_exact():
    tensors = peaked(dtype=torch.bfloat16)
    truth = grads(*(t.double() for t in tensors))
    exact = grads(*tensors)
    found = grads(*tensors, filter_eps="auto")
    share = found[0].filtered_share.item()
    assert 0.0 < share <= ROUNDING_SHARE * torch.finfo(torch.bfloat16).eps
    for got, ours, want in zip(found[1:], exact[1:], truth[1:], strict=True):
        assert relative_l1(got, want) <= relative_l1(ours, want) + 3.0 * share


def test_fewer_columns_reach_the_gemms(monkeypatch):
    from hsd_kernels import gemm

    widths = []
    original = gemm.backproject
    monkeypatch.setattr(gemm, "backproject", lambda dz, *rest: widths.append(dz.shape[1]) or original(dz, *rest))
    tensors = peaked()
    grads(*tensors)
    grads(*tensors, filter_eps=1e-3)
    assert widths[0] == 3000 and widths[1] < WORTHWHILE * 3000


def test_all_columns_when_the_gathers_would_cost_more():
    dz = torch.ones(4, 100)
    dz[:, :20] = 0.0
    active = active_columns(dz, 1e-3, ONE, torch.float32)
    assert active.columns is None and active.dropped == 0.0 and active.total.item() == 320.0


@pytest.mark.parametrize("filter_eps", [FILTER_AUTO, 1e-3])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("largest_weight", [1.0, float("inf"), float("nan")])
def test_what_is_not_finite_is_never_dropped(largest_weight, bad, filter_eps):
    dz = torch.zeros(4, 100)
    dz[1, 3], dz[2, 5] = bad, 1.0
    active = active_columns(dz, filter_eps, torch.tensor(largest_weight), torch.float32)
    assert active.columns is None or 3 in active.columns.tolist()


def test_a_fraction_is_a_number():
    tensors = peaked()
    found = [grads(*tensors, filter_eps=eps)[1] for eps in (Fraction(1, 1024), 1 / 1024)]
    assert torch.equal(*found)


def test_weights_scale_the_threshold():
    """The same share is dropped whatever the unit of the token weights."""
    tensors = peaked()
    shares = [
        grads(*tensors, filter_eps=1e-3, token_weights=torch.full((40,), w), reduction="sum")[0].filtered_share.item()
        for w in (1e-4, 1.0, 1e4)
    ]
    assert shares[0] > 0.0 and shares == pytest.approx([shares[0]] * 3, rel=1e-4)


def test_silent_batch_and_options():
    student, _, weight = peaked()
    out, dh, dw = grads(student, student, weight, filter_eps="auto")
    assert out.filtered_share == 0.0 and (dh == 0).all() and (dw == 0).all()
    assert grads(student, student, weight)[0].filtered_share is None
    mistakes = {ValueError: (0.0, -1.0, float("nan"), float("inf")), TypeError: (True, [], "often")}
    for error, values in mistakes.items():
        for value in values:
            with pytest.raises(error, match=r"^filter_eps: expected"):
                fused_hsd_kl(student, student, weight, filter_eps=value)
