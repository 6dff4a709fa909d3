"""What only a GPU can show: fp32 accumulation by cuBLAS, no synchronization, graphs, index ranges. `pytest -m cuda`.

Every test here is skipped without one, by name; the same mathematics runs on a CPU in the other files.
"""

import math

import pytest
import torch

from hsd_kernels import fused_hsd_kl, reference, testing
from hsd_kernels.divergence import DIVERGENCES
from hsd_kernels.upstream import times_upstream

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
RELATIVE_L1 = {torch.float32: 1e-4, torch.bfloat16: 4e-3, torch.float16: 2e-3}


def tensors(dtype, tokens=300, dim=128, vocab=5000, seed=0):
    g = torch.Generator().manual_seed(seed)
    student = torch.randn(tokens, dim, generator=g)
    teacher = student + 0.3 * torch.randn(tokens, dim, generator=g)
    weight = torch.randn(vocab, dim, generator=g) * (2.0 / dim**0.5)
    return [t.to("cuda", dtype) for t in (student, teacher, weight)]


def grads(loss_fn, student, teacher, weight, **options):
    upstream = torch.ones(len(student), device="cuda") if options.get("reduction") == "none" else None
    return testing.grads(loss_fn, student, teacher, weight, upstream=upstream, **options)


def relative_l1(got, want):
    return ((got.double() - want).abs().sum() / want.abs().sum()).item()


@pytest.fixture(autouse=True)
def full_precision():
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = allowed


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", list(RELATIVE_L1), ids=str)
def test_loss_and_gradients_over_several_chunks(dtype, divergence, impl):
    given = tensors(dtype)
    exact = grads(reference.hsd_kl, *(t.double() for t in given), divergence=divergence)
    for options in ({}, {"reduction": "none"}):
        scale = 1.0 if not options else 300.0
        got = grads(fused_hsd_kl, *given, divergence=divergence, impl=impl, memory_bytes=2 * 64 * 5000 * 4, **options)
        for a, b in zip(got[1:], exact[1:], strict=True):
            # The result has a rounding of its own: 3e-3 of a mean's dW in fp16, most of which is subnormal.
            rounding = relative_l1((scale * b).to(dtype), scale * b)
            assert relative_l1(a, scale * b) <= RELATIVE_L1[dtype] + rounding


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("left", [None, 1e-2, 1e-6], ids="1 - p_top {}".format)
def test_rows_with_the_exponential_and_the_division_of_the_card(left, divergence):
    """The interpreter has exact ones in place of ex2.approx and div.full. With an identity as head the logits are the
    hidden states and dH is dz, without any rounding: the kernels alone are seen, beside plain fp32 arithmetic."""
    g = torch.Generator().manual_seed(0)
    student = 2.0 * torch.randn(40, 5000, generator=g)
    teacher = student + 0.3 * torch.randn(40, 5000, generator=g)
    if left is not None:  # every row has one likely token
        at = torch.arange(40)
        rest = student.double().scatter(1, at[:, None], -torch.inf).logsumexp(-1)
        student[at, at] = (rest + math.log(1 / left - 1)).float()
        teacher[at, at] = student[at, at]
    given = [t.cuda() for t in (student, teacher, torch.eye(5000))]
    exact = grads(reference.hsd_kl, *(t.double() for t in given), divergence=divergence, reduction="none")
    plain, ours = (
        grads(fused_hsd_kl, *given, divergence=divergence, reduction="none", impl=impl) for impl in ("torch", "triton")
    )
    assert relative_l1(ours[1], exact[1]) <= 2 * relative_l1(plain[1], exact[1]) + 1e-6
    error, plain_error = ((t[0].double() - exact[0]).abs().max() for t in (ours, plain))
    assert error <= 2 * plain_error + 4e-6


@pytest.mark.parametrize(
    "options",
    [
        {"clip": 0.01},
        {"clip": 0.01, "clip_form": "nonnegative"},
        {"softcap": 5.0, "temperature": 0.7, "logit_scale": -0.5},
        {"reference": True},
        {"filter_eps": 1e-7},
    ],
    ids=str,
)
def test_options(options):
    student, teacher, weight = tensors(torch.float32)
    extra = {}
    if options.pop("reference", False):
        extra = {"reference_hidden": teacher.roll(1, 0), "reference_coef": 0.3}
    law = {k: v for k, v in options.items() if k != "filter_eps"}
    doubled = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in extra.items()}
    exact = grads(reference.hsd_kl, *(t.double() for t in (student, teacher, weight)), **law, **doubled)
    got = grads(fused_hsd_kl, student, teacher, weight, **options, **extra)
    for a, b in zip(got, exact, strict=True):
        assert relative_l1(a, b) <= 1e-4


def test_linear_form():
    given = tensors(torch.bfloat16)
    exact = grads(reference.hsd_kl, *(t.double() for t in given))
    for a, b in zip(grads(fused_hsd_kl, *given, logits_dtype=torch.bfloat16), exact, strict=True):
        assert relative_l1(a, b) <= 0.03


def test_no_synchronization_without_weights_and_one_with_them():
    student, teacher, weight = tensors(torch.bfloat16)
    weights = torch.rand(300, device="cuda")
    grads(fused_hsd_kl, student, teacher, weight)  # compiles
    grads(fused_hsd_kl, student, teacher, weight, token_weights=weights)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        grads(fused_hsd_kl, student, teacher, weight, memory_bytes=2 * 64 * 5000 * 4)
        torch.cuda.set_sync_debug_mode("warn")
        with pytest.warns(UserWarning, match="synchronizing") as caught:
            grads(fused_hsd_kl, student, teacher, weight, token_weights=weights, memory_bytes=2 * 64 * 5000 * 4)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchronizing" in str(w.message) for w in caught) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_upstream_gradient_is_multiplied_in_fp32_and_rounded_once(dtype):
    g, scale = torch.randn((1 << 22) + 9, device="cuda", dtype=dtype), torch.tensor(0.123456789, device="cuda")
    assert torch.equal(times_upstream(g, scale, torch.bfloat16), (g.float() * scale).bfloat16())


@pytest.mark.parametrize("left", [1e-1, 1e-4])
def test_one_buffer_rounds_the_head_gradient_once(left):
    """A large head's dW of a single buffer is written in bf16 by its product: no worse than a sum in fp32, rounded."""
    student, teacher = (torch.randn(1024, 256, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    teacher = student + left * teacher
    weight = torch.randn(1 << 16, 256, device="cuda", dtype=torch.bfloat16) / 16
    exact = grads(reference.hsd_kl, *(t.double() for t in (student, teacher, weight)))
    one, two = (grads(fused_hsd_kl, student, teacher, weight, memory_bytes=m) for m in (1 << 30, 16 << 20))
    assert relative_l1(one[2], exact[2]) <= 1.1 * relative_l1(two[2], exact[2])


def test_cuda_graph_of_the_default_path():
    student, teacher, weight = tensors(torch.bfloat16)
    want = grads(fused_hsd_kl, student, teacher, weight)
    leaves = [t.detach().clone().requires_grad_() for t in (student, weight)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            fused_hsd_kl(leaves[0], teacher, leaves[1]).backward()
    torch.cuda.current_stream().wait_stream(stream)
    for leaf in leaves:
        leaf.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = fused_hsd_kl(leaves[0], teacher, leaves[1])
        loss.backward()
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip([loss, *(leaf.grad for leaf in leaves)], want, strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_by_inductor():
    student, teacher, weight = tensors(torch.bfloat16)
    compiled = torch.compile(lambda *t, **options: fused_hsd_kl(*t, **options), fullgraph=True)
    pairs = zip(grads(compiled, student, teacher, weight), grads(fused_hsd_kl, student, teacher, weight), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b)


def test_chunk_of_more_elements_than_int32():
    """14,200 rows of 151,936 in one chunk: 2^31 is passed at row 14,135. Only for the last 100 rows the teacher is far
    away, so that half of dW comes from there."""
    g = torch.Generator(device="cuda").manual_seed(0)
    student, noise = (torch.randn(14_200, 64, generator=g, device="cuda") for _ in range(2))
    noise[:-100] *= 0.005
    weight = torch.randn(151_936, 64, generator=g, device="cuda") * 0.2
    student, teacher, weight = (t.bfloat16() for t in (student, student + noise, weight))
    _, grad_hidden, grad_weight = grads(fused_hsd_kl, student, teacher, weight, reduction="sum", memory_bytes=24 << 30)
    with torch.no_grad():
        kl = fused_hsd_kl(student, teacher, weight, reduction="none", memory_bytes=24 << 30)

    exact_weight = torch.zeros_like(weight, dtype=torch.float64)
    for at in torch.arange(14_200, device="cuda").split(500):
        part = (t.double() for t in (student[at], teacher[at], weight))
        exact_kl, exact_hidden, part_weight = grads(reference.hsd_kl, *part, reduction="none")
        exact_weight += part_weight
    last = at[-65:]
    assert relative_l1(kl[last], exact_kl[-65:]) <= 1e-4
    assert relative_l1(grad_hidden[last], exact_hidden[-65:]) <= 4e-3
    assert relative_l1(grad_weight, exact_weight) <= 6e-3


def test_more_rows_than_a_grid_dimension():
    student, teacher, weight = tensors(torch.bfloat16, tokens=70_000, dim=16, vocab=64)
    got = grads(fused_hsd_kl, student, teacher, weight)
    exact = grads(reference.hsd_kl, *(t.double() for t in (student, teacher, weight)))
    assert relative_l1(got[1], exact[1]) <= 4e-3 and relative_l1(got[2], exact[2]) <= 4e-3


def test_bitwise_repeatable():
    given = tensors(torch.bfloat16)
    first, second = grads(fused_hsd_kl, *given), grads(fused_hsd_kl, *given)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_memory_does_not_grow_with_tokens():
    used = []
    for tokens in (2_000, 20_000):
        student, teacher, weight = tensors(torch.bfloat16, tokens=tokens, dim=64, vocab=50_000)
        student.requires_grad_(), weight.requires_grad_()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fused_hsd_kl(student, teacher, weight, memory_bytes=64 << 20).backward()
        used.append(torch.cuda.max_memory_allocated() - before)
    assert used[1] - used[0] < 18_000 * 64 * 2 * 4 + (4 << 20)
