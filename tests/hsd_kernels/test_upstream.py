"""The one thing that is left for a backward: a stored gradient times its upstream gradient."""

import pytest
import torch

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
