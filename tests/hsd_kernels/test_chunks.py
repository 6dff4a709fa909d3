"""Chunks and accumulation: what a chunk holds, that its size does not matter, and how many GEMMs it takes."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hsd_kernels import fused_hsd_kl, gemm, memory, ops, reference, release_memory
from hsd_kernels.divergence import DIVERGENCES
from hsd_kernels.testing import double, draw, grads, rows_of_bytes, small_problem

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)
INSIDE = {"hsd_kernels::fused_hsd_kl": ops._forward, "hsd_kernels::fused_hsd_kl_backward": ops._backward}


class Recorder(TorchDispatchMode):
    """Counts calls and GEMMs, and remembers the size of the largest tensor made, in units of 4 bytes."""

    def __init__(self):
        super().__init__()
        self.calls = 0
        self.gemms = 0
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "hsd_kernels":  # a mode does not see inside an operator by itself
            with self:
                return INSIDE[func.overloadpacket._qualified_op_name](*args, **kwargs)
        out = func(*args, **(kwargs or {}))
        self.calls += 1
        self.gemms += func.overloadpacket._qualified_op_name in ("aten::mm", "aten::addmm", "aten::addmm_")
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor):
                self.largest = max(self.largest, t.nbytes // 4)
        return out


@every_divergence
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [F64, F32, BF16])
def test_chunk_size_does_not_matter(dtype, reduction, divergence):
    student, teacher, weight = small_problem(13, 16, 61, dtype)
    bias = draw(61, dtype=dtype)
    wide = F64 if dtype == F64 else F32
    options = {
        "divergence": divergence,
        "reduction": reduction,
        "token_weights": torch.tensor([0.0, *range(1, 12), 0.0]),
        "upstream": draw(13, dtype=wide) if reduction == "none" else None,
    }
    whole = grads(fused_hsd_kl, student, teacher, weight, bias, **options)
    for rows in (1, 5, 11, 100):
        chunk = rows_of_bytes(rows, 61, wide.itemsize)
        cut = grads(fused_hsd_kl, student, teacher, weight, bias, **options, memory_bytes=chunk)
        for name, a, b in zip(("loss", "dh", "dW", "db"), cut, whole, strict=True):
            eps = torch.finfo(a.dtype).eps
            torch.testing.assert_close(a, b, rtol=2 * eps, atol=16 * eps * b.abs().max().item(), msg=f"{name} {rows}")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dz_bytes", [0, 2, 4])
@pytest.mark.parametrize("one_level", [False, True])
def test_sizes_fill_the_budget_and_no_more(device, dz_bytes, one_level):
    for rows, vocab, budget in itertools.product(
        (1, 7, 128, 1000, 32768), (1, 61, 151936), (1, 10_000, 1 << 28, 1 << 32)
    ):
        size = memory.sizes(rows, vocab, device, 8, dz_bytes, budget, one_level)
        assert 1 <= size.chunk <= size.buffer <= rows and size.stride >= vocab and size.stride % 64 == 0
        used = size.stride * (8 * size.chunk + dz_bytes * size.buffer)
        assert used <= budget or size.chunk == size.buffer == 1
        assert size.chunk == size.buffer or (dz_bytes and not one_level)


def test_sizes_of_the_shapes_in_the_tables():
    """(rows, V, device, bytes of both sides' logits, bytes of dz, budget, D) -> rows of logits and of dz."""
    for (rows, vocab, *given, dim), chunk, buffer in (
        ((32768, 151936, "cuda", 8, 2, 2 << 30, 4096), 384, 5504),
        ((32768, 151936, "cuda", 8, 2, None, 4096), 384, 4096),
        ((8192, 151936, "cuda", 8, 2, 2 << 30, 4096), 512, 8192),  # one buffer, in the memory of the sum that it spares
        ((8192, 151936, "cuda", 8, 2, 2 << 30, 0), 512, 4096),
        ((8192, 151936, "cuda", 8, 2, None, 4096), 384, 8192),
        ((1024, 151936, "cpu", 8, 4, 704 << 20, 0), 256, 512),
        ((1024, 151936, "cpu", 8, 2, 704 << 20, 512), 256, 1024),
    ):
        size = memory.sizes(rows, vocab, *given, sum_bytes=2 * vocab * dim)
        assert (size.chunk, size.buffer) == (chunk, buffer)


def test_what_a_cpu_keeps_is_bounded_and_can_be_released():
    student, teacher, weight = small_problem(64)
    release_memory()
    fused_hsd_kl(student, teacher, weight)
    assert 0 < sum(block.nbytes for block in memory._spare) <= memory.DEFAULT_MEMORY_BYTES
    release_memory()
    assert not memory._spare


def test_head_gradient_is_accumulated_in_fp32():
    """32 chunks in bf16: a bf16 running sum stops growing where an addend is below half its spacing."""
    chunks, rows = 32, 4
    student, teacher, weight = small_problem(chunks * rows, 32, 64, BF16)
    student, teacher = student + 1.0, teacher + 0.9  # so that the chunks' gradients add up instead of cancelling
    exact = grads(reference.hsd_kl, *double(student, teacher, weight), reduction="sum")[2]
    ours = grads(
        fused_hsd_kl, student, teacher, weight, reduction="sum", memory_bytes=rows_of_bytes(rows, weight.shape[0])
    )[2]
    narrow = torch.zeros_like(weight)
    for i in range(0, chunks * rows, rows):
        part = slice(i, i + rows)
        narrow += grads(fused_hsd_kl, student[part], teacher[part], weight, reduction="sum")[2]

    def error(t):
        return ((t.double() - exact).abs().sum() / exact.abs().sum()).item()

    # dz is rounded to bf16 once for its GEMM and dW once at the end: two errors of one size, uncorrelated.
    assert error(ours) <= 1.05 * 2**0.5 * error(exact.to(BF16))
    assert error(narrow) > 3.0 * error(ours)


def test_full_logits_are_never_made():
    tokens, dim, vocab, rows = 64, 8, 2000, 4
    for dtype in (F32, BF16):
        student, teacher, weight = small_problem(tokens, dim, vocab, dtype)
        for reduction in ("mean", "none"):
            for divergence in DIVERGENCES:
                with Recorder() as record:
                    grads(
                        fused_hsd_kl,
                        student,
                        teacher,
                        weight,
                        upstream=torch.ones(tokens) if reduction == "none" else None,
                        divergence=divergence,
                        reduction=reduction,
                        memory_bytes=rows_of_bytes(rows, vocab),
                    )
                # The workspace holds both sides of a chunk; dW and W are the only others of this size.
                assert record.largest <= max(2 * rows * vocab, dim * vocab) < tokens * vocab / 4


def test_a_small_problem_makes_few_calls():
    """It is bound by them: a third of what they were, views included."""
    student, teacher, weight = small_problem(16, dtype=BF16)
    leaves = student.requires_grad_(), weight.requires_grad_()
    for _ in range(2):  # the first also asks what the machine can do
        with Recorder() as record:
            torch.autograd.grad(fused_hsd_kl(student, teacher, weight), leaves)
    fp32_copies = gemm.machine().bf16 == "none"  # of the operands, where no instruction multiplies bf16
    assert record.calls <= (49 if fp32_copies else 39)


def test_gradients_are_not_made_when_nobody_asked(monkeypatch):
    student, teacher, weight = small_problem(12)
    monkeypatch.setattr(memory, "sizes", lambda *args, **options: memory.Sizes(chunk=4, buffer=8, stride=64))

    def gemms(context, *tensors):
        with context, Recorder() as record:
            loss = fused_hsd_kl(*tensors)
        return record.gemms, loss

    trained = [student.clone().requires_grad_(), teacher, weight.clone().requires_grad_()]
    for context in (torch.no_grad(), torch.inference_mode()):
        count, loss = gemms(context, *trained)
        assert count == 3 and not loss.requires_grad, "one GEMM per chunk: the shared head reads both sides at once"
    assert gemms(torch.enable_grad(), student, teacher, weight)[0] == 3
    count, loss = gemms(torch.enable_grad(), *trained)
    assert count == 3 + 2 + 2 and loss.requires_grad, "dH and dW once per buffer"
    frozen = [trained[0], teacher, weight]
    assert gemms(torch.enable_grad(), *frozen)[0] == 3 + 2
    with Recorder() as record:
        loss.backward()
    assert record.gemms == 0, "the gradient was made in the forward"
    monkeypatch.setattr("hsd_kernels.rows.eager.gradient_", lambda *a: pytest.fail("a row pass for nothing"))
    with torch.no_grad():
        fused_hsd_kl(*trained)
