"""A vocabulary divided over a process group: each rank holds rows of the head, all hold the same hidden states.

Row statistics of the parts merge without another pass over the logits. With ``pi(r) = exp(lse_r - lse)`` the share of
part r in a distribution, taken from the parts' maxima and log-sums, the chain rule of the relative entropy gives

    KL(p || q) = sum_r pi_p(r) KL_r(p || q) + KL(pi_p || pi_q),        H(p) = sum_r pi_p(r) H_r(p) + H(pi_p),

so one all-gather of a table of `RowStats` is enough. The JSD, a pointwise clip and a floor do not decompose: their
summands are taken again with the merged normalisers (by the torch rows) and summed. Gathering, not reducing, makes the
result the same bits on every rank, in whatever order NCCL or gloo would add.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hsd_kernels.divergence import RowSpec
from hsd_kernels.op_support import times
from hsd_kernels.row_stats import RowStats


@dataclass(frozen=True)
class Shards:
    group: Any
    start: int  # of this rank's rows in the whole vocabulary
    vocab: int
    largest: int

    @staticmethod
    def agreed(group: Any, weight: Tensor, tokens: int) -> Shards:
        """The layout, the same on every rank. One collective and one host synchronization."""
        mine = torch.tensor([weight.shape[0], weight.shape[1], tokens], device=weight.device)
        sizes, dims, counts = (c.tolist() for c in gather(mine, group).unbind(1))
        for name, values in (("head.weight", dims), ("token_weights", counts)):
            if len(set(values)) > 1:
                what = "hidden sizes" if name == "head.weight" else "numbers of tokens of nonzero weight"
                raise ValueError(f"{name}: expected equal {what} on every rank of process_group, got {values}")
        if not min(sizes):
            raise ValueError(f"head.weight: expected rows on every rank of process_group, got {sizes}")
        rank = dist.get_rank(group)
        return Shards(group, sum(sizes[:rank]), sum(sizes), max(sizes))

    def sum_(self, t: Tensor) -> None:
        dist.all_reduce(t, group=self.group)

    def merge(
        self,
        stats: RowStats,
        spec: RowSpec,
        x_student: Tensor,
        x_teacher: Tensor,
        bias: Tensor | None,
        teacher_bias: Tensor | None,
    ) -> RowStats:
        """Statistics of whole rows from those of this rank's part of them."""
        table = gather(stats.stack(), self.group).transpose(0, 1)  # (columns, ranks, C)
        whole = merge_parts(RowStats.unstack(table, stats.rows, stats.student_logps is not None), spec)
        if spec.divergence.sums_summands:
            from hsd_kernels.rows.eager import summand_sums

            sums = summand_sums(x_student, x_teacher, spec, bias, teacher_bias, whole)
            kl, g, p = gather(sums, self.group).sum(0)
            whole = whole._replace(kl=kl, grad_sum=g / p)
        return whole


def merge_parts(parts: RowStats, spec: RowSpec) -> RowStats:
    """Statistics (R, C) of R parts of each row into those (C,) of whole rows. The KL of a part is that of its own two
    normalised halves; a log-prob is NaN where the part does not hold the target."""
    kappa = spec.scales[1]
    student = _merged(parts.student_top, parts.student_log_sum, kappa)
    teacher = _merged(parts.teacher_top, parts.teacher_log_sum, kappa)
    if spec.divergence.kind == "reverse_kl":
        kl = _chain(parts.kl, student, teacher)
        # As in the rows: G belongs to the rounded log-sums that the gradient will use.
        grad_sum = kl + student.lost - teacher.lost
    else:
        kl = _chain(parts.kl, teacher, student)
        grad_sum = torch.zeros_like(kl)
    found = RowStats(
        rows=parts.rows,
        kl=kl,
        student_logps=_of_owner(parts.student_logps, student),
        teacher_logps=_of_owner(parts.teacher_logps, teacher),
        student_entropy=times(student.pi, parts.student_entropy - student.log_pi).sum(0),
        teacher_entropy=times(teacher.pi, parts.teacher_entropy - teacher.log_pi).sum(0),
        student_lse=student.lse,
        teacher_lse=teacher.lse,
        student_top=student.top,
        teacher_top=teacher.top,
        student_log_sum=student.log_sum,
        teacher_log_sum=teacher.log_sum,
        grad_sum=grad_sum,
    )
    return RowStats.unstack(found.stack().to(parts.kl.dtype), parts.rows, parts.student_logps is not None)


class _Merged(NamedTuple):
    """One side's distribution over the parts, fp64."""

    top: Tensor  # (C,)
    log_sum: Tensor  # (C,), exact
    lost: Tensor  # (C,), what rounding to the statistics' dtype takes from log_sum
    lse: Tensor  # (C,)
    log_pi: Tensor  # (R, C)
    pi: Tensor


def _merged(top: Tensor, log_sum: Tensor, kappa: float) -> _Merged:
    whole_top = top.amax(0)
    masses = kappa * (top.double() - whole_top) + log_sum  # log of each part's mass, in units of exp(kappa whole_top)
    whole = torch.logsumexp(masses, 0)
    log_pi = masses - whole
    return _Merged(
        whole_top, whole, whole - whole.to(log_sum), kappa * whole_top.double() + whole, log_pi, log_pi.exp()
    )


def gather(t: Tensor, group: Any) -> Tensor:
    """(...) on each of R ranks -> (R, ...)."""
    parts = [torch.empty_like(t) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, t.contiguous(), group=group)
    return torch.stack(parts)


def _chain(kl: Tensor, p: _Merged, q: _Merged) -> Tensor:
    """Infinite where q has no mass in a part in which p has some, whatever that part's own KL says."""
    return times(p.pi, torch.where(q.log_pi == -torch.inf, torch.inf, kl + p.log_pi - q.log_pi)).sum(0)


def _of_owner(logps: Tensor | None, side: _Merged) -> Tensor | None:
    """The one that is not NaN; NaN if no part holds the target."""
    if logps is None:
        return None
    logps = logps + side.log_pi
    strange = logps.isnan()
    return logps.masked_fill(strange, 0.0).sum(0).masked_fill(strange.all(0), float("nan"))
