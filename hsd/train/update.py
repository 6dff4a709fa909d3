"""The objective over the hidden states of one batch of rollouts: divergence, reference term and policy gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hsd.methods.term import KINDS, TERMS, Stats, Term, active
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
    terms: tuple[Term, ...] = TERMS
    step: int = 0
    advantage_mix: float = 0.0
    settings: Mapping[str, Any] = field(default_factory=dict)
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    dual_clip: float | None = None
    sequence_ratio: bool = False  # one importance ratio a rollout, the geometric mean of its tokens' (GSPO)
    sampling_temperature: float = 1.0
    memory_bytes: int | None = None
    impl: str = "auto"
    rows: bool = False  # the terms over extra rows, in place of those over rollouts
    measure: bool = False  # student and teacher on the rollouts, also where no term reads them

    def active(self, kind: str) -> list[tuple[Term, float]]:
        outer = self.divergence_coef if kind == "divergence" else self.policy_coef
        return active(self.terms, kind, outer, self.step, rows=self.rows)

    def over_rows(self) -> Objective | None:
        """The terms over extra rows; None where none counts at this step."""
        there = replace(self, rows=True, reference_coef=0.0, importance_cap=None, measure=False)
        return there if there.active("divergence") or there.active("sampled") else None

    @property
    def reads_teacher(self) -> bool:
        """Whether the teacher counts at this step."""
        return self.measure or any(term.reads_teacher for kind in KINDS for term, _ in self.active(kind))

    @property
    def reads_rollouts(self) -> bool:
        """Whether the rollouts count at this step. Where all terms are over rollouts the student's pass is made anyway:
        engines expect a gradient of each weight."""
        counts = self.measure or self.reference_coef != 0.0 or any(map(self.active, KINDS))
        return counts or not any(term.rows for term in self.terms)


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
    columns: Mapping[str, Tensor] = field(default_factory=dict)  # of `Stats`: (B, 1), (B, T) or ()
    context_weights: Tensor | None = None  # (B, K) where there are K > 1 contexts

    def rows(self, index: Tensor) -> Targets:
        """Of some rollouts; the weights are kept, so that the losses of all parts add up."""
        tensors: dict[str, Any] = {name: t[index] for name, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **tensors, columns={n: t[index] if t.ndim else t for n, t in self.columns.items()})

    def of_context(self, k: int) -> Targets:
        """With the divergence's weights of the rollouts that have context ``k``."""
        if self.context_weights is None:
            return self
        return replace(self, divergence_weights=self.divergence_weights * self.context_weights[:, k : k + 1])

    def at(self, rows: Tensor) -> dict[str, Tensor]:
        """The columns (C,) of some tokens of the flat batch."""
        shape = self.ids.shape
        return {n: t.expand(shape).reshape(-1)[rows] if t.ndim else t for n, t in self.columns.items()}


@dataclass(frozen=True)
class LossOutput:
    loss: Tensor  # scalar, with gradient
    stats: RowStats | None  # of student and teacher, per token (B, T), detached; None without a teacher
    reference: RowStats | None = None  # of student and reference policy, None without one
    overlap: Mapping[str, Tensor] = field(default_factory=dict)  # `hsd.train.diagnostics.overlap`, where asked for


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
    return method_loss(student_hidden, head, (teacher,), reference, Targets(target_ids, weights, weights), objective)


def method_loss(
    student_hidden: Tensor,
    head: Head,
    teachers: Sequence[FrozenStates],
    reference: FrozenStates | None,
    targets: Targets,
    objective: Objective,
) -> LossOutput:
    """The sum of the objective's terms, and ``reference_coef sum(w_d K)``. By default the terms are
    ``divergence_coef sum(w_d L) + policy_coef sum(w_p S)``.

    L is the divergence between teacher and student, K the KL(student || reference), S the clipped surrogate on the
    advantages; `hsd.methods.term.Term` says what a method's own terms are. ``reference_kl="k3"`` replaces K by its
    sampled estimate, under w_p. A term whose coefficient is 0 is not computed. ``teachers`` are those of each context,
    none for a method without a teacher. ``student_hidden`` is (B, T, D), as in `hsd_loss`; weights and advantages are
    those of ``targets``.
    """
    o = objective
    if o.reference_coef != 0.0 and reference is None:
        raise ValueError(f"reference: expected hidden states with reference_coef={o.reference_coef}, got None")
    exact = reference if o.reference_coef != 0.0 and o.reference_kl == "exact" else None
    divergences = o.active("divergence") if teachers else []
    fused = next((d for d in divergences if not d[0].divergence and d[0].context == 0), None)
    out, loss, to_reference = None, None, None
    contexts = _other_contexts(student_hidden, head, teachers, targets, o)
    if fused is not None:
        out = _divergence(student_hidden, head, teachers[0], targets, o, *fused, exact, contexts)
        loss, to_reference = out.loss, out.reference
    else:
        if teachers:
            with torch.no_grad():
                out = _divergence(student_hidden.detach(), head, teachers[0], targets, o)
        dtype = torch.promote_types(torch.float32, student_hidden.dtype) if out is None else out.loss.dtype
        loss = student_hidden.new_zeros((), dtype=dtype)
        if exact is not None:
            towards = replace(o, divergence=Divergence("reverse_kl"), importance_cap=None)
            pulled = _divergence(student_hidden, head, exact, targets, towards, Term("divergence"), o.reference_coef)
            loss, to_reference = pulled.loss, pulled.stats
    for term, coef in divergences:
        if fused is None or term is not fused[0]:
            more = _divergence(student_hidden, head, teachers[term.context], targets, o, term, coef, None, contexts)
            loss = loss + more.loss
    stats = None if out is None else out.stats
    of_contexts = () if stats is None or not contexts else (stats, *contexts)
    sampled = reference if o.reference_coef != 0.0 and o.reference_kl == "k3" else None
    facts = _facts(o, stats, targets.columns, of_contexts)
    if o.active("advantage") or sampled is not None:
        loss = loss + _surrogate(student_hidden, head, facts, sampled, targets, o)
    if own := o.active("sampled"):
        logps = _logps(student_hidden, head, targets, o.divergence.temperature)
        for term, coef in own:
            assert term.fn is not None
            loss = loss + coef * (targets.policy_weights * term.fn(logps, facts)).sum()
    if torch.is_grad_enabled() and not loss.requires_grad:  # every coefficient is 0 at this step of its schedule
        loss = loss + zero_of(x for x in (student_hidden, head.weight, head.bias) if x is not None)
    return LossOutput(loss, stats, to_reference)


def zero_of(tensors: Iterable[Tensor]) -> Tensor:
    """0 that gives each tensor a gradient of zeros. In fp32: a sum beyond fp16's range times 0 is NaN."""
    return 0.0 * torch.stack([x.sum(dtype=torch.float32) for x in tensors]).sum()


def _facts(o: Objective, rows: RowStats | None, columns: Mapping[str, Tensor], contexts: Sequence[RowStats]) -> Stats:
    return Stats(rows, columns, o.settings, o.step, o.advantage_mix, tuple(contexts))


def _other_contexts(
    student_hidden: Tensor, head: Head, teachers: Sequence[FrozenStates], t: Targets, o: Objective
) -> tuple[RowStats, ...]:
    """The statistics of the second context and those after it."""
    with torch.no_grad():
        return tuple(
            _divergence(student_hidden.detach(), head, teacher, t, o, Term("divergence", context=k)).stats
            for k, teacher in enumerate(teachers)
            if k > 0
        )


def _divergence(
    student_hidden: Tensor,
    head: Head,
    teacher: FrozenStates,
    t: Targets,
    o: Objective,
    term: Term = TERMS[0],
    coef: float = 1.0,
    reference: FrozenStates | None = None,
    contexts: Sequence[RowStats] = (),
) -> HSDKLOutput:
    """``sum(w_d (coef L + reference_coef K))`` in one fused pass."""
    t = t.of_context(term.context)
    out = fused_hsd_kl(
        student_hidden,
        teacher.hidden,
        head,
        divergence=replace(o.divergence, **term.divergence),
        teacher_head=teacher.head,
        reference_hidden=None if reference is None else reference.hidden,
        reference_head=None if reference is None else reference.head,
        reference_coef=0.0 if reference is None else o.reference_coef / coef,
        target_ids=t.ids,
        token_weights=t.divergence_weights * coef,
        token_weight_fn=_weight_of_tokens(t, o, term, contexts),
        reduction="sum",
        memory_bytes=o.memory_bytes,
        impl=o.impl,
        return_stats=True,
    )
    assert isinstance(out, HSDKLOutput)
    return out


def _weight_of_tokens(
    t: Targets, o: Objective, term: Term, contexts: Sequence[RowStats]
) -> Callable[[RowStats], Tensor] | None:
    """min(pi / pi_old, cap) times the term's weight. Rollouts of the current policy have a ratio of 1: no hook."""
    ratio = _capped_ratio(t, o)
    if term.fn is None:
        return ratio
    fn = term.fn

    def weight(stats: RowStats) -> Tensor:
        some = tuple(_rows_at(table, stats.rows) for table in contexts)
        some = some and (stats, *some) if term.context == 0 else ()
        own = fn(_facts(o, stats, t.at(stats.rows), some)).to(stats.kl.dtype)
        return own if ratio is None else own * ratio(stats)

    return weight


def _rows_at(table: RowStats, rows: Tensor) -> RowStats:
    columns: list[Any] = [None if c is None else c.reshape(-1)[rows] for c in table]
    return RowStats(*columns)


def _capped_ratio(t: Targets, o: Objective) -> Callable[[RowStats], Tensor] | None:
    if t.old_logps is None or o.importance_cap is None:
        return None
    old, cap = t.old_logps.reshape(-1), o.importance_cap

    def ratio(stats: RowStats) -> Tensor:
        assert stats.student_logps is not None
        return (stats.student_logps - old[stats.rows]).exp().clamp_max(cap)

    return ratio


def _logps(hidden: Tensor, head: Head, t: Targets, temperature: float) -> Tensor:
    return fused_token_logps(hidden, head, t.ids, token_weights=t.policy_weights, temperature=temperature)


def _surrogate(
    student_hidden: Tensor, head: Head, facts: Stats, reference: FrozenStates | None, t: Targets, o: Objective
) -> Tensor:
    """``sum(w_p (S + reference_coef k3))``, S on the coefficients' sum of advantages, each where it is not 0."""
    reference_logps = None
    if reference is not None:
        with torch.no_grad():
            reference_logps = _logps(reference.hidden, reference.head or head, t, o.sampling_temperature)
    advantages = None
    for term, coef in o.active("advantage"):
        if t.advantages is None:
            raise ValueError(f"advantages: expected a tensor with policy_coef={o.policy_coef}, got None")
        plain = t.advantages.float().unsqueeze(-1).expand(t.ids.shape)
        own = coef * (plain if term.fn is None else term.fn(facts).expand(t.ids.shape))
        advantages = own if advantages is None else advantages + own
    if o.sequence_ratio and advantages is not None:
        logps = _logps(student_hidden, head, t, o.sampling_temperature)
        loss = (t.policy_weights * sequence_surrogate(logps, advantages, t, o)).sum()
        if reference_logps is None:
            return loss
        gap = reference_logps - logps
        return loss + o.reference_coef * (t.policy_weights * (torch.expm1(gap) - gap)).sum()
    return fused_token_loss(
        student_hidden,
        head,
        t.ids,
        advantages=advantages,
        old_logps=None if advantages is None else t.old_logps,
        epsilon_low=o.epsilon_low,
        epsilon_high=o.epsilon_high,
        dual_clip=None if advantages is None else o.dual_clip,
        reference_logps=reference_logps,
        reference_coef=0.0 if reference_logps is None else o.reference_coef,
        token_weights=t.policy_weights,
        temperature=o.sampling_temperature,
        reduction="sum",
    ).loss


def sequence_surrogate(logps: Tensor, advantages: Tensor, t: Targets, o: Objective) -> Tensor:
    """(B, T) of the clipped surrogate whose ratio is a rollout's, exp(mean_t (log p - log p_old)).

    Source: GSPO, arXiv 2507.18071, equations 5 and 7."""
    mask = (t.policy_weights != 0).to(logps.dtype)
    old = logps.detach() if t.old_logps is None else t.old_logps
    ratio = (((logps - old) * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp_min(1.0)).exp()
    bounded = ratio.clamp(1.0 - o.epsilon_low, 1.0 + o.epsilon_high)
    if o.dual_clip is not None:
        ratio = ratio.clamp_max(o.dual_clip)
    return -torch.minimum(ratio * advantages, bounded * advantages)
