"""The one thing that is left for a backward: a stored gradient times its upstream gradient."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hsd_kernels import fused_hsd_kl
from hsd_kernels.upstream import times_upstream


@pytest.mark.parametrize("n", [0, 1, 4096, 9001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_multiplies_in_fp32(dtype, n):
    """The interpreter cuts bf16 off where the device rounds it (test_cuda.py)."""
    pytest.importorskip("triton")
    from hsd_kernels.rows import triton_scale

    g = torch.randn(n, generator=torch.Generator().manual_seed(0)).to(dtype)
    scale = torch.tensor(0.123456789)
    assert torch.equal(triton_scale.scaled(g, scale, torch.float32), g.float() * scale)
    narrow = triton_scale.scaled(g, scale, torch.bfloat16)
    torch.testing.assert_close(narrow.float(), g.float() * scale, rtol=2**-7, atol=0.0)


def test_opcheck():
    pytest.importorskip("triton")
    given = (torch.randn(3, 5), torch.tensor(2.0), torch.bfloat16)
    torch.library.opcheck(torch.ops.hsd_kernels.times_scalar.default, given)


@pytest.mark.parametrize("upstream", [torch.tensor(0.3), torch.rand(4)])
def test_a_scalar_or_one_of_each_row(upstream):
    g = torch.randn(4, 3).bfloat16()
    expected = (g.float() * upstream.reshape(-1, 1)).bfloat16()
    assert torch.equal(times_upstream(g, upstream, torch.bfloat16), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_a_graph_that_is_kept_keeps_its_gradients(dtype, scale):
    """Only the last backward may give the saved gradients away, or change them."""
    g = torch.Generator().manual_seed(0)
    student, teacher, weight = (torch.randn(n, 8, generator=g).to(dtype) for n in (5, 5, 11))
    leaves = [student.requires_grad_(), weight.requires_grad_()]
    once = torch.autograd.grad(fused_hsd_kl(student, teacher, weight) * scale, leaves)
    loss = fused_hsd_kl(student, teacher, weight) * scale
    kept = [torch.autograd.grad(loss, leaves, retain_graph=i < 2) for i in range(3)]
    assert all(torch.equal(a, b) for found in kept for a, b in zip(found, once, strict=True))

    for _ in range(2):  # two graphs: the second adds to what the first gave away
        loss = fused_hsd_kl(student, teacher, weight) * scale
        loss.backward(retain_graph=True)
        loss.backward()
    for leaf, one in zip(leaves, once, strict=True):
        torch.testing.assert_close(leaf.grad, 4 * one)


def test_the_last_backward_gives_dw_away():
    student, weight = torch.randn(3, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    seen = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append((func._overloadpacket._qualified_op_name, getattr(args[0], "shape", None)))
            return func(*args, **(kwargs or {}))

    for keeps, passes in ((True, 1), (False, 0)):
        loss = fused_hsd_kl(student, torch.zeros(3, 4), weight)
        seen.clear()
        with Seen():
            loss.backward(retain_graph=keeps)
        assert sum(name.startswith("aten::mul") and shape == weight.shape for name, shape in seen) == passes


def test_several_upstream_gradients_at_a_time():
    leaves = [torch.randn(3, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)]
    loss = fused_hsd_kl(leaves[0], torch.zeros(3, 4), leaves[1])
    batched = torch.autograd.grad(loss, leaves, torch.tensor([1.0, 2.0]), is_grads_batched=True, retain_graph=True)
    for both, one in zip(batched, torch.autograd.grad(loss, leaves), strict=True):
        assert torch.equal(both, torch.stack([one, 2 * one]))
