"""What `fused_hsd_kl` and `fused_token_loss` refuse about tensors: the argument, what was expected, what came."""

from __future__ import annotations

import torch
from torch import Tensor

from hsd_kernels.divergence import RowSpec
from hsd_kernels.op_support import wide_dtype
from hsd_kernels.sharded import SHARDED
from hsd_kernels.values import check_not_negative

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REDUCTIONS = ("none", "sum", "mean")
NO_GRADIENT = "{name}: expected a tensor without gradient, got requires_grad=True; pass {name}.detach()"


def _check_plain(name: str, t: Tensor) -> None:
    for kind, is_sharded in SHARDED.items():
        if is_sharded(t):
            way = "with hsd_kernels.gathered(weight) as weight: ..."
            raise TypeError(f"{name}: expected a plain tensor, got a {kind}; gather it: `{way}`")
    if t.is_nested or t.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got {'a nested one' if t.is_nested else t.layout}")


def check_operand(name: str, t: object, like: Tensor, like_name: str, trained: bool = False) -> None:
    """A plain tensor in the dtype and on the device of ``like``, the student's hidden states."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
    _check_plain(name, t)
    if t.dtype not in DTYPES:
        raise TypeError(f"{name}: expected one of {[str(d) for d in DTYPES]}, got {t.dtype}")
    if t.dtype != like.dtype:
        way = "cast it or run under torch.autocast"
        raise TypeError(f"{name}: expected the dtype of {like_name}, {like.dtype}, got {t.dtype}; {way}")
    if t.device != like.device:
        raise ValueError(f"{name}: expected the device of {like_name}, {like.device}, got {t.device}")
    if not trained and t.requires_grad:
        raise ValueError(NO_GRADIENT.format(name=name))


def check_head_shape(
    name: str, weight: Tensor, bias: Tensor | None, vocab: int | None = None, is_part: bool = False
) -> None:
    """(V, D) and (V,), V being ``vocab`` if given, and not 0 but for a part of a vocabulary."""
    if weight.dim() != 2 or (weight.shape[0] == 0 and not is_part) or vocab not in (None, weight.shape[0]):
        expected = "(V, D) with V > 0" if vocab is None else f"({vocab}, D')"
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
    _check_plain(name, t)
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


def check_range(name: str, spec: RowSpec, like: Tensor) -> None:
    """``name`` is the temperature's. An infinite factor of the logits, or 0 times -inf, would make them NaN."""
    info, (_, kappa) = torch.finfo(wide_dtype(like)), spec.scales
    factors = (*spec.scales, spec.chain, spec.logit_scale, spec.softcap or 0.0)
    if kappa < info.tiny or not all(abs(factor) <= info.max for factor in factors):
        given = f"{spec.logit_scale}, {spec.softcap} and {spec.divergence.temperature}"
        within = f"logit_scale, softcap and temperature whose ratios are in {info.dtype}'s range"
        raise ValueError(f"{name}: expected {within}, got {given}")


def check_reference(name: str, reference: object, coef: float) -> None:
    """A reference policy's ``name`` and reference_coef, both or neither."""
    check_not_negative("reference_coef", coef)
    if coef > 0.0 if reference is None else coef == 0.0:
        expected, got = "a tensor with reference_coef > 0, None without", "None" if reference is None else "a tensor"
        raise ValueError(f"{name}: expected {expected}, got {got} and reference_coef={coef}")


def check_not_transformed(name: str, *tensors: Tensor | None) -> None:
    """Forward-mode differentiation would find no tangent in the result, and say nothing."""
    if torch.compiler.is_compiling():
        return
    for t in tensors:
        if t is None:
            continue
        if torch.autograd.forward_ad.unpack_dual(t).tangent is not None:  # pyright: ignore[reportUnknownMemberType]
            what = "tensors without a tangent, got one; it has no forward-mode derivative"
            raise RuntimeError(f"{name}: expected {what}")
        if torch._C._functorch.is_gradtrackingtensor(t):  # pyright: ignore
            raise RuntimeError(f"{name}: expected no torch.func.grad around it, got one; use torch.autograd.grad")
