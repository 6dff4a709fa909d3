"""The three matrix products of a chunk, each accumulated into fp32 (fp64 for fp64 operands).

On CUDA the operands stay in the input dtype and cuBLAS writes fp32 (``out_dtype``). A CPU GEMM of torch rounds the
output of bf16 operands to bf16: a relative L1 error in dH of 1.9e-2 against fp64 where fp32 logits give 1.8e-3 (error
columns of benchmarks/bench_kernel.py). MKL, which torch's x86 wheels carry and export, has the product we want: bf16
operands, fp32 accumulation and output, on AMX where the processor has it. One core of a Xeon with AMX, (512, 512) x
(32,768, 512): 370 GFLOP/s for the logits, 670 for dH and 790 for dW; fp32 operands 150 each; torch's bf16 product 1,000
and 750, but 300 for dW, which it cannot accumulate. Without AMX the logits and dW have products of our
own (csrc/cpu/avx512_bf16.cpp). Other CPU builds, and fp16, upcast the operands, UPCAST_ROWS of the vocabulary at a
time.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from hsd_kernels.rows import cpp

UPCAST_ROWS = 8192
_ROW_MAJOR, _NO_TRANS, _TRANS = 101, 111, 112  # CBLAS's names for them


def project_out(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = hidden @ weight.T: (n, D), (V, D) -> (n, V)."""
    if hidden.dtype == out.dtype:
        torch.mm(hidden, weight.t(), out=out)
    elif hidden.is_cuda:
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
    elif vdpbf16ps_takes(hidden, weight, out):
        _own_product("hsd_cpu_project_out", hidden, weight, out, weight.shape)
    elif mkl_takes(hidden, weight, out):
        _mkl_gemm(hidden, weight, out, trans_b=True)
    else:
        hidden = hidden.to(out.dtype)
        for v in range(0, weight.shape[0], UPCAST_ROWS):
            out[:, v : v + UPCAST_ROWS] = hidden @ weight[v : v + UPCAST_ROWS].to(out.dtype).t()


def backproject(dz: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """dz @ weight: (n, V), (V, D) -> (n, D), rounded once to ``dtype``."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    if weight.dtype == wide or (dz.dtype == dtype and torch_leads(dz)):
        return torch.mm(dz, weight)
    if dz.is_cuda:
        return torch.mm(dz, weight, out_dtype=wide).to(dtype)
    out = dz.new_zeros(dz.shape[0], weight.shape[1], dtype=wide)
    if mkl_takes(dz, weight, out):
        _mkl_gemm(dz, weight, out)
        return out.to(dtype)
    for v in range(0, weight.shape[0], UPCAST_ROWS):
        out.addmm_(dz[:, v : v + UPCAST_ROWS].to(wide), weight[v : v + UPCAST_ROWS].to(wide))
    return out.to(dtype)


def accumulate_(grad_weight: Tensor, dz: Tensor, hidden: Tensor, first: bool) -> None:
    """grad_weight += dz.T @ hidden: (V, D), (n, V), (n, D). With ``first``, = instead of +=: what grad_weight holds is
    not read. It is wide, but for a sum of one chunk, which may be rounded to the operands' dtype."""
    if dz.is_cuda and dz.dtype != grad_weight.dtype:
        if first:
            torch.mm(dz.t(), hidden, out_dtype=grad_weight.dtype, out=grad_weight)
        else:
            torch.addmm(grad_weight, dz.t(), hidden, out_dtype=grad_weight.dtype, out=grad_weight)
    elif vdpbf16ps_takes(dz, hidden, grad_weight):
        _own_product("hsd_cpu_accumulate", dz, hidden, grad_weight, grad_weight.shape, adds=not first)
    elif mkl_takes(dz, hidden, grad_weight):
        _mkl_gemm(dz, hidden, grad_weight, trans_a=True, beta=0.0 if first else 1.0)
    else:
        operands = (dz.t().to(grad_weight.dtype), hidden.to(grad_weight.dtype))
        torch.mm(*operands, out=grad_weight) if first else grad_weight.addmm_(*operands)


def gradient_dtype(operand: Tensor, wide: torch.dtype) -> torch.dtype:
    """Of dz: that of the other operand where a product takes both narrow, else ``wide``, that of the logits."""
    narrow = operand.dtype != wide and (
        operand.is_cuda or mkl_takes(operand, operand, operand.new_empty(0, 0, dtype=wide))
    )
    return operand.dtype if narrow else wide


def torch_leads(operand: Tensor) -> bool:
    """Whether torch's product of bf16 into bf16 is faster than MKL's into fp32. It accumulates in fp32 too, so it
    serves where the result is rounded to bf16 next: dH, and dW of a single chunk."""
    return operand.device.type == "cpu" and operand.dtype == torch.bfloat16 and _vdpbf16ps_without_amx()


@cache
def _vdpbf16ps_without_amx() -> bool:
    """Without AMX, MKL 2024 computes bf16 products at its fp32 speed: 85 GFLOP/s on one core of an EPYC with
    avx512_bf16 where torch's oneDNN takes 190 to 200, (256, 512) x (16,384, 512). But without that instruction too
    oneDNN falls to 35 (ONEDNN_MAX_CPU_ISA=AVX512_CORE there), and MKL leads."""
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    cpu = torch.cpu
    return cpu._is_avx512_bf16_supported() and not cpu._is_amx_tile_supported()  # pyright: ignore[reportPrivateUsage]


def mkl_takes(a: Tensor, b: Tensor, out: Tensor) -> bool:
    """Whether MKL computes this product: bf16 rows into fp32 on a CPU whose torch exports the routine."""
    return _bf16_into_fp32(a, b, out) and _mkl_routine() is not None


def vdpbf16ps_takes(a: Tensor, b: Tensor, out: Tensor) -> bool:
    """Whether our own products compute a @ b.T and a.T @ b: where MKL's are slow and the processor has the
    instruction. They take operands and sums below 2**-126 in magnitude as 0, as torch's bf16 product does there."""
    return _bf16_into_fp32(a, b, out) and _vdpbf16ps_without_amx() and _own_library() is not None


def _bf16_into_fp32(a: Tensor, b: Tensor, out: Tensor) -> bool:
    fits = a.device.type == "cpu" and a.dtype == b.dtype == torch.bfloat16 and out.dtype == torch.float32
    return fits and all(_rows_apart(t) for t in (a, b, out))


def _rows_apart(t: Tensor) -> bool:
    """Columns side by side and no row over another, as an expanded matrix has: MKL refuses those, and says so only by
    leaving the output as it was."""
    return t.stride(1) == 1 and (t.shape[0] == 1 or t.stride(0) >= t.shape[1])


def _mkl_gemm(a: Tensor, b: Tensor, out: Tensor, trans_a: bool = False, trans_b: bool = False, beta: float = 0.0):
    m, n = out.shape
    k = a.shape[0] if trans_a else a.shape[1]
    routine = _mkl_routine()
    assert routine is not None and b.shape == ((n, k) if trans_b else (k, n))
    flags = (_TRANS if trans_a else _NO_TRANS, _TRANS if trans_b else _NO_TRANS)
    a_at, b_at, out_at = ((t.data_ptr(), max(t.stride(0), t.shape[1])) for t in (a, b, out))
    routine(_ROW_MAJOR, *flags, m, n, k, 1.0, *a_at, *b_at, beta, *out_at)


@cache
def _mkl_routine():
    """``cblas_gemm_bf16bf16f32`` of the MKL inside torch's CPU library, None if this build has none."""
    try:
        routine = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).cblas_gemm_bf16bf16f32
    except (OSError, AttributeError):
        return None
    integer, real, pointer = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
    matrix = [pointer, integer]
    routine.argtypes = [integer] * 6 + [real, *matrix, *matrix, real, *matrix]
    routine.restype = None
    return routine


class _Product(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("a", "w", "out")),
        *((name, ctypes.c_int64) for name in ("a_stride", "w_stride", "out_stride", "rows", "vocab", "dim", "adds")),
    )


def _own_product(name: str, a: Tensor, w: Tensor, out: Tensor, head: torch.Size, adds: bool = False) -> None:
    library = _own_library()
    assert library is not None
    pointers, strides = [t.data_ptr() for t in (a, w, out)], [t.stride(0) for t in (a, w, out)]
    product = _Product(*pointers, *strides, a.shape[0], *head, adds)
    status = getattr(library, name)(torch.get_num_threads(), ctypes.byref(product))
    assert status == 0  # the routine is there where the machine runs it


def _own_library() -> ctypes.CDLL | None:
    """The C++ library, None where it is not built, is broken or finds no avx512_bf16."""
    library = cpp.found()
    return library if library is not None and library.hsd_cpu_has_products() else None
