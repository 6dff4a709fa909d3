"""Row backend in plain PyTorch: any device, fp32, bf16 or fp64 logits. Mathematics: `hsd_kernels.divergence`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hsd_kernels.divergence import RowSpec, RowStats

# Temporaries of (rows, V) stay in the last-level cache of a CPU at this size; a GPU wants fewer, larger launches.
BLOCK_BYTES = {"cpu": 4 << 20}
DEFAULT_BLOCK_BYTES = 256 << 20


def statistics(
    x_student: Tensor,
    x_teacher: Tensor,
    spec: RowSpec,
    bias: Tensor | None,
    teacher_bias: Tensor | None,
    target_ids: Tensor | None,
    rows: Tensor,
) -> RowStats:
    n = x_student.shape[0]
    names = ("kl", "student_logps", "teacher_logps", "student_entropy", "teacher_entropy")
    names = (*names, "student_lse", "teacher_lse", "grad_sum")
    cols: dict[str, Any] = {name: x_student.new_empty(n, dtype=_wide(x_student)) for name in names}
    for at in _blocks(x_student):
        x_s, x_t = _pair(x_student[at], x_teacher[at], spec)
        z_s = _logits(_scaled(x_s, bias, spec), spec)
        z_t = _logits(_scaled(x_t, teacher_bias, spec), spec)
        lse_s, lse_t = torch.logsumexp(z_s, -1), torch.logsumexp(z_t, -1)
        ls, lt = z_s - lse_s.unsqueeze(-1), z_t - lse_t.unsqueeze(-1)
        ps, pt = ls.exp(), lt.exp()
        f, g = _summands(spec, ls, lt, ps, pt)
        # The rounding of lse shifts a row's log-probs, and the sums of ps and pt are not quite 1. That was 7 % of the
        # gradient where one token has nearly all of ps (jsd, temperature 0.1, fp32), and 0.4 % of a KL of 1e-4.
        sum_s, sum_t = ps.sum(-1), pt.sum(-1)
        kl = f.sum(-1)
        if spec.kl_clip is None and spec.divergence != "jsd":
            shift = torch.log1p((sum_s - sum_t) / sum_t)
            kl += shift if spec.divergence == "forward_kl" else -shift
        cols["kl"][at] = kl
        cols["grad_sum"][at] = 0.0 if _no_grad_sum(spec) else g.sum(-1) / sum_s
        cols["student_lse"][at], cols["teacher_lse"][at] = lse_s, lse_t
        cols["student_entropy"][at] = -_times(ps, ls).sum(-1)
        cols["teacher_entropy"][at] = -_times(pt, lt).sum(-1)
        if target_ids is not None:
            ids = target_ids[at].unsqueeze(-1)
            cols["student_logps"][at] = ls.gather(-1, ids).squeeze(-1)
            cols["teacher_logps"][at] = lt.gather(-1, ids).squeeze(-1)
    if target_ids is None:
        cols["student_logps"] = cols["teacher_logps"] = None
    return RowStats(rows=rows, **cols)


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
    for at in _blocks(x_student):
        x_s, x_t = _pair(x_student[at], x_teacher[at], spec)
        scaled = _scaled(x_s, bias, spec)
        ls = _logits(scaled, spec) - stats.student_lse[at].unsqueeze(-1)
        lt = _logits(_scaled(x_t, teacher_bias, spec), spec) - stats.teacher_lse[at].unsqueeze(-1)
        ps, pt = ls.exp(), lt.exp()
        _, g = _summands(spec, ls, lt, ps, pt)
        dz = g if _no_grad_sum(spec) else g - ps * stats.grad_sum[at].unsqueeze(-1)
        dz *= (weights[at] * (spec.logit_scale / spec.temperature)).unsqueeze(-1)
        if spec.softcap is not None:
            dz *= 1.0 - torch.tanh(scaled / spec.softcap).square()
        dz.masked_fill_((weights[at] == 0).unsqueeze(-1), 0.0)
        out[at] = dz


def summand_sums(
    x_student: Tensor,
    x_teacher: Tensor,
    spec: RowSpec,
    bias: Tensor | None,
    teacher_bias: Tensor | None,
    student_lse: Tensor,
    teacher_lse: Tensor,
) -> Tensor:
    """(3, C): sums of f, g and ps over these columns, given the normalisers of the whole rows."""
    sums = student_lse.new_empty(3, x_student.shape[0])
    for at in _blocks(x_student):
        x_s, x_t = _pair(x_student[at], x_teacher[at], spec)
        ls = _logits(_scaled(x_s, bias, spec), spec) - student_lse[at].unsqueeze(-1)
        lt = _logits(_scaled(x_t, teacher_bias, spec), spec) - teacher_lse[at].unsqueeze(-1)
        ps = ls.exp()
        f, g = _summands(spec, ls, lt, ps, lt.exp())
        sums[:, at] = torch.stack([f.sum(-1), g.sum(-1), ps.sum(-1)])
    return sums


def _summands(spec: RowSpec, ls: Tensor, lt: Tensor, ps: Tensor, pt: Tensor) -> tuple[Tensor, Tensor]:
    """(f, g) of the table in `divergence`."""
    if spec.divergence == "forward_kl":
        f, g, clipped_g = _times(pt, lt - ls), ps - pt, ps
    elif spec.divergence == "reverse_kl":
        f = g = _times(ps, ls - lt)
        clipped_g = -ps
    else:
        d = lt - ls
        over_s = torch.log1p(spec.beta * torch.expm1(d))  # lm - ls, for d <= 0
        over_t = torch.log1p((1.0 - spec.beta) * torch.expm1(-d))  # lm - lt, for d > 0
        s_minus_m = torch.where(d > 0, -d - over_t, -over_s)
        t_minus_m = torch.where(d > 0, -over_t, d - over_s)
        g = (1.0 - spec.beta) * _times(ps, s_minus_m)
        f = g + spec.beta * _times(pt, t_minus_m)
        clipped_g = torch.zeros_like(ps)
    if spec.kl_clip is not None:
        if spec.kl_clip_form == "nonnegative" and spec.divergence != "jsd":
            f, clipped_g = f + (ps - pt if spec.divergence == "forward_kl" else pt - ps), torch.zeros_like(ps)
        g = torch.where(f <= spec.kl_clip, g, clipped_g)
        f = f.clamp_max(spec.kl_clip)
    return f, g


def _no_grad_sum(spec: RowSpec) -> bool:
    return spec.divergence == "forward_kl" and spec.kl_clip is None


def _times(p: Tensor, log_ratio: Tensor) -> Tensor:
    """p * log_ratio with 0 log 0 = 0: a probability of exactly zero may meet an undefined ratio. A NaN stays."""
    return torch.where(p == 0, 0.0, p * log_ratio)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _pair(x_student: Tensor, x_teacher: Tensor, spec: RowSpec) -> tuple[Tensor, Tensor]:
    x_t = x_teacher.to(_wide(x_teacher))
    x_s = x_student.to(x_t.dtype)
    return (x_s + x_t if spec.linear else x_s), x_t


def _scaled(x: Tensor, bias: Tensor | None, spec: RowSpec) -> Tensor:
    x = x if bias is None else x + bias
    return x if spec.logit_scale == 1.0 else x * spec.logit_scale


def _logits(scaled: Tensor, spec: RowSpec) -> Tensor:
    z = scaled if spec.softcap is None else spec.softcap * torch.tanh(scaled / spec.softcap)
    return z if spec.temperature == 1.0 else z / spec.temperature


def _blocks(x: Tensor) -> Iterator[slice]:
    budget = BLOCK_BYTES.get(x.device.type, DEFAULT_BLOCK_BYTES)
    step = max(1, budget // (x.shape[1] * x.element_size()))
    for start in range(0, x.shape[0], step):
        yield slice(start, start + step)
