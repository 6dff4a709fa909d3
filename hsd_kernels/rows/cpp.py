"""Row backend in C++ (csrc/cpu): CPU, fp32 or bf16 logits, fp32 arithmetic. Mathematics: `hsd_kernels.divergence`.

One shared library without torch headers, beside any torch version. It holds the row passes for AVX-512, for AVX2 with
FMA and for any machine, and runs the fastest that this machine has. Threads are those of `torch.get_num_threads()`;
a row's result does not depend on their number.
"""

from __future__ import annotations

import ctypes
import functools
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from hsd_kernels.divergence import DIVERGENCES, RowSpec
from hsd_kernels.row_stats import COLUMNS, RowStats

ABI = 5  # HSD_CPU_ABI in csrc/cpu/hsd_cpu.h
FOLDER = Path(__file__).parents[1]
BUILD = "python setup.py build_ext --inplace"
VARIANTS = ("baseline", "avx2", "avx512")
DTYPES = (torch.float32, torch.bfloat16)


class _Side(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("bias_is_bf16", ctypes.c_int64),
    )


class _Rows(ctypes.Structure):
    _fields_ = (
        ("student", _Side),
        ("teacher", _Side),
        ("rows", ctypes.c_int64),
        ("vocab", ctypes.c_int64),
        ("is_bf16", ctypes.c_int32),
        ("divergence", ctypes.c_int32),
        ("has_softcap", ctypes.c_int32),
        ("has_clip", ctypes.c_int32),
        ("is_nonnegative", ctypes.c_int32),
        ("is_linear", ctypes.c_int32),
        ("in_scale", ctypes.c_float),
        ("kappa", ctypes.c_float),
        ("beta", ctypes.c_float),
        ("clip", ctypes.c_float),
    )


class _Statistics(ctypes.Structure):
    _fields_ = (("targets", ctypes.c_void_p), *((name, ctypes.c_void_p) for name in COLUMNS))


class _Gradient(ctypes.Structure):
    _fields_ = (
        ("student_top", ctypes.c_void_p),
        ("teacher_top", ctypes.c_void_p),
        ("student_log_sum", ctypes.c_void_p),
        ("teacher_log_sum", ctypes.c_void_p),
        ("grad_sum", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("chain", ctypes.c_double),
        ("out", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("out_is_bf16", ctypes.c_int32),
    )


def find() -> Path | None:
    """The built library, None where there is none."""
    paths = (FOLDER / f"_cpu{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next((path for path in paths if path.exists()), None)


@functools.cache
def load(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
        abi = library.hsd_cpu_abi()
    except (OSError, AttributeError) as error:  # not a library that loads here, or another one
        raise RuntimeError(f"impl='cpp': expected a library that loads, got {error} ({path}); run `{BUILD}`") from error
    if abi != ABI:
        raise RuntimeError(f"impl='cpp': expected hsd_cpu_abi() to be {ABI}, got {abi} ({path}); run `{BUILD}`")
    return library


def library() -> ctypes.CDLL:
    """Raises ValueError where it was not built and RuntimeError where it was and is broken."""
    path = find()
    if path is None:
        raise ValueError(
            f"impl='cpp': expected the built library {FOLDER / '_cpu.*'}, got none; run `{BUILD}` in a checkout; a "
            "pure wheel has none, pip builds it from the sdist (HSD_BUILD_CPU=1)"
        )
    return load(path)


def found() -> ctypes.CDLL | None:
    """None where it was not built or is broken (`hsd_kernels.rows` warns of that)."""
    try:
        return library()
    except (ValueError, RuntimeError):
        return None


@functools.cache
def variant() -> int:
    """Index in VARIANTS of the fastest that this machine runs."""
    return library().hsd_cpu_best()


def statistics(
    x_student: Tensor,
    x_teacher: Tensor,
    spec: RowSpec,
    bias: Tensor | None,
    teacher_bias: Tensor | None,
    target_ids: Tensor | None,
    rows: Tensor,
) -> RowStats:
    problem, kept = _rows(x_student, x_teacher, spec, bias, teacher_bias)
    table = torch.empty(len(COLUMNS), x_student.shape[0], dtype=torch.float32)
    targets = None if target_ids is None else target_ids.long().contiguous()
    columns = {name: column.data_ptr() for name, column in zip(COLUMNS, table.unbind(0), strict=True)}
    pointers = _Statistics(targets=None if targets is None else targets.data_ptr(), **columns)
    _call("hsd_cpu_statistics", problem, pointers)
    del kept
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
    problem, kept = _rows(x_student, x_teacher, spec, bias, teacher_bias)
    _check_rows("out", out, x_student.shape)
    for name, x in (("x_student", x_student), ("x_teacher", x_teacher)):
        if not _may_be_written(out, x):
            raise ValueError(f"out: expected memory of its own or the rows of {name} from their start, got an overlap")
    per_row = {
        "student_top": stats.student_top,
        "teacher_top": stats.teacher_top,
        "student_log_sum": stats.student_log_sum,
        "teacher_log_sum": stats.teacher_log_sum,
        "grad_sum": stats.grad_sum,
        "weights": weights,
    }
    per_row = {name: t.to(torch.float32).contiguous() for name, t in per_row.items()}
    gradient = _Gradient(
        **{name: t.data_ptr() for name, t in per_row.items()},
        chain=spec.chain,
        out=out.data_ptr(),
        stride=out.stride(0),
        out_is_bf16=out.dtype == torch.bfloat16,
    )
    _call("hsd_cpu_gradient", problem, gradient)
    del kept, per_row


def _call(name: str, problem: _Rows, what: ctypes.Structure) -> None:
    threads = torch.get_num_threads()
    status = getattr(library(), name)(variant(), threads, ctypes.byref(problem), ctypes.byref(what))
    if status != 0:
        raise RuntimeError(f"{name}: expected a variant that this machine runs, got number {variant()}")


def _rows(
    x_student: Tensor, x_teacher: Tensor, spec: RowSpec, bias: Tensor | None, teacher_bias: Tensor | None
) -> tuple[_Rows, list[Tensor]]:
    """The problem as the library takes it, and tensors it points to that must live as long."""
    in_scale, kappa = spec.scales
    kept: list[Tensor] = []
    sides = []
    for name, x, b in (("x_student", x_student, bias), ("x_teacher", x_teacher, teacher_bias)):
        _check_rows(name, x, x_student.shape)
        if b is not None:
            b_name = "bias" if name == "x_student" else "teacher_bias"
            _check_dtype(b_name, b)
            if b.shape != x.shape[1:]:
                raise ValueError(f"impl='cpp': expected {b_name} of shape ({x.shape[1]},), got {tuple(b.shape)}")
            kept.append(b.contiguous())
        pointer = None if b is None else kept[-1].data_ptr()
        sides.append(_Side(x.data_ptr(), pointer, x.stride(0), b is not None and b.dtype == torch.bfloat16))
    if x_teacher.dtype != x_student.dtype:
        raise TypeError(
            f"impl='cpp': expected x_teacher in the dtype of x_student, {x_student.dtype}, got {x_teacher.dtype}"
        )
    d = spec.divergence
    flags = (spec.softcap is not None, d.clip is not None, d.clip_form == "nonnegative", spec.linear)
    bf16, kind = x_student.dtype == torch.bfloat16, DIVERGENCES.index(d.kind)
    return _Rows(*sides, *x_student.shape, bf16, kind, *flags, in_scale, kappa, d.beta, d.clip or 0.0), kept


def _check_dtype(name: str, t: Tensor) -> None:
    if t.device.type != "cpu":
        raise ValueError(f"impl='cpp': expected {name} on the CPU, got {t.device}")
    if t.dtype not in DTYPES:
        raise TypeError(f"impl='cpp': expected {name} in float32 or bfloat16, got {t.dtype}")


def _check_rows(name: str, x: Tensor, shape: torch.Size) -> None:
    _check_dtype(name, x)
    if x.dim() != 2 or x.shape != shape:
        raise ValueError(f"impl='cpp': expected {name} of shape {tuple(shape)}, got {tuple(x.shape)}")
    if x.shape[1] > 1 and x.stride(1) != 1:
        raise ValueError(f"impl='cpp': expected {name} with columns side by side, got strides {x.stride()}")


def _may_be_written(out: Tensor, x: Tensor) -> bool:
    """No memory in common, or each row of ``out`` at the head of that row of ``x`` and no wider. The library reads and
    writes a row in ascending order, so nothing is overwritten before it was read."""
    n, vocab = x.shape
    row_bytes, out_row_bytes = (vocab * t.element_size() for t in (x, out))
    step, out_step = (t.stride(0) * t.element_size() if n > 1 else 0 for t in (x, out))
    ahead = out.data_ptr() - x.data_ptr()
    if ahead >= (n - 1) * step + row_bytes or -ahead >= (n - 1) * out_step + out_row_bytes:
        return True
    if step != out_step:
        return False
    if ahead == 0:
        return out_row_bytes <= row_bytes
    # Rows of equal step side by side, as halves of wider rows are.
    return step > 0 and row_bytes <= ahead % step <= step - out_row_bytes
