"""How many token rows are in memory at a time, and that memory.

Two levels: the logits of a chunk of rows, and the gradient dz of a buffer of several chunks. The logits of all sides
are made, read and forgotten chunk by chunk; the products with dz, which read and write all of dW, run once per buffer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

# With the fp32 sum of a head of 152,000 x 4,096, 3.1 GB above inputs and gradients (benchmarks/results/gpu_h100.md).
MEMORY_BYTES = {"cuda": 1640 << 20}
DEFAULT_MEMORY_BYTES = 704 << 20
# Token rows of logits at a time. On a GPU more only cost memory. On a CPU products with fewer rows are slow, and in
# bf16 those with 512 are slower again.
CHUNK_ROWS = {"cuda": 512}
DEFAULT_CHUNK_ROWS = 256
STATISTICS_ROWS = 1024  # at most, where there is no gradient
ROW_ALIGNMENT = 64  # elements: rows begin at a multiple of 16 bytes whatever V is, and cuBLAS keeps its aligned kernels
TILE_ROWS = 128  # of a product

# The last workspace of a CPU call, at most DEFAULT_MEMORY_BYTES: the system clears fresh pages, which costs a pass over
# them. CUDA's allocator keeps memory by itself.
_spare: list[Tensor] = []


@dataclass(frozen=True)
class Sizes:
    chunk: int  # token rows whose logits are there at a time
    buffer: int  # token rows whose dz is there at a time, at least `chunk`
    stride: int  # elements from row to row of either


def sizes(
    rows: int,
    vocab: int,
    device: str,
    logits_bytes: int,
    dz_bytes: int,
    budget: int | None = None,
    one_level: bool = False,
    sum_bytes: int = 0,
) -> Sizes:
    """Fills the budget: ``logits_bytes`` of all sides together and ``dz_bytes``, 0 without a gradient, per token and
    column. ``one_level``: a buffer is one chunk. At least one row of each, whatever the budget. ``sum_bytes``: what the
    wide sum of dW takes beyond its gradient. A single buffer makes no sum, and may fill that memory too."""
    stride = _up(vocab, ROW_ALIGNMENT)
    logits_row, dz_row = stride * logits_bytes, stride * dz_bytes
    budget = budget or MEMORY_BYTES.get(device, DEFAULT_MEMORY_BYTES)
    if one_level or dz_bytes == 0:
        most = max(1, budget // (logits_row + dz_row))
        chunk = _even(rows, most if one_level else min(most, STATISTICS_ROWS))
        return Sizes(chunk, chunk, stride)

    def buffer_beside(chunk: int) -> int:
        return max(chunk, (budget - chunk * logits_row) // dz_row)

    chunk = max(1, min(rows, CHUNK_ROWS.get(device, DEFAULT_CHUNK_ROWS)))
    while chunk > 1 and 2 * chunk * logits_row > budget:
        chunk //= 2

    def passes_over_dw(chunk: int) -> int:
        return 1 if rows <= buffer_beside(chunk) + sum_bytes // dz_row else -(-rows // buffer_beside(chunk))

    if device == "cuda":  # a CPU loses more by a shorter chunk than by a pass
        shorter = [part for part in (chunk * 3 // 4, chunk // 2) if part >= TILE_ROWS // 2]
        chunk = min((chunk, *shorter), key=passes_over_dw)  # the tallest that saves a pass
    buffer = rows if passes_over_dw(chunk) == 1 else _even(rows, buffer_beside(chunk))
    return Sizes(_even(buffer, chunk), buffer, stride)


def _even(rows: int, most: int) -> int:
    """Parts of one size, at most ``most``: a small last one would waste its products. Of whole tiles where they fit."""
    part = -(-rows // max(1, -(-rows // most)))
    tiled = _up(part, TILE_ROWS)
    return max(1, min(tiled, rows) if part > TILE_ROWS and tiled <= most else part)


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


@contextmanager
def borrowed(
    tables: Sequence[tuple[int, torch.dtype]], columns: int, stride: int, device: torch.device
) -> Iterator[list[Tensor | None]]:
    """A (rows, columns) tensor for each (rows, dtype), its rows ``stride`` apart; None for no rows. On a CPU they lie
    in memory that is taken out of `_spare` while in use: calls may nest and threads may meet. Rows of bf16 have zeros
    between them there (`gemm.backproject`)."""
    if device.type != "cpu":
        made = [torch.empty(rows, stride, dtype=dtype, device=device) if rows else None for rows, dtype in tables]
        yield [t if t is None or stride == columns else t[:, :columns] for t in made]
        return
    size = sum(rows * stride * dtype.itemsize for rows, dtype in tables)
    try:
        memory = _spare.pop()
    except IndexError:
        memory = None
    if memory is None or memory.numel() < size:
        memory = torch.empty(size, dtype=torch.uint8, device="cpu")

    def over(start: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        place = (start // dtype.itemsize, (rows, columns), (stride, 1))
        return torch.empty(0, dtype=dtype, device="cpu").set_(memory.untyped_storage(), *place)  # pyright: ignore

    found: list[Tensor | None] = []
    start = 0
    for rows, dtype in tables:
        found.append(over(start, rows, columns, dtype) if rows else None)
        if rows and dtype == torch.bfloat16 and stride > columns:
            over(start + columns * dtype.itemsize, rows, stride - columns, dtype).zero_()
        start += rows * stride * dtype.itemsize
    yield found
    if memory.numel() <= DEFAULT_MEMORY_BYTES:
        _spare[:] = [memory]


def release_memory() -> None:
    """Give back what CPU calls keep for the next one: at most DEFAULT_MEMORY_BYTES."""
    _spare.clear()
