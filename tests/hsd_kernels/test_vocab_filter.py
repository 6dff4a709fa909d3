"""The active-vocabulary filter: what it leaves out is what it says, and never more than it may."""

from fractions import Fraction

import pytest
import torch
from kernel_cases import relative_l1

from hsd_kernels import fused_hsd_kl, native
from hsd_kernels.vocab_filter import (
    BLOCK_ROWS,
    FILTER_AUTO,
    ROUNDING_SHARE,
    WORTHWHILE,
    active_columns,
    column_norms,
    take_columns_,
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


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("filter_eps", [1e-5, 1e-3])
def test_error_is_bounded_by_the_measured_share(divergence, filter_eps):
    tensors = peaked()
    exact = grads(*tensors, divergence=divergence)
    found = grads(*tensors, divergence=divergence, filter_eps=filter_eps, memory_bytes=2 * 16 * 3000 * 4)
    share = found[0].filtered_share.item()
    assert 0.0 < share < 0.2
    assert found[0].loss.item() == pytest.approx(exact[0].loss.item(), rel=1e-5)  # the loss is never filtered
    # dz is off by `share` of its L1 mass, in the columns that carry the least: no GEMM turns that into more than
    # a few times as much of its output.
    for got, want in zip(found[1:], exact[1:], strict=True):
        assert 0.0 < relative_l1(got, want) <= 3.0 * share


@pytest.fixture(params=["torch", *native.VARIANTS])
def way(request, monkeypatch):
    """Norms and columns in torch and in every variant of the C++ library that this machine runs."""
    if request.param == "torch":
        monkeypatch.setattr(native, "available", lambda: False)
        return request.param
    number, best = native.VARIANTS.index(request.param), native.facts().fastest
    if number > best:
        pytest.skip(f"this machine runs up to {native.VARIANTS[best]}")
    monkeypatch.setattr(native, "variant", lambda: number)
    return request.param


def strided(rows, vocab, dtype):
    """dz (rows, vocab) and the wider rows in whose memory it lies."""
    whole = torch.randn(rows, 2 * vocab + 3, generator=torch.Generator().manual_seed(rows + vocab)).to(dtype)
    return whole[:, 1 : vocab + 1], whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [1, BLOCK_ROWS, 2 * BLOCK_ROWS + 5])
@pytest.mark.parametrize("vocab", [1, 50, 2048, 4099])
def test_norms_and_columns_of_strided_rows(vocab, rows, dtype, way):
    dz, whole = strided(rows, vocab, dtype)
    before, kept = dz.clone(), whole.clone()
    mass, largest = column_norms(dz)
    torch.testing.assert_close(mass, dz.double().abs().sum(0), rtol=1e-6, atol=0.0)
    assert torch.equal(largest.double(), dz.double().abs().amax(0))
    for wanted in (slice(0, 0), slice(0, None, 7), slice(vocab // 2, None), slice(vocab - 1, None), slice(0, None)):
        dz.copy_(before)
        columns = torch.arange(vocab)[wanted]
        assert torch.equal(take_columns_(dz, columns), before[:, columns])
    dz.copy_(before)
    assert torch.equal(whole, kept), "what is around dz was written"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_what_is_not_finite(dtype, way):
    dz = torch.zeros(70, 2100, dtype=dtype)
    nan, inf = float("nan"), float("inf")
    dz[3, 0], dz[69, 1], dz[0, 2], dz[40, 3], dz[41, 3], dz[0, 2099], dz[1, 2099] = nan, -nan, -inf, inf, nan, 1.0, -3.0
    mass, largest = (t[[0, 1, 2, 3, 4, 2099]] for t in column_norms(dz))
    assert str(mass.tolist()) == "[nan, nan, inf, nan, 0.0, 4.0]"
    assert str(largest.tolist()) == "[nan, nan, inf, nan, 0.0, 3.0]"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_and_columns_whatever_the_number_of_threads(dtype):
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 5, 16):  # two blocks of columns
        torch.set_num_threads(threads)
        dz, _ = strided(9, 4000, dtype)
        found.append((*column_norms(dz), take_columns_(dz, torch.arange(0, 4000, 3))))
    torch.set_num_threads(before)
    for some in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(some, found[0], strict=True))


def test_columns_side_by_side_are_not_asked_for():
    dz = torch.randn(80, 50, generator=torch.Generator().manual_seed(0)).t()
    columns = torch.tensor([0, 7, 79])
    mass, largest = column_norms(dz)
    torch.testing.assert_close(mass, dz.double().abs().sum(0), rtol=1e-6, atol=0.0)
    assert torch.equal(largest, dz.abs().amax(0)) and torch.equal(take_columns_(dz, columns), dz[:, columns])


@pytest.mark.parametrize("rows", [3, 16, 40])
@pytest.mark.parametrize("form", ["fp32", "bf16", "linear", "reference"])
def test_same_gradients_with_and_without_the_library(form, rows, monkeypatch):
    """Also where the gathered rows of W do not fit into the logits of the other sides (3 rows, D = 24), and where the
    sum of a chunk's logits ends between two numbers of the gradient's dtype (odd vocabulary, linear form)."""
    tensors = peaked(vocab=2999, dtype=torch.bfloat16 if form in ("bf16", "linear") else torch.float32)
    options = {"filter_eps": 1e-3, "memory_bytes": rows * 2 * 2999 * (2 if form == "linear" else 4)}
    if form == "linear":
        options["logits_dtype"] = torch.bfloat16
    if form == "reference":
        options |= {"reference_hidden": tensors[1].flip(0), "reference_coef": 0.5}
    found = grads(*tensors, **options)
    monkeypatch.setattr(native, "available", lambda: False)
    assert found[0].filtered_share.item() > 0.0
    for got, want in zip(found[1:], grads(*tensors, **options)[1:], strict=True):
        assert relative_l1(got, want) <= (1e-6 if got.dtype == torch.float32 else 2e-3)


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


def test_equal_sides_and_options():
    student, _, weight = peaked()
    out, dh, dw = grads(student, student, weight, filter_eps="auto")
    assert out.filtered_share == 0.0 and (dh == 0).all() and (dw == 0).all()
    assert grads(student, student, weight)[0].filtered_share is None
    mistakes = {ValueError: (0.0, -1.0, float("nan"), float("inf")), TypeError: (True, [], "often")}
    for error, values in mistakes.items():
        for value in values:
            with pytest.raises(error, match=r"^filter_eps: expected"):
                fused_hsd_kl(student, student, weight, filter_eps=value)
