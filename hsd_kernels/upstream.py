"""A stored gradient times its upstream gradient, the one thing that is left for a backward."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

LARGE = 1 << 22  # elements: below it a launch costs more than the pass

_library = torch.library.Library("hsd_kernels", "FRAGMENT")
_library.define("times_scalar(Tensor g, Tensor upstream, ScalarType dtype) -> Tensor")


def times_upstream(g: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """g (R, ...) times a scalar or (R,) in the precision of ``upstream``, rounded once: an upstream gradient rounded
    to bf16 would be off by up to 0.2 % in every entry alike."""
    if upstream.dim() == 0 and g.dtype == dtype and not g.is_cuda:  # a CPU takes a scalar in fp32
        return g if _is_last_use(g) and _is_one(upstream) else g * upstream
    if upstream.dim() == 0 and g.is_cuda and g.numel() >= LARGE and g.dtype != torch.float64 and _has_triton():
        return torch.ops.hsd_kernels.times_scalar(g, upstream, dtype)
    upstream = upstream.reshape(-1, *(1,) * (g.dim() - 1))
    return torch.mul(g, upstream, out=torch.empty_like(g, dtype=dtype))


def _is_last_use(g: Tensor) -> bool:
    """Whether autograd frees ``g`` after this backward. Else a leaf's .grad would be the saved tensor itself, and what
    is accumulated next would change it. The product is a pass over dW into fresh pages."""
    # A compiler's tensors are of other types: it traces the product.
    return type(g) is Tensor and not torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore


def _is_one(upstream: Tensor) -> bool:
    """Several upstream gradients at a time (``is_grads_batched``) have no one value."""
    return not torch._C._functorch.is_batchedtensor(upstream) and upstream.item() == 1.0  # pyright: ignore


def _times_scalar(g: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """torch.mul of bf16 by an fp32 scalar tensor casts element by element on CUDA, below the memory's speed."""
    from hsd_kernels.rows import triton_scale

    return triton_scale.scaled(g, upstream, dtype)


def _times_scalar_fake(g: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(g, dtype=dtype, memory_format=torch.contiguous_format)


_library.impl("times_scalar", _times_scalar, "CompositeExplicitAutograd")
torch.library.register_fake("hsd_kernels::times_scalar", _times_scalar_fake, lib=_library)


@functools.cache
def _has_triton() -> Any:
    return importlib.util.find_spec("triton") is not None
