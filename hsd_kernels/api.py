"""The contract: what `fused_hsd_kl` computes, accepts, returns and refuses."""

from __future__ import annotations

import math
import numbers
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hsd_kernels import rows as row_backends
from hsd_kernels.autograd import FusedHSDKL
from hsd_kernels.divergence import DIVERGENCES, RowSpec
from hsd_kernels.driver import Head, Problem, TokenWeightFn

REDUCTIONS = ("none", "sum", "mean")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NO_GRADIENT = "{name}: expected a tensor without gradient, got requires_grad=True; pass {name}.detach()"


class HSDKLOutput(NamedTuple):
    """Everything the pass knows per token. Shapes are the leading shape of ``student_hidden``; nats; fp32 (fp64 for
    fp64 inputs); only ``loss`` carries a gradient. Tokens of weight 0 are never computed and hold 0."""

    loss: Tensor
    per_token_kl: Tensor
    student_logps: Tensor | None  # log-prob of target_ids, None without them
    teacher_logps: Tensor | None
    student_entropy: Tensor
    teacher_entropy: Tensor
    student_lse: Tensor
    teacher_lse: Tensor


def fused_hsd_kl(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    lm_head_weight: Tensor,
    bias: Tensor | None = None,
    *,
    teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    kl_clip: float | None = None,
    target_ids: Tensor | None = None,
    token_weights: Tensor | None = None,
    token_weight_fn: TokenWeightFn | None = None,
    reduction: str = "mean",
    num_items: float | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_bytes: int | None = None,
    impl: str = "auto",
    return_stats: bool = False,
) -> Tensor | HSDKLOutput:
    """Full-vocabulary divergence between teacher and student from hidden states, without (tokens, vocabulary) logits.

    Equivalent, for the defaults, to::

        student = F.log_softmax(F.linear(student_hidden, lm_head_weight, bias).float(), -1)
        teacher = F.log_softmax(F.linear(teacher_hidden, lm_head_weight, bias).float(), -1).detach()
        loss = (teacher.exp() * (teacher - student)).sum(-1).mean()

    but both projections are one GEMM, the gradient is made while the logits of a chunk are at hand, and the largest
    intermediate is ``chunk_bytes``. The logits compared are ``softcap * tanh(logit_scale * (h W^T + b) / softcap) /
    temperature`` on both sides; there is no silent temperature^2 factor.

    Args:
        student_hidden: (..., D), fp32, bf16, fp16 or fp64. Gets a gradient.
        teacher_hidden: (..., D) with the same leading shape, or (..., D') if ``teacher_weight`` is (V, D'). Never a
            gradient: it must not require one.
        lm_head_weight: (V, D), the head shared by both sides. Gets a gradient if it requires one, accumulated in fp32.
        bias: (V,), optional, likewise.
        teacher_weight, teacher_bias: a head of the teacher's own, (V, D') and (V,); no gradient.
        divergence: "forward_kl" = KL(teacher || student), HSD's objective; "reverse_kl" = KL(student || teacher);
            "jsd" = beta KL(teacher || m) + (1 - beta) KL(student || m), m = (1 - beta) student + beta teacher.
        beta: the teacher's share of the mixture, in [0, 1]; 0 is the forward and 1 the reverse KL. Only for "jsd".
        temperature: divides the logits of both sides, > 0.
        kl_clip: OPSD's pointwise clip: every vocabulary summand is replaced by min(., kl_clip) before the sum. The
            per-token value may then be negative.
        target_ids: (...), integers in [0, V) wherever the weight is not 0: the tokens whose log-probs the statistics
            report. Out of range is an error on a CPU and a log-prob of NaN on CUDA, where a check would synchronize.
        token_weights: (...), finite, without gradient; multiplies each token's divergence. Tokens of weight 0 are
            dropped before the GEMM. Costs one host synchronization.
        token_weight_fn: called once per chunk with `RowStats` (including ``rows``, the flat token positions); returns
            the (C,) weights that multiply those of ``token_weights``. No gradient flows through it.
        reduction: "mean" over the tokens of nonzero ``token_weights`` (or ``num_items``), "sum", or "none".
        num_items: replaces the count that "mean" divides by, for gradient accumulation.
        chunk_bytes: size of the logits workspace; by default 1 GiB on CUDA and 256 MiB elsewhere.
        impl: "auto" (Triton on CUDA, C++ on a CPU in fp32 and bf16, torch elsewhere), "torch", "triton" or "cpp". An
            explicit choice never falls back.
        return_stats: return `HSDKLOutput` instead of the loss.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    Source: the loss of Hindsight Self-Distillation, arXiv 2606.15576; JSD and clip as in OPSD, arXiv 2601.18734.
    """
    tensors = (student_hidden, teacher_hidden, lm_head_weight, bias, teacher_weight, teacher_bias)
    student_hidden, teacher_hidden, lm_head_weight, bias, teacher_weight, teacher_bias = _autocast(*tensors)
    _check_tensors(student_hidden, teacher_hidden, lm_head_weight, bias, teacher_weight, teacher_bias)
    _check_options(divergence, beta, temperature, kl_clip, reduction, num_items, logit_scale, softcap, chunk_bytes)
    if token_weight_fn is not None and not callable(token_weight_fn):
        raise TypeError(f"token_weight_fn: expected a callable or None, got {type(token_weight_fn).__name__}")
    shape = student_hidden.shape[:-1]
    tokens = shape.numel()
    vocab = lm_head_weight.shape[0]
    _check_per_token("target_ids", target_ids, student_hidden)
    _check_per_token("token_weights", token_weights, student_hidden)
    rows, weights = _live_rows(token_weights, tokens, student_hidden)
    flat_targets = None if target_ids is None else _checked_targets(target_ids.reshape(-1), rows, vocab)

    count = max(rows.numel(), 1) if num_items is None else float(num_items)
    student = student_hidden.reshape(tokens, student_hidden.shape[-1])
    problem = Problem(
        student_hidden=student.detach(),
        teacher_hidden=teacher_hidden.detach().reshape(tokens, teacher_hidden.shape[-1]),
        head=Head(lm_head_weight.detach(), None if bias is None else bias.detach()),
        teacher_head=None if teacher_weight is None else Head(teacher_weight, teacher_bias),
        spec=RowSpec.resolve(
            divergence,
            float(beta),
            temperature=float(temperature),
            kl_clip=None if kl_clip is None else float(kl_clip),
            logit_scale=float(logit_scale),
            softcap=None if softcap is None else float(softcap),
        ),
        rows_impl=row_backends.resolve(impl, student_hidden.device, student_hidden.dtype),
        target_ids=flat_targets,
        chunk_bytes=None if chunk_bytes is None else int(chunk_bytes),
    )
    scale = 1.0 / count if reduction == "mean" else 1.0
    inputs = (student, lm_head_weight, bias)
    if not torch.is_grad_enabled():  # an autograd.Function sees requires_grad alone and would make the gradients
        inputs = tuple(None if t is None else t.detach() for t in inputs)
    loss, _, *stats = FusedHSDKL.apply(*inputs, problem, rows, weights, token_weight_fn, scale, reduction == "none")
    loss = loss.reshape(shape) if reduction == "none" else loss
    if not return_stats:
        return loss
    per_token: list[Any] = [None if s is None else s.reshape(shape) for s in stats[:-1]]
    return HSDKLOutput(loss, *per_token)


def _autocast(*tensors: Any) -> tuple[Any, ...]:
    """Under autocast a linear layer runs in the autocast dtype; so does the head here."""
    first = tensors[0]
    if not isinstance(first, Tensor) or not torch.amp.is_autocast_available(first.device.type):
        return tensors
    if not torch.is_autocast_enabled(first.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    low = (torch.float32, torch.bfloat16, torch.float16)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype in low else t for t in tensors)


def _check_tensors(student_hidden, teacher_hidden, lm_head_weight, bias, teacher_weight, teacher_bias) -> None:
    given = {
        "student_hidden": student_hidden,
        "teacher_hidden": teacher_hidden,
        "lm_head_weight": lm_head_weight,
        "bias": bias,
        "teacher_weight": teacher_weight,
        "teacher_bias": teacher_bias,
    }
    for name, t in given.items():
        optional = name in ("bias", "teacher_weight", "teacher_bias")
        if t is None and optional:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor{' or None' if optional else ''}, got {type(t).__name__}")
        if hasattr(t, "device_mesh"):
            raise TypeError(f"{name}: expected a plain tensor, got a DTensor; gather it with {name}.full_tensor()")
        if t.dtype not in DTYPES:
            raise TypeError(f"{name}: expected one of {[str(d) for d in DTYPES]}, got {t.dtype}")
        if t.dtype != student_hidden.dtype:
            raise TypeError(
                f"{name}: expected the dtype of student_hidden, {student_hidden.dtype}, got {t.dtype}; "
                "cast it or run under torch.autocast"
            )
        if t.device != student_hidden.device:
            raise ValueError(f"{name}: expected the device of student_hidden, {student_hidden.device}, got {t.device}")
        if name.startswith("teacher") and t.requires_grad:
            raise ValueError(_NO_GRADIENT.format(name=name))
    if student_hidden.dim() < 1:
        raise ValueError("student_hidden: expected shape (..., D), got a scalar")
    if lm_head_weight.dim() != 2 or lm_head_weight.shape[0] == 0:
        raise ValueError(f"lm_head_weight: expected shape (V, D) with V > 0, got {tuple(lm_head_weight.shape)}")
    vocab, dim = lm_head_weight.shape
    if student_hidden.shape[-1] != dim:
        raise ValueError(f"student_hidden: expected shape (..., {dim}), got {tuple(student_hidden.shape)}")
    if teacher_weight is not None and (teacher_weight.dim() != 2 or teacher_weight.shape[0] != vocab):
        raise ValueError(f"teacher_weight: expected shape ({vocab}, D'), got {tuple(teacher_weight.shape)}")
    teacher_dim = dim if teacher_weight is None else teacher_weight.shape[1]
    expected = (*student_hidden.shape[:-1], teacher_dim)
    if tuple(teacher_hidden.shape) != expected:
        raise ValueError(f"teacher_hidden: expected shape {expected}, got {tuple(teacher_hidden.shape)}")
    if teacher_bias is not None and teacher_weight is None:
        raise ValueError("teacher_bias: expected None without teacher_weight (the head and its bias are shared)")
    for name in ("bias", "teacher_bias"):
        t = given[name]
        if t is not None and tuple(t.shape) != (vocab,):
            raise ValueError(f"{name}: expected shape ({vocab},), got {tuple(t.shape)}")


def _check_options(
    divergence, beta, temperature, kl_clip, reduction, num_items, logit_scale, softcap, chunk_bytes
) -> None:
    numeric = {
        "beta": beta,
        "temperature": temperature,
        "logit_scale": logit_scale,
        "kl_clip": kl_clip,
        "num_items": num_items,
        "softcap": softcap,
        "chunk_bytes": chunk_bytes,
    }
    for name, value in numeric.items():
        optional = name in ("kl_clip", "num_items", "softcap", "chunk_bytes")
        kind = numbers.Integral if name == "chunk_bytes" else numbers.Real
        if not (isinstance(value, kind) and not isinstance(value, bool)) and not (value is None and optional):
            expected = "an integer" if kind is numbers.Integral else "a number"
            got = f"{value!r} ({type(value).__name__})"
            raise TypeError(f"{name}: expected {expected}{' or None' if optional else ''}, got {got}")
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence: expected one of {DIVERGENCES}, got {divergence!r}")
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta: expected a number in [0, 1], got {beta}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {REDUCTIONS}, got {reduction!r}")
    for name, value in numeric.items():
        if name in ("beta", "logit_scale") or value is None:
            continue
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name}: expected a finite number > 0, got {value}")
    if not math.isfinite(logit_scale):
        raise ValueError(f"logit_scale: expected a finite number, got {logit_scale}")


def _check_per_token(name: str, t: Tensor | None, like: Tensor) -> None:
    if t is None:
        return
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor or None, got {type(t).__name__}")
    if t.shape != like.shape[:-1]:
        raise ValueError(f"{name}: expected shape {tuple(like.shape[:-1])}, got {tuple(t.shape)}")
    if t.device != like.device:
        raise ValueError(f"{name}: expected the device of student_hidden, {like.device}, got {t.device}")


def _checked_targets(ids: Tensor, rows: Tensor, vocab: int) -> Tensor:
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"target_ids: expected integers, got {ids.dtype}")
    live = ids[rows]
    # On CUDA this would synchronize: there the log-probs of an id out of range are NaN.
    if not ids.is_cuda and live.numel() and not (0 <= int(live.min()) and int(live.max()) < vocab):
        raise ValueError(f"target_ids: expected values in [0, {vocab}), got {int(live.min())} to {int(live.max())}")
    return ids.long()


def _live_rows(token_weights: Tensor | None, tokens: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Positions and weights of the tokens that count. One host synchronization if weights are given."""
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    if token_weights is None:
        return torch.arange(tokens, device=like.device), torch.ones(tokens, device=like.device, dtype=wide)
    if token_weights.requires_grad:
        raise ValueError(_NO_GRADIENT.format(name="token_weights"))
    if token_weights.is_complex():
        raise TypeError(f"token_weights: expected real numbers, got {token_weights.dtype}")
    w = token_weights.detach().reshape(-1).to(wide)
    live, bad = torch.stack([w.count_nonzero(), (~w.isfinite()).count_nonzero()]).tolist()
    if bad:
        raise ValueError(f"token_weights: expected finite numbers, got {bad} that are NaN or infinite")
    rows = torch.nonzero_static(w, size=live).squeeze(-1)
    return rows, w[rows]
