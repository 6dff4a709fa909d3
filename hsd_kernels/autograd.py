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
            saved = (student_hidden, weight, bias, problem.teacher_hidden, rows, result.weights)
            ctx.problem = replace(problem, student_hidden=None, head=None, teacher_hidden=None)  # type: ignore[arg-type]
        else:
            grads = (result.grad_hidden, result.grad_weight, result.grad_bias)
            kinds = (student_hidden, weight, bias)
            saved = tuple(
                None if g is None or like is None else g.mul_(scale).to(like.dtype)
                for g, like in zip(grads, kinds, strict=True)
            )
        ctx.save_for_backward(*saved)
        ctx.rerun, ctx.per_token, ctx.wanted, ctx.scale = rerun, per_token, wanted, scale

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
            grad_hidden = ctx.saved_tensors[0]
            grads = (grad_hidden * grad.unsqueeze(-1).to(grad_hidden.dtype), None, None)
        else:
            grads = tuple(None if g is None else g * grad.to(g.dtype) for g in ctx.saved_tensors)
        return *grads, None, None, None, None, None, None


def _rerun(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    student_hidden, weight, bias, teacher_hidden, rows, weights = ctx.saved_tensors
    problem = replace(
        ctx.problem, student_hidden=student_hidden, head=Head(weight, bias), teacher_hidden=teacher_hidden
    )
    result = run(problem, rows, (weights * grad)[rows], None, ctx.wanted)
    found = (result.grad_hidden, result.grad_weight, result.grad_bias)
    kinds = (student_hidden, weight, bias)
    return tuple(None if g is None else g.to(like.dtype) for g, like in zip(found, kinds, strict=True))

