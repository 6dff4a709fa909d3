"""What `fused_hsd_kl` and `fused_token_loss` refuse about tensors: the argument, what was expected, what came."""

from __future__ import annotations

import torch
from torch import Tensor

from hsd_kernels.sharded import SHARDED

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NO_GRADIENT = "{name}: expected a tensor without gradient, got requires_grad=True; pass {name}.detach()"


def check_operand(name: str, t: object, like: Tensor, like_name: str, trained: bool = False) -> None:
    """A plain tensor in the dtype and on the device of ``like``, the student's hidden states."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
    for kind, is_sharded in SHARDED.items():
        if is_sharded(t):
            way = "with hsd_kernels.gathered(weight) as weight: ..."
            raise TypeError(f"{name}: expected a plain tensor, got a {kind}; gather it: `{way}`")
    if t.dtype not in DTYPES:
        raise TypeError(f"{name}: expected one of {[str(d) for d in DTYPES]}, got {t.dtype}")
    if t.dtype != like.dtype:
        way = "cast it or run under torch.autocast"
        raise TypeError(f"{name}: expected the dtype of {like_name}, {like.dtype}, got {t.dtype}; {way}")
    if t.device != like.device:
        raise ValueError(f"{name}: expected the device of {like_name}, {like.device}, got {t.device}")
    if not trained and t.requires_grad:
        raise ValueError(NO_GRADIENT.format(name=name))


def check_head_shape(name: str, weight: Tensor, bias: Tensor | None, vocab: int | None = None) -> None:
    """(V, D) and (V,), V being ``vocab`` if given. V = 0 is for a part of a vocabulary only: the caller's to refuse."""
    if weight.dim() != 2 or (vocab is not None and weight.shape[0] != vocab):
        expected = "(V, D)" if vocab is None else f"({vocab}, D')"
        raise ValueError(f"{name}.weight: expected shape {expected}, got {tuple(weight.shape)}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"{name}.bias: expected shape ({weight.shape[0]},), got {tuple(bias.shape)}")


def check_hidden_shape(name: str, hidden: Tensor, dim: int, leading: torch.Size | None = None) -> None:
    if leading is None:
        if hidden.dim() < 1:
            raise ValueError(f"{name}: expected shape (..., D), got a scalar")
        if hidden.shape[-1] != dim:
            raise ValueError(f"{name}: expected shape (..., {dim}), got {tuple(hidden.shape)}")
    elif tuple(hidden.shape) != (*leading, dim):
        raise ValueError(f"{name}: expected shape {(*leading, dim)}, got {tuple(hidden.shape)}")


def check_per_token(name: str, t: object, like: Tensor, like_name: str, integers: bool = False) -> None:
    """Without gradient and of the leading shape of ``like``, or None."""
    if t is None:
        return
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor or None, got {type(t).__name__}")
    if t.shape != like.shape[:-1]:
        raise ValueError(f"{name}: expected shape {tuple(like.shape[:-1])}, got {tuple(t.shape)}")
    if t.device != like.device:
        raise ValueError(f"{name}: expected the device of {like_name}, {like.device}, got {t.device}")
    if integers:
        if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
            raise TypeError(f"{name}: expected integers, got {t.dtype}")
        return
    if t.requires_grad:
        raise ValueError(NO_GRADIENT.format(name=name))
    if t.is_complex():
        raise TypeError(f"{name}: expected real numbers, got {t.dtype}")


def check_no_tangent(name: str, *tensors: Tensor | None) -> None:
    """Forward-mode differentiation would find no tangent in the result, and say nothing."""
    if torch.compiler.is_compiling():
        return
    for t in tensors:
        if t is not None and torch.autograd.forward_ad.unpack_dual(t).tangent is not None:  # pyright: ignore[reportUnknownMemberType]
            raise RuntimeError(
                f"{name}: expected tensors without a tangent, got one; it has no forward-mode derivative"
            )
