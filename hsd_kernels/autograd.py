"""The one autograd.Function: gradients are made in the forward, while the chunk's logits are at hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hsd_kernels.driver import Head, Problem, TokenWeightFn, Wanted, run


class FusedHSDKL(torch.autograd.Function):
    """(student_hidden (T, D), weight (V, D), bias (V,) or None, ...) -> (loss, *statistics).

    The loss is a scalar ``scale * sum_t w_t kl_t`` or, with ``per_token``, the (T,) terms. A per-token loss has an
    upstream gradient per row. That can rescale finished rows of dH, but not dW, which is a sum over rows: when the
    head is trained the backward runs the chunks again with the upstream gradient as weights (6U instead of 4U).
    """

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        problem: Problem,
        rows: Tensor,
        weights: Tensor,
        token_weight_fn: TokenWeightFn | None,
        scale: float,
        per_token: bool,
    ) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        wanted = Wanted(hidden=needs[0], weight=needs[1], bias=needs[2])
        rerun = per_token and (wanted.weight or wanted.bias)
        result = run(problem, rows, weights, token_weight_fn, Wanted(False, False, False) if rerun else wanted)

        if rerun:
            # Saved through autograd, so that an in-place change before the backward is an error, not a wrong gradient.
            own = problem.teacher_head
            teacher = (problem.teacher_hidden, *((None, None) if own is None else (own.weight, own.bias)))
            saved = (student_hidden, weight, bias, *teacher, rows, result.weights)
            ctx.problem = replace(  # type: ignore[arg-type]
                problem, student_hidden=None, head=None, teacher_hidden=None, teacher_head=None
            )
        else:
            grads = (result.grad_hidden, result.grad_weight, result.grad_bias)
            kinds = (student_hidden, weight, bias)
            saved = tuple(
                None if g is None or like is None else g.mul_(scale).to(_storage_dtype(like))
                for g, like in zip(grads, kinds, strict=True)
            )
            saved = (*saved, result.weights if per_token else None)
        ctx.save_for_backward(*saved)
        ctx.rerun, ctx.per_token, ctx.wanted, ctx.dtype = rerun, per_token, wanted, student_hidden.dtype

        terms = result.weights * result.stats.kl
        loss = terms if per_token else terms.sum() * scale
        stats = (result.weights, *result.stats[1:])
        ctx.mark_non_differentiable(*(s for s in stats if s is not None))
        return loss, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        grad = upstream[0]
        if grad is None:
            grads: tuple[Tensor | None, ...] = (None, None, None)
        elif ctx.rerun:
            grads = _rerun(ctx, grad)
        elif ctx.per_token:
            grad_hidden, _, _, weights = ctx.saved_tensors
            grad = grad.masked_fill(weights == 0, 0.0)  # a NaN upstream of a dropped row reaches nothing
            grads = (_times_upstream(grad_hidden, grad, ctx.dtype), None, None)
        else:
            grads = tuple(None if g is None else _times_upstream(g, grad, ctx.dtype) for g in ctx.saved_tensors[:3])
        return *grads, None, None, None, None, None, None


def _storage_dtype(like: Tensor) -> torch.dtype:
    """fp16 gradients wait for the upstream gradient, often a loss scale of 65,536, in fp32."""
    return torch.float32 if like.dtype == torch.float16 else like.dtype


def _times_upstream(g: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """g (R, ...) times a scalar or (R,) in the precision of ``grad``, rounded once: an upstream gradient rounded to
    bf16 would be off by up to 0.2 % in every entry alike."""
    grad = grad.reshape(-1, *(1,) * (g.dim() - 1))
    return torch.mul(g, grad, out=torch.empty_like(g, dtype=dtype))


def _rerun(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    student_hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, rows, weights = ctx.saved_tensors
    problem = replace(
        ctx.problem,
        student_hidden=student_hidden,
        head=Head(weight, bias),
        teacher_hidden=teacher_hidden,
        teacher_head=None if teacher_weight is None else Head(teacher_weight, teacher_bias),
    )
    # As above: a NaN upstream of a dropped row, also one that the hook dropped, reaches nothing.
    upstream = (weights * grad.masked_fill(weights == 0, 0.0))[rows]
    result = run(problem, rows, upstream, None, ctx.wanted)
    found = (result.grad_hidden, result.grad_weight, result.grad_bias)
    kinds = (student_hidden, weight, bias)
    return tuple(None if g is None else g.to(like.dtype) for g, like in zip(found, kinds, strict=True))
