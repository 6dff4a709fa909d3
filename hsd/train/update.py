"""The objective over the hidden states of one batch of rollouts: divergence, reference term and policy gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hsd.policy.forward import FrozenStates
from hsd_kernels import Divergence, Head, HSDKLOutput, RowStats, fused_hsd_kl, fused_token_logps, fused_token_loss


@dataclass(frozen=True)
class Objective:
    """What is minimised, at one optimizer step. Names as in `hsd.HSDConfig`."""

    divergence: Divergence = field(default_factory=Divergence)
    divergence_coef: float = 1.0
    importance_cap: float | None = None
    reference_coef: float = 0.0
    reference_kl: str = "exact"
    policy_coef: float = 0.0
    # (advantages (B, T), log q(o_t) - log p(o_t) (B, T)) -> advantages (B, T)
    token_advantages: Callable[[Tensor, Tensor], Tensor] | None = None
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    sampling_temperature: float = 1.0
    chunk_bytes: int | None = None
    impl: str = "auto"


@dataclass(frozen=True)
class Targets:
    """The scored tokens of B rollouts, T at most.

    ``divergence_weights`` and ``policy_weights`` sum the token losses of the two kinds: a rollout whose teacher is
    shown nothing has weight 0 in the first.
    """

    ids: Tensor  # (B, T)
    divergence_weights: Tensor  # (B, T)
    policy_weights: Tensor  # (B, T)
    advantages: Tensor | None = None  # (B,)
    old_logps: Tensor | None = None  # (B, T), of ``ids`` under the policy that sampled them

    def rows(self, index: Tensor) -> Targets:
        """Of some rollouts; the weights are kept, so that the losses of all parts add up."""
        some = [None if t is None else t[index] for t in (self.advantages, self.old_logps)]
        return Targets(self.ids[index], self.divergence_weights[index], self.policy_weights[index], *some)


@dataclass(frozen=True)
class LossOutput:
    loss: Tensor  # scalar, with gradient
    stats: RowStats  # of student and teacher, per token (B, T), detached
    reference: RowStats | None = None  # of student and reference policy, None without one


def rollout_weights(mask_BT: Tensor) -> Tensor:
    """(B, T): 1 / (B |o_i|) on the tokens of rollout i: the mean over a rollout's tokens, then over rollouts.

    A rollout with no token left (all masked) still counts in B, as a rollout of loss 0.
    """
    mask = mask_BT.float()
    return mask / mask.sum(-1, keepdim=True).clamp_min(1.0) / mask.shape[0]


def hsd_loss(
    student_hidden: Tensor,
    head: Head,
    teacher: FrozenStates,
    target_ids: Tensor,
    mask: Tensor,
    objective: Objective,
    reference: FrozenStates | None = None,
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
    return method_loss(student_hidden, head, teacher, reference, Targets(target_ids, weights, weights), objective)


def method_loss(
    student_hidden: Tensor,
    head: Head,
    teacher: FrozenStates,
    reference: FrozenStates | None,
    targets: Targets,
    objective: Objective,
) -> LossOutput:
    """``sum(w_d (divergence_coef L + reference_coef K)) + policy_coef sum(w_p S)``, each term where its coefficient
    is not 0.

    L is the divergence between teacher and student, K the KL(student || reference), S the clipped surrogate on
    GRPO's advantages, reshaped by ``objective.token_advantages`` where there is one. ``reference_kl="k3"`` replaces K
    by its sampled estimate, under w_p. The statistics are those of teacher and student whatever is minimised.
    ``student_hidden`` is (B, T, D), as in `hsd_loss`; weights and advantages are those of ``targets``.
    """
    o = objective
    if o.reference_coef != 0.0 and reference is None:
        raise ValueError(f"reference: expected hidden states with reference_coef={o.reference_coef}, got None")
    exact = reference if o.reference_coef != 0.0 and o.reference_kl == "exact" else None
    if o.divergence_coef > 0.0:
        out = _divergence(student_hidden, head, teacher, targets, o, o.divergence_coef, exact)
        loss = out.loss
    else:
        with torch.no_grad():
            out = _divergence(student_hidden.detach(), head, teacher, targets, o, 1.0, None)
        loss = student_hidden.new_zeros((), dtype=out.loss.dtype)
        if exact is not None:
            towards = Objective(Divergence("reverse_kl"), chunk_bytes=o.chunk_bytes, impl=o.impl)
            pulled = _divergence(student_hidden, head, exact, targets, towards, o.reference_coef, None)
            loss = pulled.loss
            out = out._replace(reference=pulled.stats)
    sampled = reference if o.reference_coef != 0.0 and o.reference_kl == "k3" else None
    if o.policy_coef > 0.0 or sampled is not None:
        loss = loss + _sampled_terms(student_hidden, head, out.stats, sampled, targets, o)
    if torch.is_grad_enabled() and not loss.requires_grad:  # every coefficient is 0 at this step of its schedule
        leaves = (student_hidden, head.weight, head.bias)
        loss = loss + 0.0 * sum(x.sum() for x in leaves if x is not None)
    return LossOutput(loss, out.stats, out.reference)


def _divergence(
    student_hidden: Tensor,
    head: Head,
    teacher: FrozenStates,
    t: Targets,
    o: Objective,
    coef: float,
    reference: FrozenStates | None,
) -> HSDKLOutput:
    """``sum(w_d (coef L + reference_coef K))`` in one fused pass."""
    out = fused_hsd_kl(
        student_hidden,
        teacher.hidden,
        head,
        divergence=o.divergence,
        teacher_head=teacher.head,
        reference_hidden=None if reference is None else reference.hidden,
        reference_head=None if reference is None else reference.head,
        reference_coef=0.0 if reference is None else o.reference_coef / coef,
        target_ids=t.ids,
        token_weights=t.divergence_weights * coef,
        token_weight_fn=_capped_ratio(t, o),
        reduction="sum",
        chunk_bytes=o.chunk_bytes,
        impl=o.impl,
        return_stats=True,
    )
    assert isinstance(out, HSDKLOutput)
    return out


def _capped_ratio(t: Targets, o: Objective) -> Callable[[RowStats], Tensor] | None:
    """min(pi / pi_old, cap). Rollouts of the current policy have a ratio of 1 and need no hook."""
    if t.old_logps is None or o.importance_cap is None:
        return None
    old, cap = t.old_logps.reshape(-1), o.importance_cap

    def ratio(stats: RowStats) -> Tensor:
        assert stats.student_logps is not None
        return (stats.student_logps - old[stats.rows]).exp().clamp_max(cap)

    return ratio


def _sampled_terms(
    student_hidden: Tensor, head: Head, stats: RowStats, reference: FrozenStates | None, t: Targets, o: Objective
) -> Tensor:
    """``sum(w_p (policy_coef S + reference_coef k3))``, each where its coefficient is not 0."""
    reference_logps = None
    if reference is not None:
        with torch.no_grad():
            reference_logps = fused_token_logps(
                reference.hidden,
                reference.head or head,
                t.ids,
                token_weights=t.policy_weights,
                temperature=o.sampling_temperature,
            )
    advantages = None
    if o.policy_coef > 0.0:
        if t.advantages is None:
            raise ValueError(f"advantages: expected a tensor with policy_coef={o.policy_coef}, got None")
        advantages = t.advantages.float().unsqueeze(-1).expand(t.ids.shape)
        if o.token_advantages is not None:
            assert stats.teacher_logps is not None and stats.student_logps is not None
            advantages = o.token_advantages(advantages, stats.teacher_logps - stats.student_logps)
        advantages = o.policy_coef * advantages
    return fused_token_loss(
        student_hidden,
        head,
        t.ids,
        advantages=advantages,
        old_logps=None if advantages is None else t.old_logps,
        epsilon_low=o.epsilon_low,
        epsilon_high=o.epsilon_high,
        reference_logps=reference_logps,
        reference_coef=0.0 if reference_logps is None else o.reference_coef,
        token_weights=t.policy_weights,
        temperature=o.sampling_temperature,
        reduction="sum",
    ).loss
