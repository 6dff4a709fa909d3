"""top_k over the passes of any row backend. Mathematics: `hsd_kernels.divergence`.

The logits of the k tokens are taken out of their rows, -inf in their place, and put back. In between the backend's
statistics are those of the other tokens alone: not 1 minus the mass of the k tokens, which is rounded away where they
have nearly all of it. The divergence is one of (C, k + 1) numbers, and the whole row's normalizer and entropy follow
from them too. The tail's gradient is a multiple of its softmax: the backend's gradient of a KL from a teacher without
mass.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hsd_kernels.divergence import Divergence, RowSpec
from hsd_kernels.op_support import times, wide_dtype
from hsd_kernels.row_stats import COLUMNS, RowStats
from hsd_kernels.rows import eager


@dataclass(frozen=True)
class Buckets:
    """The passes of `hsd_kernels.rows` for a top_k below the vocabulary, of which ``backend`` makes those over the
    logits."""

    backend: ModuleType

    def statistics(self, *given: Any) -> RowStats:
        return self.statistics_and_gradient_(*given)

    def gradient_(
        self,
        x_student: Tensor,
        x_teacher: Tensor,
        spec: RowSpec,
        bias: Tensor | None,
        teacher_bias: Tensor | None,
        stats: RowStats,
        weights: Tensor,
        out: Tensor,
    ) -> None:
        """Compares again: ``stats`` does not hold the k tokens."""
        sides = (x_student, x_teacher, spec, bias, teacher_bias)
        self.statistics_and_gradient_(*sides, None, stats.rows, weights, out)

    def statistics_and_gradient_(
        self,
        x_student: Tensor,
        x_teacher: Tensor,
        spec: RowSpec,
        bias: Tensor | None,
        teacher_bias: Tensor | None,
        target_ids: Tensor | None,
        rows: Tensor,
        weights: Tensor | None = None,
        out: Tensor | None = None,
    ) -> RowStats:
        k = spec.divergence.top_k
        assert k is not None
        table = x_student.new_empty(len(COLUMNS), x_student.shape[0], dtype=wide_dtype(x_student))
        for at in _parts(x_student, spec, bias, teacher_bias):
            x_s, x_t = x_student[at], x_teacher[at]
            y_s, y_t = eager.pair(x_s, x_t, spec, bias, teacher_bias)
            ids = (y_s if spec.divergence.top_of == "student" else y_t).topk(k, -1).indices
            kept_s, kept_t = y_s.gather(-1, ids), y_t.gather(-1, ids)
            tail = self._tail(y_s, y_t, spec, ids, kept_s, kept_t, rows[at])
            targets = None if target_ids is None else target_ids[at].unsqueeze(-1).long()
            student = _row(y_s, kept_s, tail.student_top, tail.student_log_sum, tail.student_entropy, targets, spec)
            teacher = _row(y_t, kept_t, tail.teacher_top, tail.teacher_log_sum, tail.teacher_entropy, targets, spec)
            kl, grad_sum, dz = _compared(spec, student.buckets, teacher.buckets)
            table[:, at] = RowStats(
                rows=rows[at],
                kl=kl,
                student_logps=student.logps,
                teacher_logps=teacher.logps,
                student_entropy=student.entropy,
                teacher_entropy=teacher.entropy,
                student_lse=student.lse,
                teacher_lse=teacher.lse,
                student_top=student.top,
                teacher_top=teacher.top,
                student_log_sum=student.log_sum,
                teacher_log_sum=teacher.log_sum,
                grad_sum=grad_sum,
            ).stack()
            if weights is not None and out is not None:
                w, to = weights[at], out[at]
                self._write_tail(x_s, x_t, spec, bias, tail, dz[:, k:], w, to)
                dz = dz[:, :k] * (w * spec.chain).unsqueeze(-1)
                if spec.softcap is not None:
                    dz *= 1.0 - kept_s.square()
                dz.masked_fill_((w == 0).unsqueeze(-1), 0.0)
                to.scatter_(-1, ids, dz.to(to.dtype))
        return RowStats.unstack(table, rows, with_targets=target_ids is not None)

    def _tail(
        self, y_s: Tensor, y_t: Tensor, spec: RowSpec, ids: Tensor, kept_s: Tensor, kept_t: Tensor, rows: Tensor
    ) -> RowStats:
        """Statistics of all tokens but ``ids``."""
        for y in (y_s, y_t):
            y.scatter_(-1, ids, -math.inf)
        found = self.backend.statistics(
            y_s, y_t, RowSpec(Divergence(), logit_scale=spec.scales[1]), None, None, None, rows
        )
        for y, kept in ((y_s, kept_s), (y_t, kept_t)):  # y may be the logits themselves
            y.scatter_(-1, ids, kept)
        return found

    def _write_tail(
        self,
        x_s: Tensor,
        x_t: Tensor,
        spec: RowSpec,
        bias: Tensor | None,
        tail: RowStats,
        dz: Tensor,
        weights: Tensor,
        out: Tensor,
    ) -> None:
        """``weights * dz`` (C, 1), spread over all tokens as the tail's probabilities are; zeros without a tail."""
        if dz.shape[-1] == 0:
            out.zero_()
            return
        # A tail without mass has none to move. A row of weight 0 stays one.
        empty = (weights == 0) | (tail.student_log_sum == -math.inf)
        weights = (weights * dz.squeeze(-1)).masked_fill(empty, 0.0)
        alone = tail._replace(
            teacher_top=tail.student_top, teacher_log_sum=torch.full_like(tail.student_log_sum, math.inf)
        )
        of_student = replace(spec, divergence=Divergence(temperature=spec.divergence.temperature))
        other = x_t if spec.linear else x_s  # which beside that log-sum has no probability, whatever it holds
        self.backend.gradient_(x_s, other, of_student, bias, bias, alone, weights, out)


def _parts(x: Tensor, spec: RowSpec, bias: Tensor | None, teacher_bias: Tensor | None) -> Iterable[slice]:
    """All rows where y is the logits themselves, else as many at a time as may be copied."""
    plain = spec.scales[0] == 1.0 and spec.softcap is None and not spec.linear and x.dtype == wide_dtype(x)
    return [slice(None)] if plain and bias is None and teacher_bias is None else eager.blocks(x)


class _Row(NamedTuple):
    """One side of whole rows: columns of `RowStats`, and the log-probs of the buckets."""

    logps: Tensor | None
    entropy: Tensor
    lse: Tensor
    top: Tensor
    log_sum: Tensor
    buckets: Tensor  # (C, k + 1), the tail last


def _row(
    y: Tensor,
    kept: Tensor,
    tail_top: Tensor,
    tail_log_sum: Tensor,
    tail_entropy: Tensor,
    targets: Tensor | None,
    spec: RowSpec,
) -> _Row:
    kappa = spec.scales[1]
    top = torch.maximum(kept.amax(-1), tail_top)
    tail = kappa * (tail_top - top) + tail_log_sum
    masses = torch.cat([kappa * (kept - top.unsqueeze(-1)), tail.unsqueeze(-1)], -1)  # logs, beside the top's mass
    among = eager.normalizer(masses, 1.0)
    logps = among.log_probs(masses, 1.0)
    p = logps.exp()
    entropy = times(p[:, -1], tail_entropy) - times(p, logps).sum(-1)
    whole = eager.Normalizer(top, among.top + among.log_sum)
    of_targets = None if targets is None else whole.log_probs(y.gather(-1, targets), kappa).squeeze(-1)
    return _Row(of_targets, entropy, kappa * top + whole.log_sum, top, whole.log_sum, logps)


def _compared(spec: RowSpec, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(divergence, G, dz (C, k + 1), or (C, k) where there is no tail) of log-probs (C, k + 1)."""
    if spec.divergence.rest == "renormalise":
        student, teacher = (x[:, :-1] - x[:, :-1].logsumexp(-1, keepdim=True) for x in (student, teacher))
    ps, pt = student.exp(), teacher.exp()
    f, g = eager.summands(spec, student, teacher, ps, pt)
    kl, grad_sum = eager.totals(spec, f, g, ps, pt)
    return kl, grad_sum, eager.through_softmax(spec, g, ps, grad_sum)
