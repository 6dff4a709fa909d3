"""A tensor times a scalar that lies on the device, in one pass."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


def scaled(g: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``(g.float() * scale).to(dtype)``, contiguous."""
    g = g.contiguous()
    out = torch.empty_like(g, dtype=dtype)
    if g.numel() > 0:
        with torch.cuda.device_of(g):
            kernel: Any = scale_kernel[(triton.cdiv(g.numel(), BLOCK),)]
            kernel(g, scale, out, g.numel(), BLOCK=BLOCK, num_warps=8)
    return out


@triton.jit
def scale_kernel(g_ptr, scale_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    g = tl.load(g_ptr + at, mask=inside).to(tl.float32) * tl.load(scale_ptr).to(tl.float32)
    tl.store(out_ptr + at, g.to(out_ptr.dtype.element_ty), mask=inside)
