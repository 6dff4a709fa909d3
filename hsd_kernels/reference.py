"""The law: the same losses in eager PyTorch on full logits, differentiated by autograd. Any device, fp64-capable.

Nothing optimized imports this module and it imports nothing optimized. It materializes (T, V) several times over.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor


def logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """``softcap * tanh(logit_scale * (h W^T + b) / softcap) / temperature``, shape (..., V)."""
    x = torch.nn.functional.linear(hidden, weight, bias) * logit_scale
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    return x / temperature


def per_token_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    kl_clip: float | None = None,
    kl_clip_form: str = "opsd",
) -> Tensor:
    """Divergence per token in nats, shape (...,), differentiable in the student's logits only.

    forward_kl = KL(teacher || student), reverse_kl = KL(student || teacher),
    jsd = beta KL(teacher || m) + (1 - beta) KL(student || m) with m = (1 - beta) student + beta teacher.
    """
    ls = torch.log_softmax(student_logits, -1)
    lt = torch.log_softmax(teacher_logits.detach(), -1)
    if divergence == "jsd" and beta in (0.0, 1.0):
        divergence = "forward_kl" if beta == 0.0 else "reverse_kl"
    if divergence == "forward_kl":
        terms = _kl_terms(lt, ls, kl_clip, kl_clip_form)
    elif divergence == "reverse_kl":
        terms = _kl_terms(ls, lt, kl_clip, kl_clip_form)
    elif divergence == "jsd":
        lm = torch.logaddexp(ls + math.log1p(-beta), lt + math.log(beta))
        terms = beta * _kl_terms(lt, lm) + (1.0 - beta) * _kl_terms(ls, lm)
    else:
        raise ValueError(f"divergence: expected forward_kl, reverse_kl or jsd, got {divergence!r}")
    if kl_clip is not None:
        terms = terms.clamp_max(kl_clip)
    return terms.sum(-1)


def hsd_kl(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    lm_head_weight: Tensor,
    bias: Tensor | None = None,
    *,
    teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    reference_hidden: Tensor | None = None,
    reference_weight: Tensor | None = None,
    reference_bias: Tensor | None = None,
    reference_coef: float = 0.0,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    kl_clip: float | None = None,
    kl_clip_form: str = "opsd",
    token_weights: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """The scalar (or, for reduction "none", per-token) loss of `hsd_kernels.fused_hsd_kl`, by definition."""
    raw = partial(logits, logit_scale=logit_scale, softcap=softcap)
    student = raw(student_hidden, lm_head_weight, bias, temperature=temperature)
    reference = None
    with torch.no_grad():
        own_head = teacher_weight is not None
        head = (teacher_weight, teacher_bias) if own_head else (lm_head_weight, bias)
        teacher = raw(teacher_hidden, *head, temperature=temperature)
        if reference_hidden is not None:
            head = (lm_head_weight, bias) if reference_weight is None else (reference_weight, reference_bias)
            reference = raw(reference_hidden, *head)
    per_token = per_token_divergence(student, teacher, divergence, beta, kl_clip, kl_clip_form)
    if reference is not None:  # the policy itself, so without the temperature
        per_token = per_token + reference_coef * per_token_divergence(student * temperature, reference, "reverse_kl")
    kept = torch.ones_like(per_token) if token_weights is None else token_weights
    # A row of weight 0 does not exist: NaN in it must not reach the sum.
    per_token = torch.where(kept != 0, per_token * kept, 0.0)
    if reduction == "none":
        return per_token
    if reduction == "sum":
        return per_token.sum()
    items = (kept != 0).sum().clamp(min=1) if num_items is None else num_items
    return per_token.sum() / items


def _kl_terms(log_p: Tensor, log_q: Tensor, clip: float | None = None, clip_form: str = "opsd") -> Tensor:
    p = log_p.exp()
    terms = torch.where(p == 0, 0.0, p * (log_p - log_q))
    if clip is not None and clip_form == "nonnegative":
        terms = terms - p + log_q.exp()
    return terms
