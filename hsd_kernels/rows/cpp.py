"""Row backend in C++ (`hsd_kernels.native`): CPU, fp32 or bf16 logits, fp32 arithmetic. Mathematics:
`hsd_kernels.divergence`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hsd_kernels import native
from hsd_kernels.divergence import DIVERGENCES, RowSpec
from hsd_kernels.op_support import in_dtype
from hsd_kernels.row_stats import COLUMNS, RowStats


def statistics(
    x_student: Tensor,
    x_teacher: Tensor,
    spec: RowSpec,
    bias: Tensor | None,
    teacher_bias: Tensor | None,
    target_ids: Tensor | None,
    rows: Tensor,
) -> RowStats:
    table = x_student.new_empty(len(COLUMNS), x_student.shape[0], dtype=torch.float32)
    targets = None if target_ids is None else target_ids.long().contiguous()
    biases = (_contiguous(bias), _contiguous(teacher_bias))
    torch.ops.hsd_cpu.statistics(table, x_student, x_teacher, *biases, targets, **_form(spec), **native.run())
    return RowStats.unstack(table, rows, with_targets=target_ids is not None)


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
    biases = {"bias": _contiguous(bias), "teacher_bias": _contiguous(teacher_bias)}
    per_row = {
        "student_top": stats.student_top,
        "teacher_top": stats.teacher_top,
        "student_log_sum": stats.student_log_sum,
        "teacher_log_sum": stats.teacher_log_sum,
        "grad_sum": stats.grad_sum,
        "weights": weights,
    }
    per_row = {name: in_dtype(t, torch.float32).contiguous() for name, t in per_row.items()}
    form = _form(spec) | {"chain": spec.chain}
    torch.ops.hsd_cpu.gradient(out, x_student, x_teacher, **biases, **per_row, **form, **native.run())


def _form(spec: RowSpec) -> dict[str, Any]:
    d, (in_scale, kappa) = spec.divergence, spec.scales
    return {
        "divergence": DIVERGENCES.index(d.kind),
        "beta": d.beta,
        "clip": d.clip,
        "is_nonnegative": d.clip_form == "nonnegative",
        "log_floor": d.log_floor,
        "is_linear": spec.linear,
        "has_softcap": spec.softcap is not None,
        "in_scale": in_scale,
        "kappa": kappa,
    }


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()
