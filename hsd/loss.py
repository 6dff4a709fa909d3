"""The objective over hidden states: J of arXiv 2606.15576 for one batch of rollouts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hsd.body import Split, hidden_states
from hsd_kernels import HSDKLOutput, fused_hsd_kl


@dataclass(frozen=True)
class Objective:
    """What is minimised. Names as in `hsd_kernels.fused_hsd_kl`."""

    divergence: str = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0
    kl_clip: float | None = None
    reference_coef: float = 0.0
    chunk_bytes: int | None = None
    impl: str = "auto"


@dataclass(frozen=True)
class Side:
    """A frozen policy's reading of the rollouts: hidden states (B, T, D), and its head if it is not the student's."""

    hidden: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True)
class LossOutput:
    loss: Tensor  # scalar, with gradient
    stats: HSDKLOutput  # per token (B, T), detached


def rollout_weights(mask_BT: Tensor) -> Tensor:
    """1 / (B |o_i|) on the tokens of rollout i: the mean over a rollout's tokens, then over rollouts. A rollout with
    no token left (all masked) still counts in B, as a rollout of loss 0."""
    mask = mask_BT.float()
    return mask / mask.sum(-1, keepdim=True).clamp_min(1.0) / mask.shape[0]


def hsd_loss(
    student_hidden: Tensor,
    head: Split,
    teacher: Side,
    target_ids: Tensor,
    mask: Tensor,
    objective: Objective,
    reference: Side | None = None,
) -> LossOutput:
    """Mean over rollouts of the mean over tokens of the full-vocabulary divergence, plus the reference term.

    Equivalent, for the default objective, to::

        L = (p_teacher * (log p_teacher - log p_student)).sum(-1)               # (B, T), KL(teacher || student)
        K = (p_student * (log p_student - log p_reference)).sum(-1)             # KL(student || reference)
        loss = (((L + reference_coef * K) * mask).sum(-1) / mask.sum(-1)).mean()

    Args:
        student_hidden: (B, T, D), at the positions that predict ``target_ids`` (B, T); gets the gradient.
        mask: (B, T), 1 on the tokens of the rollout.
        reference: needed when ``objective.reference_coef`` is not 0.

    Nats. Source: arXiv 2606.15576, the objective J and its reference term.
    """
    if objective.reference_coef != 0.0 and reference is None:
        raise ValueError(f"reference: expected hidden states with reference_coef={objective.reference_coef}, got None")
    ref = reference if objective.reference_coef != 0.0 else None
    out = fused_hsd_kl(
        student_hidden,
        teacher.hidden,
        head.weight,
        head.bias,
        teacher_weight=teacher.weight,
        teacher_bias=teacher.bias,
        reference_hidden=None if ref is None else ref.hidden,
        reference_weight=None if ref is None else ref.weight,
        reference_bias=None if ref is None else ref.bias,
        reference_coef=objective.reference_coef,
        divergence=objective.divergence,
        beta=objective.beta,
        temperature=objective.temperature,
        kl_clip=objective.kl_clip,
        target_ids=target_ids,
        token_weights=rollout_weights(mask),
        reduction="sum",
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        chunk_bytes=objective.chunk_bytes,
        impl=objective.impl,
        return_stats=True,
    )
    assert isinstance(out, HSDKLOutput)
    return LossOutput(out.loss, out)


def read_rollouts(split: Split, input_ids: Tensor, attention_mask: Tensor, length: int) -> Tensor:
    """States (B, length, D) that predict the last ``length`` tokens of left-padded prompts followed by rollouts."""
    hidden = hidden_states(split.body, input_ids, attention_mask)[:, -(length + 1) : -1]
    # A body that normalises in fp32 may hand back a wider dtype than the head's; autocast settles it otherwise.
    autocast = torch.is_autocast_enabled(hidden.device.type)
    return hidden if autocast else hidden.to(split.weight.dtype)


def frozen_side(split: Split, hidden: Tensor) -> Side:
    """A side with its own, detached, head."""
    return Side(hidden, split.weight.detach(), None if split.bias is None else split.bias.detach())
