"""The definition: the losses in eager PyTorch on full logits, differentiated by autograd. Any device, fp64-capable.

Nothing optimized imports this module and it imports nothing optimized. It materializes (T, V) several times over.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hsd_kernels.divergence import Divergence
from hsd_kernels.head import Head


def logits(hidden: Tensor, head: Tensor | Head, temperature: float = 1.0) -> Tensor:
    """``softcap * tanh(logit_scale * (h W^T + b) / softcap) / temperature``, shape (..., V)."""
    head = head if isinstance(head, Head) else Head(head)
    x = torch.nn.functional.linear(hidden, head.weight, head.bias) * head.logit_scale
    if head.softcap is not None:
        x = head.softcap * torch.tanh(x / head.softcap)
    return x / temperature


def per_token_divergence(
    student_logits: Tensor, teacher_logits: Tensor, divergence: str | Divergence = "forward_kl"
) -> Tensor:
    """Divergence per token in nats, shape (...,), of logits that the temperature has divided; differentiable in the
    student's only. The equations are `Divergence`'s."""
    d = Divergence(divergence) if isinstance(divergence, str) else divergence
    ls = torch.log_softmax(student_logits, -1)
    lt = torch.log_softmax(teacher_logits.detach(), -1)
    if d.top_k is not None and d.top_k < ls.shape[-1]:
        ids = (ls.detach() if d.top_of == "student" else lt).topk(d.top_k, -1).indices
        ls, lt = _in_buckets(ls, ids, d.rest), _in_buckets(lt, ids, d.rest)
    if d.floor is not None:
        lt = torch.maximum(lt, ls.detach() + math.log(d.floor))
    if d.kind == "forward_kl" or (d.kind == "jsd" and d.beta == 0.0):
        terms = _kl_terms(lt, ls, d)
    elif d.kind == "reverse_kl" or (d.kind == "jsd" and d.beta == 1.0):
        terms = _kl_terms(ls, lt, d)
    else:
        nowhere = (ls == -math.inf) & (lt == -math.inf)  # autograd of logaddexp would find NaN
        ls_, lt_ = ls.masked_fill(nowhere, 0.0), lt.masked_fill(nowhere, 0.0)
        lm = torch.logaddexp(ls_ + math.log1p(-d.beta), lt_ + math.log(d.beta)).masked_fill(nowhere, -math.inf)
        plain = Divergence()
        terms = d.beta * _kl_terms(lt, lm, plain) + (1.0 - d.beta) * _kl_terms(ls, lm, plain)
    if d.clip is not None:
        terms = terms.clamp_max(d.clip)
    return terms.sum(-1)


def _in_buckets(logps: Tensor, ids: Tensor, rest: str) -> Tensor:
    """(..., k) renormalised, or (..., k + 1) with the log of the other tokens' mass."""
    kept = logps.gather(-1, ids)
    if rest == "renormalise":
        return kept - kept.logsumexp(-1, keepdim=True)
    return torch.cat([kept, logps.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)], -1)


def hsd_kl(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    head: Tensor | Head,
    *,
    divergence: str | Divergence = "forward_kl",
    teacher_head: Tensor | Head | None = None,
    reference_hidden: Tensor | None = None,
    reference_head: Tensor | Head | None = None,
    reference_coef: float = 0.0,
    token_weights: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | None = None,
) -> Tensor:
    """The scalar (or, for reduction "none", per-token) loss of `hsd_kernels.fused_hsd_kl`, by definition."""
    d = Divergence(divergence) if isinstance(divergence, str) else divergence
    own = head if isinstance(head, Head) else Head(head)

    def other(given: Tensor | Head | None) -> Head:
        return own if given is None else own.with_tensors(given, None) if isinstance(given, Tensor) else given

    student = logits(student_hidden, own, d.temperature)
    with torch.no_grad():
        teacher = logits(teacher_hidden, other(teacher_head), d.temperature)
        reference = None if reference_hidden is None else logits(reference_hidden, other(reference_head))
    per_token = per_token_divergence(student, teacher, d)
    if reference is not None:  # the policy itself, so without the temperature
        towards = per_token_divergence(student * d.temperature, reference, "reverse_kl")
        per_token = per_token + reference_coef * towards
    kept = torch.ones_like(per_token) if token_weights is None else token_weights
    # A row of weight 0 does not exist: NaN in it must not reach the sum.
    per_token = torch.where(kept != 0, per_token * kept, 0.0)
    if reduction == "none":
        return per_token
    if reduction == "sum":
        return per_token.sum()
    items = (kept != 0).sum().clamp(min=1) if num_items is None else num_items
    return per_token.sum() / items


def token_logps(hidden: Tensor, head: Tensor | Head, target_ids: Tensor, temperature: float = 1.0) -> Tensor:
    """log p(target_ids), shape (...)."""
    return logits(hidden, head, temperature).log_softmax(-1).gather(-1, target_ids.unsqueeze(-1)).squeeze(-1)


def token_loss(
    hidden: Tensor,
    head: Tensor | Head,
    target_ids: Tensor,
    *,
    advantages: Tensor | None = None,
    old_logps: Tensor | None = None,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    dual_clip: float | None = None,
    reference_logps: Tensor | None = None,
    reference_coef: float = 0.0,
    token_weights: Tensor | None = None,
    temperature: float = 1.0,
    reduction: str = "mean",
    num_items: float | None = None,
) -> Tensor:
    """The loss of `hsd_kernels.fused_token_loss`, by definition."""
    kept = torch.ones_like(target_ids, dtype=hidden.dtype) if token_weights is None else token_weights
    logps = token_logps(hidden, head, target_ids.where(kept != 0, 0), temperature)
    per_token = torch.zeros_like(logps)
    if advantages is not None:
        ratio = _bounded_exp(logps - (logps.detach() if old_logps is None else old_logps))
        clipped = ratio.clamp(1.0 - epsilon_low, 1.0 + epsilon_high)
        gain = torch.minimum(ratio * advantages, clipped * advantages)
        if dual_clip is not None:
            gain = torch.where(advantages < 0, torch.maximum(gain, dual_clip * advantages), gain)
        per_token = per_token - gain
    if reference_logps is not None:
        gap = reference_logps - logps
        per_token = per_token + reference_coef * (_bounded_exp(gap) - gap - 1.0)
    per_token = torch.where(kept != 0, per_token * kept, 0.0)
    if reduction == "none":
        return per_token
    items = (kept != 0).sum().clamp(min=1) if num_items is None else num_items
    return per_token.sum() / (1 if reduction == "sum" else items)


def _bounded_exp(x: Tensor) -> Tensor:
    """exp(x); from 20 on its tangent there."""
    return x.clamp_max(20.0).exp() * (1.0 + (x - 20.0).clamp_min(0.0))


def _kl_terms(log_p: Tensor, log_q: Tensor, d: Divergence) -> Tensor:
    p = log_p.exp()
    # 0 log 0 = 0, chosen before the product: after it autograd would still find 0 * inf.
    terms = p * (log_p - log_q).masked_fill(p == 0, 0.0)
    if d.clip is not None and d.clip_form == "nonnegative":
        terms = terms - p + log_q.exp()
    return terms
