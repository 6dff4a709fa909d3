"""The three matrix products of a chunk, each accumulated into fp32 (fp64 for fp64 operands).

On CUDA the operands stay in the input dtype and cuBLAS writes fp32 (``out_dtype``). A CPU GEMM of torch rounds the
output of bf16 operands to bf16: a relative L1 error in dH of 1.9e-2 against fp64 where fp32 logits give 1.9e-3 ("naive"
in benchmarks/results/kernel_cpu.md). `plan` says who else computes bf16 operands into fp32. Where nobody does, and for
fp16, the operands are upcast, UPCAST_ROWS of the vocabulary at a time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from hsd_kernels import native
from hsd_kernels.op_support import in_dtype, rows_of, wide_dtype

HEAD_ROWS = 2048  # of W in one fp32 product of a CPU
DW_ROWS = 16384  # of dW in one bf16 product of a CPU
UPCAST_ROWS = 8192
UNSPLIT = 1 << 24  # elements of an output that has a tile for each multiprocessor, four times over
_ROW_MAJOR, _NO_TRANS, _TRANS = 101, 111, 112  # CBLAS's names for them

ProductName = Literal["logits", "dH", "dW"]
By = Literal["tiles", "vdpbf16ps", "mkl", "torch"]
BY: dict[By, str] = {
    "tiles": "AMX tiles of the C++ library, bf16 into fp32",
    "vdpbf16ps": "vdpbf16ps of the C++ library, bf16 into fp32",
    "mkl": "MKL's bf16 into fp32",
    "torch": "torch.mm, of operands upcast to fp32 where the result is not rounded to bf16 next",
}


@dataclass(frozen=True)
class Machine:
    """What multiplies bf16 here: the CPU's instructions, the C++ library's products and MKL's."""

    bf16: Literal["amx", "avx512", "none"]
    vdpbf16ps: bool  # of the C++ library
    tiles: bool  # of the C++ library
    mkl: bool


def plan(product: ProductName, a: Tensor, b: Tensor, out: torch.dtype, on: Machine | None = None) -> By:
    """Who computes a CPU product of the operands a and b into ``out``.

    Logits and dW: the C++ library's products, 1.7 to 2.5 times as fast as MKL's on AMX (csrc/cpu/amx_bf16.cpp,
    benchmarks/results/products_cpu_amx.md) and 2.3 times with AVX512_BF16 alone (csrc/cpu/avx512_bf16.cpp,
    products_cpu.md). They take operands and sums below 2**-126 in magnitude as 0, as torch's bf16 product does. dH is
    torch's where it is rounded to bf16 next. "mkl" is for dH in fp32, and where the C++ library was not built. Without
    bf16 instructions MKL is no faster than torch's fp32 product (products_cpu_no_bf16.md).
    """
    here = machine() if on is None else on
    on_cpu = a.device.type == "cpu" and a.dtype == b.dtype == torch.bfloat16
    if not on_cpu or here.bf16 == "none" or not (_rows_apart(a) and _rows_apart(b)):
        return "torch"
    if product == "dH":
        return "mkl" if here.mkl and out != torch.bfloat16 else "torch"
    if out != torch.float32:
        return "torch"
    if here.tiles and here.bf16 == "amx":
        return "tiles"
    if here.vdpbf16ps and here.bf16 == "avx512":
        return "vdpbf16ps"
    return "mkl" if here.mkl else "torch"


def project_out(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = hidden @ weight.T: (n, D), (V, D) -> (n, V)."""
    if hidden.dtype == out.dtype:
        # By parts of W, which MKL packs into the cache: a few hundred rows against all of W are slower, with AVX2 and
        # with AVX512. One call on a GPU.
        rows = max(1, len(weight)) if out.is_cuda else HEAD_ROWS
        for v in range(0, len(weight), rows):
            torch.mm(hidden, weight[v : v + rows].t(), out=out[:, v : v + rows])
        return
    if hidden.is_cuda:
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
        return
    by = plan("logits", hidden, weight, out.dtype)
    if by in ("tiles", "vdpbf16ps"):
        torch.ops.hsd_cpu.project_out(out, hidden, weight, tiles=by == "tiles", threads=torch.get_num_threads())
    elif by == "mkl":
        _mkl_gemm(hidden, weight, out, trans_b=True)
    else:
        hidden = hidden.to(out.dtype)
        for v in range(0, weight.shape[0], UPCAST_ROWS):
            out[:, v : v + UPCAST_ROWS] = hidden @ weight[v : v + UPCAST_ROWS].to(out.dtype).t()


def backproject(dz: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """dz @ weight: (n, V), (V, D) -> (n, D), rounded once to ``dtype``. Where rows of dz are apart, finite numbers lie
    between them: torch's product on AMX multiplies up to 31 of them by 0."""
    wide = wide_dtype(weight)
    if weight.dtype == wide:
        return torch.mm(dz, weight)
    if dz.is_cuda:
        return torch.mm(dz, weight, out_dtype=wide).to(dtype)
    if plan("dH", dz, weight, dtype) == "mkl":
        out = dz.new_zeros(dz.shape[0], weight.shape[1], dtype=wide)
        _mkl_gemm(dz, weight, out)
        return out.to(dtype)
    if dz.dtype == weight.dtype == dtype:  # accumulated in fp32, and rounded next in any case
        return torch.mm(dz, weight)
    out = dz.new_zeros(dz.shape[0], weight.shape[1], dtype=wide)
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
        return
    by = plan("dW", dz, hidden, grad_weight.dtype)
    if by in ("tiles", "vdpbf16ps"):
        how = {"tiles": by == "tiles", "threads": torch.get_num_threads()}
        torch.ops.hsd_cpu.accumulate(grad_weight, dz, hidden, adds=not first, **how)
    elif by == "mkl":
        _mkl_gemm(dz, hidden, grad_weight, trans_a=True, beta=0.0 if first else 1.0)
    else:
        # oneDNN's bf16 product into all of a large dW is slower than into its parts (AVX512_BF16).
        rows = DW_ROWS if dz.dtype == torch.bfloat16 else max(1, len(grad_weight))
        hidden = in_dtype(hidden, grad_weight.dtype)
        for v in range(0, len(grad_weight), rows):
            here = slice(v, v + rows)
            out, columns = rows_of(grad_weight, here), in_dtype(rows_of(dz.t(), here), grad_weight.dtype)
            torch.mm(columns, hidden, out=out) if first else out.addmm_(columns, hidden)


def gradient_dtype(operand: Tensor, wide: torch.dtype) -> torch.dtype:
    """Of dz: that of the other operand where a product takes both narrow, else ``wide``, that of the logits."""
    narrow = operand.dtype != wide and (operand.is_cuda or plan("dW", operand, operand, wide) != "torch")
    return operand.dtype if narrow else wide


def sums_narrow(weight: Tensor) -> bool:
    """Whether dW (V, D) of a single buffer is best rounded to bf16 by its product, which accumulates in fp32. cuBLAS
    splits a small one by rows, and may add up the parts in bf16."""
    if weight.dtype != torch.bfloat16:
        return False
    return weight.numel() >= UNSPLIT if weight.is_cuda else machine().bf16 != "none"


def machine() -> Machine:
    return _machine(native.find())


@cache
def _machine(library: Path | None) -> Machine:
    own = native.facts() if library is not None and native.available() else None
    vdpbf16ps, tiles = (own.has_products, own.has_tiles) if own is not None else (False, False)
    return Machine(_bf16_instructions(), vdpbf16ps, tiles, _mkl_routine() is not None)


@cache
def _bf16_instructions() -> Literal["amx", "avx512", "none"]:
    """Those that torch's oneDNN uses too, which ONEDNN_MAX_CPU_ISA may hide from it."""
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return "none"
    if torch.cpu._is_amx_tile_supported():  # pyright: ignore[reportPrivateUsage]
        return "amx"
    return "avx512" if torch.cpu._is_avx512_bf16_supported() else "none"  # pyright: ignore[reportPrivateUsage]


def _rows_apart(t: Tensor) -> bool:
    """Columns side by side and no row over another, as an expanded matrix has: MKL refuses those, and says so only by
    leaving the output as it was."""
    return t.stride(1) == 1 and (t.shape[0] == 1 or t.stride(0) >= t.shape[1])


def _mkl_gemm(a: Tensor, b: Tensor, out: Tensor, trans_a: bool = False, trans_b: bool = False, beta: float = 0.0):
    m, n = out.shape
    k = a.shape[0] if trans_a else a.shape[1]
    routine = _mkl_routine()
    assert routine is not None and b.shape == ((n, k) if trans_b else (k, n)) and _rows_apart(out)
    flags = (_TRANS if trans_a else _NO_TRANS, _TRANS if trans_b else _NO_TRANS)
    a_at, b_at, out_at = ((t.data_ptr(), max(t.stride(0), t.shape[1])) for t in (a, b, out))
    routine(_ROW_MAJOR, *flags, m, n, k, 1.0, *a_at, *b_at, beta, *out_at)


@cache
def _mkl_routine() -> Callable[..., None] | None:
    """MKL's ``cblas_gemm_bf16bf16f32``, which torch's x86 builds carry, export and do not promise. None, and so a plan
    of "torch", where this build has none or where it computes something else."""
    try:
        routine = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).cblas_gemm_bf16bf16f32
    except (OSError, AttributeError):
        return None
    integer, real, pointer = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
    matrix = [pointer, integer]
    routine.argtypes = [integer] * 6 + [real, *matrix, *matrix, real, *matrix]
    routine.restype = None
    # Whatever torch's default dtype and device are: the routine gets addresses.
    a, b = (torch.tensor(x, dtype=torch.bfloat16, device="cpu") for x in ([[2.0, 3.0]], [[5.0], [7.0]]))
    out = torch.ones(1, 1, dtype=torch.float32, device="cpu")
    routine(_ROW_MAJOR, _NO_TRANS, _NO_TRANS, 1, 1, 2, 1.0, a.data_ptr(), 2, b.data_ptr(), 1, 1.0, out.data_ptr(), 1)
    return routine if out.item() == 32.0 else None
