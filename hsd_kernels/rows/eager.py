"""Row backend in plain PyTorch: any device, fp32, bf16 or fp64 logits. Mathematics: `hsd_kernels.divergence`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hsd_kernels.divergence import RowSpec
from hsd_kernels.op_support import times, wide_dtype
from hsd_kernels.row_stats import COLUMNS, RowStats

# Temporaries of (rows, V) stay in the last-level cache of a CPU at this size; a GPU wants fewer, larger launches.
BLOCK_BYTES = {"cpu": 4 << 20}
DEFAULT_BLOCK_BYTES = 256 << 20
# The top of a row without mass: finite, since -inf - -inf is NaN.
LOWEST = -3.0e38


def statistics(
    x_student: Tensor,
    x_teacher: Tensor,
    spec: RowSpec,
    bias: Tensor | None,
    teacher_bias: Tensor | None,
    target_ids: Tensor | None,
    rows: Tensor,
) -> RowStats:
    table = x_student.new_empty(len(COLUMNS), x_student.shape[0], dtype=wide_dtype(x_student))
    out = RowStats.unstack(table, rows, with_targets=target_ids is not None)
    kappa = spec.scales[1]
    for at in blocks(x_student):
        y_s, y_t = pair(x_student[at], x_teacher[at], spec, bias, teacher_bias)
        student, teacher = normalizer(y_s, kappa), normalizer(y_t, kappa)
        ls, lt = student.log_probs(y_s, kappa), teacher.log_probs(y_t, kappa)
        ps, pt = ls.exp(), lt.exp()
        out.kl[at], out.grad_sum[at] = totals(spec, *summands(spec, ls, lt, ps, pt), ps, pt)
        out.student_entropy[at] = -times(ps, ls).sum(-1)
        out.teacher_entropy[at] = -times(pt, lt).sum(-1)
        out.student_top[at], out.student_log_sum[at] = student
        out.teacher_top[at], out.teacher_log_sum[at] = teacher
        if target_ids is not None:
            assert out.student_logps is not None and out.teacher_logps is not None
            ids = target_ids[at].unsqueeze(-1)
            out.student_logps[at] = ls.gather(-1, ids).squeeze(-1)
            out.teacher_logps[at] = lt.gather(-1, ids).squeeze(-1)
    torch.add(out.student_log_sum, out.student_top, alpha=kappa, out=out.student_lse)
    torch.add(out.teacher_log_sum, out.teacher_top, alpha=kappa, out=out.teacher_lse)
    return out


def gradient_(
    x_student: Tensor,
    x_teacher: Tensor,
    spec: RowSpec,
    bias: Tensor | None,
    teacher_bias: Tensor | None,
    stats: RowStats,
    weights: Tensor,
    out: Tensor,
) -> None:
    kappa = spec.scales[1]
    for at in blocks(x_student):
        y_s, y_t = pair(x_student[at], x_teacher[at], spec, bias, teacher_bias)
        student, teacher = _normalizers(stats, at)
        ls, lt = student.log_probs(y_s, kappa), teacher.log_probs(y_t, kappa)
        ps = ls.exp()
        dz = through_softmax(spec, summands(spec, ls, lt, ps, lt.exp())[1], ps, stats.grad_sum[at])
        dz *= (weights[at] * spec.chain).unsqueeze(-1)
        if spec.softcap is not None:
            dz *= 1.0 - y_s.square()
        dz.masked_fill_((weights[at] == 0).unsqueeze(-1), 0.0)
        out[at] = dz


def summand_sums(
    x_student: Tensor,
    x_teacher: Tensor,
    spec: RowSpec,
    bias: Tensor | None,
    teacher_bias: Tensor | None,
    stats: RowStats,
) -> Tensor:
    """(3, C): sums of f, g and ps over these columns, given the normalizers of the whole rows."""
    sums = stats.kl.new_empty(3, x_student.shape[0])
    kappa = spec.scales[1]
    for at in blocks(x_student):
        y_s, y_t = pair(x_student[at], x_teacher[at], spec, bias, teacher_bias)
        student, teacher = _normalizers(stats, at)
        ls, lt = student.log_probs(y_s, kappa), teacher.log_probs(y_t, kappa)
        ps = ls.exp()
        f, g = summands(spec, ls, lt, ps, lt.exp())
        sums[:, at] = torch.stack([f.sum(-1), g.sum(-1), ps.sum(-1)])
    return sums


class Normalizer(NamedTuple):
    """Of rows y: log p = kappa (y - top) - log_sum. The difference is exact where p is large; kappa top + log_sum as
    one number would be rounded at its own size."""

    top: Tensor  # (C,)
    log_sum: Tensor  # (C,)

    def log_probs(self, y: Tensor, kappa: float) -> Tensor:
        return (y - self.top.unsqueeze(-1)).mul_(kappa) - self.log_sum.unsqueeze(-1)


def normalizer(y: Tensor, kappa: float) -> Normalizer:
    highest = y.max(-1, keepdim=True)
    top = highest.values.clamp_min(LOWEST)
    e = (y - top).mul_(kappa).exp_()
    # 1, 0 in a row without mass, NaN in a row with one. Apart from the rest: 1 + 1e-8 is 1 in fp32.
    of_top = e.gather(-1, highest.indices)
    rest = e.scatter_(-1, highest.indices, 0.0).sum(-1, keepdim=True)
    return Normalizer(top.squeeze(-1), torch.log1p(rest + (of_top - 1.0)).squeeze(-1))


def _normalizers(stats: RowStats, at: slice) -> tuple[Normalizer, Normalizer]:
    student = Normalizer(stats.student_top[at], stats.student_log_sum[at])
    return student, Normalizer(stats.teacher_top[at], stats.teacher_log_sum[at])


def summands(spec: RowSpec, ls: Tensor, lt: Tensor, ps: Tensor, pt: Tensor) -> tuple[Tensor, Tensor]:
    """(f, g) of the table in `divergence`."""
    if (log_floor := spec.divergence.log_floor) is not None:
        lt = torch.maximum(lt, ls + log_floor)
        pt = lt.exp()
    if spec.divergence.kind == "forward_kl":
        f, g, clipped_g = times(pt, lt - ls), ps - pt, ps
    elif spec.divergence.kind == "reverse_kl":
        f = g = times(ps, ls - lt)
        clipped_g = -ps
    else:
        d = lt - ls
        over_s = torch.log1p(spec.divergence.beta * torch.expm1(d))  # lm - ls, for d <= 0
        over_t = torch.log1p((1.0 - spec.divergence.beta) * torch.expm1(-d))  # lm - lt, for d > 0
        s_minus_m = torch.where(d > 0, -d - over_t, -over_s)
        t_minus_m = torch.where(d > 0, -over_t, d - over_s)
        g = (1.0 - spec.divergence.beta) * times(ps, s_minus_m)
        f = g + spec.divergence.beta * times(pt, t_minus_m)
        clipped_g = torch.zeros_like(ps)
    if spec.divergence.clip is not None:
        if spec.divergence.clip_form == "nonnegative" and spec.divergence.kind != "jsd":
            f, clipped_g = f + (ps - pt if spec.divergence.kind == "forward_kl" else pt - ps), torch.zeros_like(ps)
        g = torch.where(f > spec.divergence.clip, clipped_g, g)  # a NaN is not clipped
        f = f.clamp_max(spec.divergence.clip)
    return f, g


def totals(spec: RowSpec, f: Tensor, g: Tensor, ps: Tensor, pt: Tensor) -> tuple[Tensor, Tensor]:
    """The divergence and G of rows."""
    # The rounding of a log-sum shifts a row's log-probs, and the sums of ps and pt are not quite 1. The shift is a
    # visible part of the gradient where one token has nearly all of ps, and of a KL near 0.
    sum_s, kl = ps.sum(-1), f.sum(-1)
    if not spec.divergence.sums_summands:
        sum_t = pt.sum(-1)
        shift = torch.log1p((sum_s - sum_t) / sum_t)
        kl += shift if spec.divergence.kind == "forward_kl" else -shift
    return kl, torch.zeros_like(kl) if _no_grad_sum(spec) else g.sum(-1) / sum_s


def through_softmax(spec: RowSpec, g: Tensor, ps: Tensor, grad_sum: Tensor) -> Tensor:
    """dz of log-probs whose gradient is g."""
    return g if _no_grad_sum(spec) else g - ps * grad_sum.unsqueeze(-1)


def _no_grad_sum(spec: RowSpec) -> bool:
    return spec.divergence.kind == "forward_kl" and not spec.divergence.sums_summands


def pair(
    x_student: Tensor, x_teacher: Tensor, spec: RowSpec, bias: Tensor | None, teacher_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y of both sides (`RowSpec.scales`)."""
    x_t = x_teacher.to(wide_dtype(x_teacher))
    x_s = x_student.to(x_t.dtype)
    return formed(x_s + x_t if spec.linear else x_s, bias, spec), formed(x_t, teacher_bias, spec)


def formed(x: Tensor, bias: Tensor | None, spec: RowSpec) -> Tensor:
    in_scale = spec.scales[0]
    x = x if bias is None else x + bias
    x = x if in_scale == 1.0 else x * in_scale
    return x if spec.softcap is None else torch.tanh(x)


def blocks(x: Tensor) -> Iterator[slice]:
    budget = BLOCK_BYTES.get(x.device.type, DEFAULT_BLOCK_BYTES)
    step = max(1, budget // (x.shape[1] * x.element_size()))
    for start in range(0, x.shape[0], step):
        yield slice(start, start + step)
