"""The time model of the fused loss on a GPU, and a table of it beside what was measured.

    python benchmarks/gpu_model.py [ROWS.jsonl ...]

The card's rates are those that part a measured in the same rows; without them, the ones of `CARDS`. A design is the
sizes and passes that the time depends on (`Design`). Per call of N tokens, hidden size D and vocabulary V, with
U = 2 N D V FLOPs and N V pairs of logits:

- logits: 2 U of arithmetic or the bytes they are written in, whichever takes longer;
- rows: bytes a pair over the bandwidth, or instructions over the issue rate: nothing overlaps them;
- dH: U of arithmetic over the share of the tiles' last wave that is filled;
- dW: U of arithmetic, or its fp32 sum read and written once a buffer, whichever takes longer; one buffer writes bf16;
- the gradient's pass by the upstream scale over dW, and the launches where the host is slower than the device.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suite import Row, load, markdown

from hsd_kernels import memory

REFERENCE = (32_768, 4096, 151_936)


@dataclass(frozen=True)
class Card:
    name: str
    flops: float  # a second, bf16
    bandwidth: float  # bytes a second, read and written
    processors: int = 132
    clock: float = 1.755e9
    launch: float = 5e-6  # seconds of the host

    @property
    def pairs(self) -> float:
        """Instructions a second: four schedulers a processor, 32 lanes each."""
        return self.processors * 4 * 32 * self.clock


@dataclass(frozen=True)
class Design:
    name: str
    chunk: int  # rows whose logits are there at a time
    buffer: int  # rows of dz that dH and dW take at once
    logit_bytes: int  # a pair, written by the product and read by a row pass
    reads: int  # row passes over the logits
    instructions: float  # a pair, all row passes together
    launches: int = 41  # a chunk
    overhead: int = 77  # launches a call


CARDS = {"H100": Card("H100", 789e12, 3.0e12), "H200": Card("H200", 789e12, 4.3e12)}
DESIGNS = (
    Design("fp32, two passes, chunks of 863 rows", 863, 863, 8, 2, 49 + 23),
    Design("bf16 linear, two passes, chunks of 1,727 rows", 1727, 1727, 4, 2, 65 + 23),
    Design("fp32, two passes, chunks of 4,096 rows", 4096, 4096, 8, 2, 49 + 23),
    Design("fp32, one read, chunks of 4,096 rows", 4096, 4096, 8, 1, 31),
    Design("fp32, one read, chunks of 1,024, buffer of 4,096 rows", 1024, 4096, 8, 1, 31),
    Design("teacher fp32, difference bf16, one read, 1,024 and 4,096", 1024, 4096, 6, 1, 31),
    Design("bf16 linear, one read, chunks of 4,096 rows", 4096, 4096, 4, 1, 31),
)
TILE = (128, 256)


def predict(card: Card, design: Design, shape: tuple[int, int, int]) -> dict[str, float]:
    """Seconds by part and in all."""
    n, d, v = shape
    unit, pairs = 2.0 * n * d * v, float(n) * v
    chunks, buffers = math.ceil(n / design.chunk), math.ceil(n / design.buffer)
    rows = min(n, design.buffer)
    tiles = math.ceil(rows / TILE[0]) * math.ceil(d / TILE[1])
    filled = tiles / (math.ceil(tiles / card.processors) * card.processors)
    weights = 2.0 * v * d
    head = weights if buffers == 1 else 2.0 * weights
    moved = pairs * (design.logit_bytes * design.reads + 2)
    parts = {
        "logits": max(2 * unit / card.flops, (pairs * design.logit_bytes + chunks * weights) / card.bandwidth),
        "rows": max(moved / card.bandwidth, pairs * design.instructions / card.pairs),
        "dH": max(unit / card.flops / filled, (2 * pairs + buffers * weights) / card.bandwidth),
        "dW": max(unit / card.flops, (2 * pairs + (2 * buffers - 1) * head) / card.bandwidth),
        "scale": (head + weights) / card.bandwidth,
    }
    device = sum(parts.values())
    host = (chunks * design.launches + design.overhead) * card.launch
    return parts | {"waiting": max(0.0, host - device), "total": max(device, host)}


def bare(card: Card, shape: tuple[int, int, int]) -> float:
    n, d, v = shape
    return 8.0 * n * d * v / card.flops


def measured_card(rows: list[Row]) -> Card:
    """The card that ran these rows, by its own copy and its own large product; else the closest by name."""
    device = next((str(r.get("device")) for r in rows if r["table"] == "environment"), "")
    card = CARDS["H200" if "H200" in device else "H100"]
    facts = {r["fact"]: r for r in rows if r["table"] == "facts" and "failed" not in r}
    flops = facts.get("square product for a second", {}).get("rate", card.flops)
    bandwidth = facts.get("copy, bytes read and written", {}).get("rate", card.bandwidth)
    launch = facts.get("launch of a small kernel", {}).get("median", card.launch)
    return Card(card.name, flops, bandwidth, card.processors, card.clock, launch)


# What each contender keeps of a pair of logits, in bytes, and its memory_bytes (`gpu_kernel.OURS`).
MEASURED: dict[str, tuple[int, int | None]] = {
    "hsd_kernels": (8, None),
    "hsd_kernels, 512 MiB": (8, 512 << 20),
    "hsd_kernels, 1 GiB": (8, 1 << 30),
    "hsd_kernels, 4.6 GiB": (8, round(4.6 * 2**30)),
    "hsd_kernels, linear bf16": (4, None),
    "hsd_kernels, linear bf16, 4.6 GiB": (4, round(4.6 * 2**30)),
}


def design_of(contender: str, shape: tuple[int, int, int]) -> Design:
    """What that contender does at that shape: one read, and the chunk and buffer that its memory gives."""
    logit_bytes, budget = MEASURED[contender]
    n, d, v = shape
    size = memory.sizes(n, v, "cuda", logit_bytes, 2, budget, sum_bytes=2 * v * d)
    return Design(contender, size.chunk, size.buffer, logit_bytes, 1, 31)


def table(rows: list[Row]) -> str:
    """Predicted, measured, difference; ratios are to 4U, predicted and measured."""
    card, cells = measured_card(rows), []
    kernel = {(tuple(r["shape"]), r["contender"]): r for r in rows if r["table"] == "kernel" and "failed" not in r}
    shapes = list(dict.fromkeys(shape for shape, _ in kernel)) or [REFERENCE]
    for shape in shapes:
        for contender in MEASURED:
            found = kernel.get((shape, contender))
            if kernel and found is None:
                continue
            design = design_of(contender, shape)
            name = f"{contender}: chunks of {design.chunk}, buffer of {design.buffer}"
            cells.append([", ".join(map(str, shape)), name, *compared(card, design, shape, found)])
    for design in DESIGNS:
        cells.append([", ".join(map(str, REFERENCE)), design.name, *compared(card, design, REFERENCE, None)])
    header = ["N, D, V", "design", "predicted ms (of 4U)", "rows + dW + dH beyond 4U", "measured", "difference"]
    rates = f"{card.flops / 1e12:.0f} TFLOP/s, {card.bandwidth / 1e12:.2f} TB/s, {card.launch * 1e6:.1f} us a launch"
    return f"Time model, {card.name}: {rates}\n\n{markdown(header, cells)}"


def compared(card: Card, design: Design, shape: tuple[int, int, int], found: Row | None) -> list[Any]:
    parts, floor = predict(card, design, shape), bare(card, shape)
    beyond = f"{(parts['total'] - floor) * 1e3:.1f} ms"
    predicted = [f"{parts['total'] * 1e3:.1f} ({parts['total'] / floor:.2f})", beyond]
    if found is None:
        return [*predicted, "not measured", ""]
    ratio = found["ratio"]
    difference = f"{100 * (found['median'] / parts['total'] - 1):+.0f} %"
    return [*predicted, f"{found['median'] * 1e3:.1f} ({ratio:.2f})", difference]


if __name__ == "__main__":
    print(table([row for name in sys.argv[1:] for row in load(Path(name))]))
