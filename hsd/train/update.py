"""The objective over hidden states for one batch of rollouts: divergence, reference term and policy gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hsd.methods import Method
from hsd.policy.body_and_head import Split, hidden_states
from hsd.sampled import clipped_surrogate, k3, sampled_logps, sampled_loss
from hsd_kernels import Divergence, Head, HSDKLOutput, RowStats, fused_hsd_kl


@dataclass(frozen=True)
class Objective:
    """What is minimised, at one optimizer step. Names as in `hsd_kernels.fused_hsd_kl` and `hsd.HSDConfig`."""

    divergence: Divergence = field(default_factory=Divergence)
    divergence_coef: float = 1.0
    importance_cap: float | None = None
    reference_coef: float = 0.0
    reference_kl: str = "exact"
    policy_coef: float = 0.0
    advantage_mix: float = 0.0
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    sampling_temperature: float = 1.0
    chunk_bytes: int | None = None
    impl: str = "auto"


@dataclass(frozen=True)
class Side:
    """A frozen policy's reading of the rollouts: hidden states (B, T, D), and its head if it is not the student's."""

    hidden: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None

    def own_head(self, student: Split) -> Head | None:
        """Its head, with the scale and cap of the student's; None where it is the student's."""
        return None if self.weight is None else Head(self.weight, self.bias, student.logit_scale, student.softcap)


def head_of(split: Split) -> Head:
    return Head(split.weight, split.bias, split.logit_scale, split.softcap)


@dataclass(frozen=True)
class Rollouts:
    """The scored tokens of a batch of rollouts, (B, T) unless said otherwise.

    ``divergence_weights`` and ``policy_weights`` sum the token losses of the two kinds: a rollout whose teacher is
    shown nothing has weight 0 in the first.
    """

    target_ids: Tensor
    divergence_weights: Tensor
    policy_weights: Tensor
    advantages: Tensor | None = None  # (B,)
    old_logps: Tensor | None = None

    def rows(self, index: Tensor) -> Rollouts:
        fields = (self.target_ids, self.divergence_weights, self.policy_weights, self.advantages, self.old_logps)
        return Rollouts(*(None if t is None else t[index] for t in fields))  # type: ignore[arg-type]


@dataclass(frozen=True)
class LossOutput:
    loss: Tensor  # scalar, with gradient
    stats: RowStats  # of student and teacher, per token (B, T), detached
    reference: RowStats | None = None  # of student and reference policy, None without one


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
    weights = rollout_weights(mask)
    return method_loss(student_hidden, head, teacher, reference, Rollouts(target_ids, weights, weights), objective)


def method_loss(
    student_hidden: Tensor,
    head: Split,
    teacher: Side,
    reference: Side | None,
    rollouts: Rollouts,
    objective: Objective,
    method: Method | None = None,
) -> LossOutput:
    """``sum(w_d (divergence_coef L + reference_coef K)) + policy_coef sum(w_p S)``, each term where its coefficient
    is not 0.

    L is the divergence between teacher and student, K the KL(student || reference), S the clipped surrogate on
    GRPO's advantages, reshaped by ``method.token_advantages`` where there is one. ``reference_kl="k3"`` replaces K by
    its sampled estimate, under w_p. The statistics are those of teacher and student whatever is minimised.
    """
    o, r = objective, rollouts
    if o.reference_coef != 0.0 and reference is None:
        raise ValueError(f"reference: expected hidden states with reference_coef={o.reference_coef}, got None")
    exact = reference if o.reference_coef != 0.0 and o.reference_kl == "exact" else None
    if o.divergence_coef > 0.0:
        out = _divergence(student_hidden, head, teacher, r, o, o.divergence_coef, exact)
        loss = out.loss
    else:
        with torch.no_grad():
            out = _divergence(student_hidden.detach(), head, teacher, r, o, 1.0, None)
        loss = student_hidden.new_zeros((), dtype=out.loss.dtype)
        if exact is not None:
            towards = Objective(divergence=Divergence("reverse_kl"), chunk_bytes=o.chunk_bytes, impl=o.impl)
            pulled = _divergence(student_hidden, head, exact, r, towards, o.reference_coef, None)
            loss = pulled.loss
            out = out._replace(reference=pulled.stats)
    sampled = o.reference_coef != 0.0 and o.reference_kl == "k3"
    if o.policy_coef > 0.0 or sampled:
        token_loss = _token_loss(out, head, reference if sampled else None, r, o, method)
        loss = (
            loss
            + sampled_loss(
                student_hidden, head, r.target_ids, r.policy_weights, token_loss, temperature=o.sampling_temperature
            )[0]
        )
    if torch.is_grad_enabled() and not loss.requires_grad:  # every coefficient is 0 at this step of its schedule
        leaves = (student_hidden, head.weight, head.bias)
        loss = loss + 0.0 * sum(x.sum() for x in leaves if x is not None)
    return LossOutput(loss, out.stats, out.reference)


def _divergence(
    student_hidden: Tensor,
    head: Split,
    teacher: Side,
    r: Rollouts,
    o: Objective,
    coef: float,
    reference: Side | None,
) -> HSDKLOutput:
    """``sum(w_d (coef L + reference_coef K))`` in one fused pass."""
    out = fused_hsd_kl(
        student_hidden,
        teacher.hidden,
        head_of(head),
        divergence=o.divergence,
        teacher_head=teacher.own_head(head),
        reference_hidden=None if reference is None else reference.hidden,
        reference_head=None if reference is None else reference.own_head(head),
        reference_coef=0.0 if reference is None else o.reference_coef / coef,
        target_ids=r.target_ids,
        token_weights=r.divergence_weights * coef,
        token_weight_fn=_capped_ratio(r, o),
        reduction="sum",
        chunk_bytes=o.chunk_bytes,
        impl=o.impl,
        return_stats=True,
    )
    assert isinstance(out, HSDKLOutput)
    return out


def _capped_ratio(r: Rollouts, o: Objective) -> Callable[[RowStats], Tensor] | None:
    """min(pi / pi_old, cap). Rollouts of the current policy have a ratio of 1 and need no hook."""
    if r.old_logps is None or o.importance_cap is None:
        return None
    old, cap = r.old_logps.reshape(-1), o.importance_cap

    def ratio(stats: RowStats) -> Tensor:
        assert stats.student_logps is not None
        return (stats.student_logps - old[stats.rows]).exp().clamp_max(cap)

    return ratio


def _token_loss(
    out: HSDKLOutput, head: Split, reference: Side | None, r: Rollouts, o: Objective, method: Method | None
) -> Callable[[Tensor, Tensor], Tensor]:
    reference_logps = None
    if reference is not None:
        reference_logps = sampled_logps(
            reference.hidden,
            reference.own_head(head) or head,
            r.target_ids,
            r.policy_weights,
            temperature=o.sampling_temperature,
        ).reshape(-1)
    advantages = None
    if o.policy_coef > 0.0:
        if r.advantages is None:
            raise ValueError(f"advantages: expected a tensor with policy_coef={o.policy_coef}, got None")
        advantages = r.advantages.float().unsqueeze(-1).expand(r.target_ids.shape)
        if method is not None and method.token_advantages is not None:
            assert out.stats.teacher_logps is not None and out.stats.student_logps is not None
            d = out.stats.teacher_logps - out.stats.student_logps
            advantages = method.token_advantages(advantages, d, o.advantage_mix)
        advantages = advantages.reshape(-1)
    old = None if r.old_logps is None else r.old_logps.reshape(-1)

    def token_loss(logps: Tensor, rows: Tensor) -> Tensor:
        total = torch.zeros_like(logps)
        if advantages is not None:
            before = None if old is None else old[rows]
            total = total + o.policy_coef * clipped_surrogate(
                logps, before, advantages[rows], o.epsilon_low, o.epsilon_high
            )
        if reference_logps is not None:
            total = total + o.reference_coef * k3(logps, reference_logps[rows])
        return total

    return token_loss


def read_rollouts(split: Split, input_ids: Tensor, attention_mask: Tensor, length: int) -> Tensor:
    """States (B, length, D) that predict the last ``length`` tokens of left-padded prompts followed by rollouts."""
    hidden = hidden_states(split.body, input_ids, attention_mask)[:, -(length + 1) : -1]
    # A body that normalises in fp32 may hand back a wider dtype than the head's; autocast settles it otherwise.
    autocast = torch.is_autocast_enabled(hidden.device.type)
    return hidden if autocast else hidden.to(split.weight.dtype)


def frozen_side(split: Split, hidden: Tensor) -> Side:
    """A side with its own, detached, head."""
    return Side(hidden, split.weight.detach(), None if split.bias is None else split.bias.detach())
