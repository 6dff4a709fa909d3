"""A vocabulary divided over a process group: each rank holds rows of the head, all hold the same hidden states.

Row statistics of the parts merge without another pass over the logits. With ``pi(r) = exp(lse_r - lse)`` the share of
part r in a distribution, the chain rule of the relative entropy gives

    KL(p || q) = sum_r pi_p(r) KL_r(p || q) + KL(pi_p || pi_q),        H(p) = sum_r pi_p(r) H_r(p) + H(pi_p),

so one all-gather of eight numbers per token and rank is enough. The JSD and a pointwise clip do not decompose: their
summands are taken again with the merged normalisers (by the torch rows) and summed. Gathering, not reducing, makes the
result the same bits on every rank, in whatever order NCCL or gloo would add.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hsd_kernels.divergence import RowSpec, RowStats


@dataclass(frozen=True)
class Shards:
    group: Any
    start: int  # of this rank's rows in the whole vocabulary
    vocab: int
    largest: int

    @staticmethod
    def meet(group: Any, weight: Tensor, tokens: int) -> Shards:
        """Agree on the layout. One collective and one host synchronization."""
        mine = torch.tensor([weight.shape[0], weight.shape[1], tokens], device=weight.device)
        sizes, dims, counts = (c.tolist() for c in gather(mine, group).unbind(1))
        for name, values in (("lm_head_weight", dims), ("token_weights", counts)):
            if len(set(values)) > 1:
                what = "hidden sizes" if name == "lm_head_weight" else "numbers of tokens of nonzero weight"
                raise ValueError(f"{name}: expected equal {what} on every rank of process_group, got {values}")
        if not min(sizes):
            raise ValueError(f"lm_head_weight: expected rows on every rank of process_group, got {sizes}")
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
        with_targets = stats.student_logps is not None
        zero = torch.zeros_like(stats.kl)
        parts = gather(torch.stack([zero if s is None else s for s in stats[1:]]), self.group)
        merged = merge_parts(parts, spec)
        if spec.divergence == "jsd" or spec.kl_clip is not None:
            from hsd_kernels.rows.torch import summand_sums

            sums = summand_sums(x_student, x_teacher, spec, bias, teacher_bias, *merged[5:7])
            merged[0], g, p = gather(sums, self.group).sum(0)
            merged[7] = g / p
        kl, student_logps, teacher_logps, *rest = merged
        if not with_targets:
            return RowStats(stats.rows, kl, None, None, *rest)
        return RowStats(stats.rows, kl, student_logps, teacher_logps, *rest)


def merge_parts(parts: Tensor, spec: RowSpec) -> list[Tensor]:
    """(R, 8, C) statistics of R parts of each row, in the order of RowStats, into eight of (C,). The KL of a part is
    that of its own two normalised halves; a log-prob is NaN where the part does not hold the target."""
    kl, logp_s, logp_t, ent_s, ent_t, lse_s, lse_t, _ = parts.unbind(1)
    whole_s, whole_t = torch.logsumexp(lse_s.double(), 0), torch.logsumexp(lse_t.double(), 0)
    log_s, log_t = lse_s - whole_s, lse_t - whole_t  # (R, C), log pi, fp64
    pi_s, pi_t = log_s.exp(), log_t.exp()

    rounded_s, rounded_t = whole_s.to(lse_s), whole_t.to(lse_t)
    if spec.divergence == "reverse_kl":
        total = _chain(kl, pi_s, log_s, log_t)
        # As in the rows: G belongs to the rounded normalisers that the gradient will use.
        merged_grad_sum = total + (whole_s - rounded_s) - (whole_t - rounded_t)
    else:
        total = _chain(kl, pi_t, log_t, log_s)
        merged_grad_sum = torch.zeros_like(total)
    found = [
        total,
        _of_owner(logp_s + log_s),
        _of_owner(logp_t + log_t),
        _times(pi_s, ent_s - log_s).sum(0),
        _times(pi_t, ent_t - log_t).sum(0),
        rounded_s,
        rounded_t,
        merged_grad_sum,
    ]
    return [t.to(parts.dtype) for t in found]


def gather(t: Tensor, group: Any) -> Tensor:
    """(...) on each of R ranks -> (R, ...)."""
    parts = [torch.empty_like(t) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, t.contiguous(), group=group)
    return torch.stack(parts)


def _chain(kl: Tensor, pi_p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Infinite where q has no mass in a part in which p has some, whatever that part's own KL says."""
    return _times(pi_p, torch.where(log_q == -torch.inf, torch.inf, kl + log_p - log_q)).sum(0)


def _of_owner(logps: Tensor) -> Tensor:
    """The one that is not NaN; NaN if no part holds the target."""
    strange = logps.isnan()
    return logps.masked_fill(strange, 0.0).sum(0).masked_fill(strange.all(0), float("nan"))


def _times(p: Tensor, log_ratio: Tensor) -> Tensor:
    return torch.where(p == 0, 0.0, p * log_ratio)
