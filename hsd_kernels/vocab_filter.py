"""The active-vocabulary filter: which columns of dz the two backward GEMMs need.

On the prefix that a rollout shares with its peer the two sides nearly agree, and most columns of dz hold nothing that
survives rounding. Leaving them out costs a gather of the active rows of W and saves their share of 2U FLOPs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hsd_kernels import native
from hsd_kernels.op_support import wide_dtype

# The value of ``filter_eps`` that stands for "auto" below the public function: an operator's schema has no union type.
FILTER_AUTO = 0.0
# Rounding to nearest loses eps / 4 of a number's binade on average, E[1 / mantissa] = 1 / (2 ln 2) for mantissas of
# uniform logarithm: a share of 0.18 eps of the L1 mass. For bf16 that is 0.14 %, which is what the filter leaves out in
# benchmarks/results/filter_smollm2.md.
ROUNDING_SHARE = 0.18
BLOCK_ROWS = 32
# With more active columns than this share of the vocabulary the gathers may cost what the GEMMs save.
WORTHWHILE = 0.75


class Active(NamedTuple):
    columns: Tensor | None  # (A,) ascending, None: all of them
    dropped: Tensor  # scalar, L1 mass of dz in the columns left out
    total: Tensor  # scalar, L1 mass of dz


def active_columns(dz: Tensor, filter_eps: float, largest_weight: Tensor, dtype: torch.dtype) -> Active:
    """Columns of dz (n, V) to keep: those with an entry above ``filter_eps * largest_weight`` or, with FILTER_AUTO, all
    but the lightest whose L1 mass together is at most what rounding dz to ``dtype`` loses. A column that is not finite
    is always kept. One host synchronization."""
    vocab = dz.shape[1]
    mass, largest = column_norms(dz)
    total = mass.sum()
    if filter_eps == FILTER_AUTO:
        lightest, order = mass.sort()
        allowed = ROUNDING_SHARE * torch.finfo(dtype).eps * total
        dropped = (lightest.cumsum(0) <= allowed) & allowed.isfinite()
        keep = torch.ones_like(dropped).scatter_(0, order, ~dropped)
    else:
        keep = ~((largest <= filter_eps * largest_weight) & largest.isfinite())
    columns = keep.nonzero().squeeze(-1)
    if columns.numel() > WORTHWHILE * vocab:
        return Active(None, torch.zeros_like(total), total)
    return Active(columns, mass.masked_fill(keep, 0.0).sum(), total)


def column_norms(dz: Tensor) -> tuple[Tensor, Tensor]:
    """L1 norm, fp64, and largest magnitude, fp32 or fp64, of each column: (n, V) -> (V,), (V,). Speed:
    benchmarks/results/products_cpu.md."""
    wide = wide_dtype(dz)
    mass, largest = dz.new_zeros(dz.shape[1], dtype=torch.float64), dz.new_zeros(dz.shape[1], dtype=wide)
    if native.takes(dz):
        torch.ops.hsd_cpu.column_norms(mass, largest, dz, **native.run())
        return mass, largest
    # A CPU takes BLOCK_ROWS at a time, whose magnitudes stay in its cache.
    for block in dz.split(BLOCK_ROWS) if dz.device.type == "cpu" else (dz,):
        magnitude = block.abs()
        mass += magnitude.sum(0, dtype=wide)
        largest = torch.maximum(largest, magnitude.amax(0))
    return mass, largest


def take_columns_(dz: Tensor, columns: Tensor) -> Tensor:
    """dz[:, columns], ``columns`` ascending. In C++ at the head of dz's own rows, since fresh pages cost more than the
    gather (benchmarks/results/products_cpu.md)."""
    if not native.takes(dz):
        return dz.index_select(1, columns) if dz.dtype == torch.float32 else dz[:, columns]
    torch.ops.hsd_cpu.take_columns(dz, columns.contiguous(), threads=torch.get_num_threads())
    return dz[:, : columns.numel()]
