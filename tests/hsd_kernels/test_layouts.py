"""Sizes off every tile, strides, expanded inputs, autocast; the same bits every time."""

import pytest
import torch
from torch import Tensor

from hsd_kernels import Head, fused_hsd_kl, reference
from hsd_kernels.divergence import DIVERGENCES
from hsd_kernels.row_stats import COLUMNS
from hsd_kernels.testing import check_budget, double, draw, grads, rows_of_bytes, small_problem

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)


@every_divergence
@pytest.mark.parametrize("vocab", [1, 127, 50257])
def test_vocabulary_sizes(vocab, divergence):
    student, teacher, weight = small_problem(3, 12, vocab)
    found = grads(fused_hsd_kl, student, teacher, weight, divergence=divergence)
    eager = grads(reference.hsd_kl, student, teacher, weight, divergence=divergence)
    exact = grads(reference.hsd_kl, *double(student, teacher, weight), divergence=divergence)
    for name, got, want, truth in zip("lhW", found, eager, exact, strict=True):
        check_budget(name, got, want, truth)
        if vocab == 1:
            assert (got == 0).all()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_vocabulary_of_qwen(dtype):
    """151,936 is 19 upcast blocks of the CPU GEMM, the last one short."""
    student, teacher, weight = small_problem(4, 8, 151936, dtype)
    chunk = rows_of_bytes(3, 151936)
    found = grads(fused_hsd_kl, student, teacher, weight, chunk_bytes=chunk)
    # Chunk by chunk: MKL adds the 151,936 terms of dH one after the other if there is one row, not if there are four.
    parts = [
        grads(reference.hsd_kl, student[c].float(), teacher[c].float(), weight.float(), num_items=4)
        for c in (slice(0, 3), slice(3, 4))
    ]
    eager = [parts[0][0] + parts[1][0], torch.cat([p[1] for p in parts]), parts[0][2] + parts[1][2]]
    exact = grads(reference.hsd_kl, *double(student, teacher, weight))
    for name, got, want, truth in zip("lhW", found, eager, exact, strict=True):
        check_budget(name, got, want, truth)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("dim", [1, 3, 9, 130])
def test_hidden_sizes_off_every_tile(dim, dtype):
    student, teacher, weight = small_problem(6, dim, 67, dtype)
    found = grads(fused_hsd_kl, student, teacher, weight)
    eager = grads(reference.hsd_kl, student.float(), teacher.float(), weight.float())
    exact = grads(reference.hsd_kl, *double(student, teacher, weight))
    for name, got, want, truth in zip("lhW", found, eager, exact, strict=True):
        check_budget(name, got, want, truth)


def layouts(t: Tensor):
    """The same values under other strides."""
    yield "transposed", t.t().contiguous().t()
    yield "sliced", torch.cat([t, t + 1], 1)[:, : t.shape[1]]
    yield "every second", torch.stack([t, t + 1], 1).flatten(0, 1)[::2]


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_non_contiguous_inputs(reduction, dtype):
    inputs = small_problem(dtype=dtype)
    upstream = draw(10) if reduction == "none" else None
    want = grads(fused_hsd_kl, *inputs, upstream=upstream, reduction=reduction)
    for position in range(3):
        for name, t in layouts(inputs[position]):
            assert not t.is_contiguous() and torch.equal(t, inputs[position])
            changed = [t if i == position else other for i, other in enumerate(inputs)]
            leaves = [changed[0].detach().requires_grad_(), changed[2].detach().requires_grad_()]
            fused_hsd_kl(leaves[0], changed[1], leaves[1], reduction=reduction).backward(upstream)
            for leaf, expected in zip(leaves, want[1:], strict=True):
                tiny = 4 * torch.finfo(dtype).eps * expected.abs().max().item()
                torch.testing.assert_close(leaf.grad, expected, rtol=1e-2, atol=tiny, msg=f"{position} {name}")


def test_non_contiguous_leading_shape_and_per_token_inputs():
    student, teacher, weight = small_problem(12, dtype=F64)
    ids, kept = torch.arange(12) * 5, torch.arange(12).double()
    want = fused_hsd_kl(student, teacher, weight, target_ids=ids, token_weights=kept, return_stats=True)
    by_column = [t.view(3, 4, -1).transpose(0, 1) for t in (student, teacher)]
    got = fused_hsd_kl(
        *by_column, weight, target_ids=ids.view(3, 4).t(), token_weights=kept.view(3, 4).t(), return_stats=True
    )
    torch.testing.assert_close(got.loss, want.loss)
    for name in COLUMNS:
        torch.testing.assert_close(getattr(got.stats, name), getattr(want.stats, name).view(3, 4).t(), msg=name)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_expanded_inputs(reduction):
    _, teacher, weight = small_problem(dtype=F64)
    bias = draw(1, dtype=F64)
    upstream = draw(10, dtype=F64) if reduction == "none" else None

    def run(loss_fn):
        row, one = draw(1, 16, dtype=F64, seed=4).requires_grad_(), bias.clone().requires_grad_()
        loss_fn(row.expand(10, 16), teacher, Head(weight, one.expand(61)), reduction=reduction).backward(upstream)
        return row.grad, one.grad

    for got, want in zip(run(fused_hsd_kl), run(reference.hsd_kl), strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-9)
    one_row = teacher[:1].expand(10, 16)
    torch.testing.assert_close(
        fused_hsd_kl(draw(10, 16, dtype=F64), one_row, weight),
        reference.hsd_kl(draw(10, 16, dtype=F64), one_row, weight),
    )


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_is_the_explicit_cast(reduction, dtype):
    student, teacher, weight = small_problem()
    bias, upstream = draw(61), (draw(10) if reduction == "none" else None)
    leaves = [t.clone().requires_grad_() for t in (student, weight, bias)]
    with torch.autocast("cpu", dtype):
        loss = fused_hsd_kl(leaves[0], teacher, Head(*leaves[1:]), reduction=reduction)
        if reduction == "none":  # a backward inside the region must not change its arithmetic either
            loss.backward(upstream)
    if reduction != "none":
        loss.backward(upstream)
    want = grads(
        fused_hsd_kl,
        student.to(dtype),
        teacher.to(dtype),
        weight.to(dtype),
        bias.to(dtype),
        upstream,
        reduction=reduction,
    )
    assert loss.dtype == F32 and torch.equal(loss.detach(), want[0])
    for leaf, expected in zip(leaves, want[1:], strict=True):
        assert leaf.grad.dtype == F32 and torch.equal(leaf.grad, expected.float())


def test_autocast_leaves_double_alone_and_mixes_are_cast():
    student, teacher, weight = small_problem(dtype=F64)
    want = fused_hsd_kl(student, teacher, weight)
    low = fused_hsd_kl(student.bfloat16(), teacher.bfloat16(), weight.bfloat16())
    with torch.autocast("cpu", BF16):
        assert torch.equal(fused_hsd_kl(student, teacher, weight), want)
        # As after a bf16 trunk with an fp32 head.
        assert torch.equal(fused_hsd_kl(student.bfloat16(), teacher.float(), weight.bfloat16().float()), low)


@every_divergence
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_bitwise_repeatability(reduction, dtype, divergence):
    inputs = small_problem(40, 24, 301, dtype)
    upstream = draw(40) if reduction == "none" else None
    options = {"divergence": divergence, "reduction": reduction, "chunk_bytes": rows_of_bytes(7, 301)}
    first, second = (grads(fused_hsd_kl, *inputs, draw(301, dtype=dtype), upstream, **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
