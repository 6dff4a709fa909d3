"""What `fused_hsd_kl` refuses, and how it says so: the argument, what was expected, what came."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from hsd_kernels.divergence import CLIP_FORMS, DIVERGENCES
from hsd_kernels.rows import IMPLS
from hsd_kernels.sharded import SHARDED

REDUCTIONS = ("none", "sum", "mean")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NO_GRADIENT = "{name}: expected a tensor without gradient, got requires_grad=True; pass {name}.detach()"
OPTIONAL_NUMBERS = ("kl_clip", "num_items", "softcap", "chunk_bytes")
_OPTIONAL = ("bias", "teacher_weight", "teacher_bias", "reference_hidden", "reference_weight", "reference_bias")


def check_tensors(given: dict[str, Any], sharded: bool) -> None:
    """``given`` maps argument names to tensors; ``sharded``: the heads are parts of a vocabulary."""
    student = given["student_hidden"]
    for name, t in given.items():
        optional = name in _OPTIONAL
        if t is None and optional:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor{' or None' if optional else ''}, got {type(t).__name__}")
        for kind, is_sharded in SHARDED.items():
            if is_sharded(t):
                way = f"with hsd_kernels.gathered({name}) as {name}: ..."
                raise TypeError(f"{name}: expected a plain tensor, got a {kind}; gather it: `{way}`")
        if t.dtype not in DTYPES:
            raise TypeError(f"{name}: expected one of {[str(d) for d in DTYPES]}, got {t.dtype}")
        if t.dtype != student.dtype:
            raise TypeError(
                f"{name}: expected the dtype of student_hidden, {student.dtype}, got {t.dtype}; "
                "cast it or run under torch.autocast"
            )
        if t.device != student.device:
            raise ValueError(f"{name}: expected the device of student_hidden, {student.device}, got {t.device}")
        if name.startswith(("teacher", "reference")) and t.requires_grad:
            raise ValueError(_NO_GRADIENT.format(name=name))
    if student.dim() < 1:
        raise ValueError("student_hidden: expected shape (..., D), got a scalar")
    weight = given["lm_head_weight"]
    if weight.dim() != 2 or (weight.shape[0] == 0 and not sharded):
        raise ValueError(f"lm_head_weight: expected shape (V, D) with V > 0, got {tuple(weight.shape)}")
    vocab, dim = weight.shape
    if student.shape[-1] != dim:
        raise ValueError(f"student_hidden: expected shape (..., {dim}), got {tuple(student.shape)}")
    _check_bias("bias", given["bias"], vocab)
    for side in ("teacher", "reference"):
        _check_side(side, given, vocab, dim)


def _check_side(side: str, given: dict[str, Any], vocab: int, dim: int) -> None:
    hidden, weight, bias = (given[f"{side}_{what}"] for what in ("hidden", "weight", "bias"))
    if hidden is None:
        for what in ("weight", "bias"):
            if given[f"{side}_{what}"] is not None:
                raise ValueError(f"{side}_{what}: expected None without {side}_hidden")
        return
    if weight is not None and (weight.dim() != 2 or weight.shape[0] != vocab):
        raise ValueError(f"{side}_weight: expected shape ({vocab}, D'), got {tuple(weight.shape)}")
    expected = (*given["student_hidden"].shape[:-1], dim if weight is None else weight.shape[1])
    if tuple(hidden.shape) != expected:
        raise ValueError(f"{side}_hidden: expected shape {expected}, got {tuple(hidden.shape)}")
    if bias is not None and weight is None:
        raise ValueError(f"{side}_bias: expected None without {side}_weight (the head and its bias are shared)")
    _check_bias(f"{side}_bias", bias, vocab)


def _check_bias(name: str, bias: Tensor | None, vocab: int) -> None:
    if bias is not None and tuple(bias.shape) != (vocab,):
        raise ValueError(f"{name}: expected shape ({vocab},), got {tuple(bias.shape)}")


def check_options(
    *,
    divergence: Any,
    kl_clip_form: Any,
    reduction: Any,
    filter_eps: Any,
    impl: Any,
    **numeric: Any,
) -> None:
    """``numeric``: the options that are numbers, those of OPTIONAL_NUMBERS possibly None."""
    # Comparisons, not math.isfinite: under torch.compile(dynamic=True) a number may be symbolic.
    for name, value in numeric.items():
        optional = name in OPTIONAL_NUMBERS
        kind = numbers.Integral if name == "chunk_bytes" else numbers.Real
        if isinstance(value, bool) or not (isinstance(value, kind) or (value is None and optional)):
            expected = "an integer" if kind is numbers.Integral else "a number"
            got = f"{value!r} ({type(value).__name__})"
            raise TypeError(f"{name}: expected {expected}{' or None' if optional else ''}, got {got}")
    for name, value, allowed in (
        ("divergence", divergence, DIVERGENCES),
        ("kl_clip_form", kl_clip_form, CLIP_FORMS),
        ("reduction", reduction, REDUCTIONS),
        ("impl", impl, IMPLS),
    ):
        if value not in allowed:
            raise ValueError(f"{name}: expected one of {allowed}, got {value!r}")
    if not 0.0 <= numeric["beta"] <= 1.0:
        raise ValueError(f"beta: expected a number in [0, 1], got {numeric['beta']}")
    for name in ("temperature", *OPTIONAL_NUMBERS):
        value = numeric[name]
        if value is not None and not (0.0 < value < math.inf):
            raise ValueError(f"{name}: expected a finite number > 0, got {value}")
    if not (-math.inf < numeric["logit_scale"] < math.inf):
        raise ValueError(f"logit_scale: expected a finite number, got {numeric['logit_scale']}")
    coef = numeric["reference_coef"]
    if not (0.0 <= coef < math.inf):
        raise ValueError(f"reference_coef: expected a finite number >= 0, got {coef}")
    if filter_eps is not None and filter_eps != "auto":
        if isinstance(filter_eps, bool) or not isinstance(filter_eps, numbers.Real):
            raise TypeError(f"filter_eps: expected None, 'auto' or a number, got {filter_eps!r}")
        if not (0.0 < float(filter_eps) < math.inf):
            raise ValueError(f"filter_eps: expected a finite number > 0, got {filter_eps}")


def check_logits_dtype(logits_dtype: Any, given: dict[str, Any]) -> None:
    student = given["student_hidden"]
    if logits_dtype is None or logits_dtype == (torch.float64 if student.dtype == torch.float64 else torch.float32):
        return
    if logits_dtype != torch.bfloat16:
        raise ValueError(f"logits_dtype: expected None, torch.float32 or torch.bfloat16, got {logits_dtype}")
    if student.dtype != torch.bfloat16:
        raise ValueError(f"logits_dtype: expected torch.bfloat16 for bf16 inputs only, got it for {student.dtype}")
    for name in ("teacher_weight", "reference_hidden"):
        if given[name] is not None:
            raise ValueError(f"{name}: expected None with logits_dtype=torch.bfloat16, got a tensor")


def check_per_token(name: str, t: Any, like: Tensor) -> None:
    if t is None:
        return
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor or None, got {type(t).__name__}")
    if t.shape != like.shape[:-1]:
        raise ValueError(f"{name}: expected shape {tuple(like.shape[:-1])}, got {tuple(t.shape)}")
    if t.device != like.device:
        raise ValueError(f"{name}: expected the device of student_hidden, {like.device}, got {t.device}")
    if name == "token_weights":
        if t.requires_grad:
            raise ValueError(_NO_GRADIENT.format(name=name))
        if t.is_complex():
            raise TypeError(f"{name}: expected real numbers, got {t.dtype}")
    elif t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
        raise TypeError(f"{name}: expected integers, got {t.dtype}")
