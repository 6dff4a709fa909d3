"""Part a: the products, copies and launches that decide the design, each alone.

At D = 4,096 and V = 151,936 for C token rows: the logits of both sides into bf16 and fp32, dH from rows that lie V and
2 V apart, dW into fp32 with and without adding and into bf16, a vocabulary that no power of two divides with and
without padded rows, a copy, a large square product, and the floor of 4U.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import workloads
from contenders import bare_gemms
from suite import Recorder, Row, markdown, seconds_of, synchronize, timed
from torch import Tensor

Case = Callable[[], tuple[Callable[[], Any], Row]]  # makes the operands: the call, and its "flops" or "bytes"
SIZES = {
    "cuda": {"D": 4096, "V": 151_936, "odd V": 151_937, "C": (863, 1024, 2048, 4096, 8192), "square": 8192},
    "cpu": {"D": 64, "V": 512, "odd V": 513, "C": (48, 64), "square": 128},
}
COPY_BYTES = {"cuda": 4 << 30, "cpu": 1 << 20}
FLOOR_TOKENS = {"cuda": 8192, "cpu": 64}
FLOOR_ROWS = {"cuda": (1024, 2048, 4096, 8192), "cpu": (32, 64)}
REPEATS = {"cuda": 7, "cpu": 1}


def run(recorder: Recorder) -> None:
    if not recorder.wants("facts"):
        return
    device = recorder.device
    size, repeats = SIZES[device], REPEATS[device]

    def fact(name: str, rows: int, vocab: int, make: Case) -> None:
        def measure() -> Row:
            call, counts = make()
            row = timed(call, device, repeats, warmups=2) | counts
            return row | {"rate": row.get("flops", row.get("bytes", 0)) / row["median"]}

        recorder.row("facts", {"fact": name, "C": rows, "V": vocab}, measure)

    for rows in size["C"]:
        for name, make in products(rows, size["D"], size["V"], device).items():
            fact(name, rows, size["V"], make)
    for name, make in odd_products(size["C"][-2], size["D"], size["odd V"], device).items():
        fact(name, size["C"][-2], size["odd V"], make)
    fact("copy, bytes read and written", 0, 0, lambda: copy(device))
    fact("square product", size["square"], size["square"], lambda: square(size["square"], device))
    recorder.row("facts", {"fact": "square product for a second", "C": size["square"], "V": 0}, lambda: warm(device))
    recorder.row("facts", {"fact": "launch of a small kernel", "C": 0, "V": 0}, lambda: launches(device))
    shape = (FLOOR_TOKENS[device], size["D"], size["V"])
    for rows in FLOOR_ROWS[device]:
        for wide in (False, True):
            key = {"shape": shape, "rows": rows, "dW": "fp32" if wide else "bf16"}
            recorder.row("floor", key, lambda rows=rows, wide=wide: floor(shape, rows, wide, device, repeats))


def half(*shape: int, device: str) -> Tensor:
    return torch.randn(*shape, device=device, dtype=torch.bfloat16)


def wide_mm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """bf16 operands into fp32; a CPU's torch has no such product, so that a dry run upcasts."""
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a.float(), b.float(), out=out)


def products(rows: int, dim: int, vocab: int, device: str) -> dict[str, Case]:
    unit = 2 * rows * dim * vocab
    made: dict[str, Tensor] = {}

    def given(name: str, *shape: int) -> Tensor:
        if name not in made:
            made[name] = half(*shape, device=device)
        return made[name]

    def logits(wide: bool) -> tuple[Callable[[], Any], Row]:
        h, w = given("both", 2 * rows, dim), given("W", vocab, dim)
        out = torch.empty(2 * rows, vocab, device=device, dtype=torch.float32 if wide else torch.bfloat16)
        call = (lambda: wide_mm(h, w.t(), out)) if wide else (lambda: torch.mm(h, w.t(), out=out))
        return call, {"flops": 2 * unit, "bytes": 2 * (h.numel() + w.numel()) + out.nbytes}

    def dz(stride: int) -> Tensor:
        return given(f"dz {stride}", rows, stride)[:, :vocab]

    def hidden_gradient(stride: int) -> tuple[Callable[[], Any], Row]:
        z, w = dz(stride), given("W", vocab, dim)
        out = torch.empty(rows, dim, device=device, dtype=torch.bfloat16)
        return lambda: torch.mm(z, w, out=out), {"flops": unit, "bytes": 2 * (z.numel() + w.numel() + out.numel())}

    def head_gradient(stride: int, wide: bool, adds: bool) -> tuple[Callable[[], Any], Row]:
        z, h = dz(stride), given("h", rows, dim)
        out = torch.zeros(vocab, dim, device=device, dtype=torch.float32 if wide else torch.bfloat16)
        row = {"flops": unit, "bytes": 2 * (z.numel() + h.numel()) + out.nbytes * (1 + adds)}
        if not wide:
            return (lambda: out.addmm_(z.t(), h)) if adds else (lambda: torch.mm(z.t(), h, out=out)), row
        if not adds or device == "cpu":
            return lambda: wide_mm(z.t(), h, out), row
        return lambda: torch.addmm(out, z.t(), h, out_dtype=torch.float32, out=out), row

    return {
        "logits, bf16": lambda: logits(False),
        "logits, fp32": lambda: logits(True),
        "dH, rows V apart": lambda: hidden_gradient(vocab),
        "dH, rows 2 V apart": lambda: hidden_gradient(2 * vocab),
        "dW = , fp32": lambda: head_gradient(vocab, True, False),
        "dW += , fp32": lambda: head_gradient(vocab, True, True),
        "dW += , fp32, rows 2 V apart": lambda: head_gradient(2 * vocab, True, True),
        "dW = , bf16": lambda: head_gradient(vocab, False, False),
        "dW += , bf16": lambda: head_gradient(vocab, False, True),
    }


def odd_products(rows: int, dim: int, vocab: int, device: str) -> dict[str, Case]:
    """V % 16 != 0, as after a resize: rows V apart, and rows a multiple of 64 apart."""
    unit = 2 * rows * dim * vocab

    def case(product: str, stride: int) -> tuple[Callable[[], Any], Row]:
        w = half(vocab, dim, device=device)
        if product == "logits":
            h = half(rows, dim, device=device)
            out = torch.empty(rows, stride, device=device)[:, :vocab]
            return lambda: wide_mm(h, w.t(), out), {"flops": unit}
        z, h = half(rows, stride, device=device)[:, :vocab], half(rows, dim, device=device)
        if product == "dH":
            return lambda: torch.mm(z, w), {"flops": unit}
        out = torch.empty(vocab, dim, device=device)
        return lambda: wide_mm(z.t(), h, out), {"flops": unit}

    padded = -(-vocab // 64) * 64
    return {
        f"{product}, {name}": lambda product=product, stride=stride: case(product, stride)
        for product in ("logits", "dH", "dW")
        for name, stride in (("odd rows", vocab), ("padded rows", padded))
    }


def copy(device: str) -> tuple[Callable[[], Any], Row]:
    source = torch.zeros(COPY_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), {"bytes": 2 * source.nbytes}


def square(n: int, device: str) -> tuple[Callable[[], Any], Row]:
    a, b = half(n, n, device=device), half(n, n, device=device)
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out), {"flops": 2 * n**3}


def warm(device: str) -> Row:
    """The rate at the end of a second of products: what a long run gets."""
    n = SIZES[device]["square"]
    call, counts = square(n, device)
    times = [seconds_of(call, device) for _ in range(600 if device == "cuda" else 2)]
    late = sorted(times[-100:])[len(times[-100:]) // 2]
    return {"median": late, "flops": counts["flops"], "rate": counts["flops"] / late}


def launches(device: str) -> Row:
    """Host seconds a launch, over many that the device finishes faster than they are asked for."""
    x, n = torch.zeros(32, device=device), 2000
    run_all = lambda: [x.add_(1.0) for _ in range(n)]  # noqa: E731
    run_all()
    synchronize(device)
    return {"median": seconds_of(run_all, device) / n}


def floor(shape: tuple[int, int, int], rows: int, wide: bool, device: str, repeats: int) -> Row:
    run_floor = bare_gemms(*workloads.gaussian(shape, torch.bfloat16, device), rows, wide_dw=wide)
    n, d, v = shape
    row = timed(run_floor, device, max(repeats - 2, 1))
    return row | {"flops": 8 * n * d * v, "rate": 8 * n * d * v / row["median"]}


def table(rows: list[Row]) -> str:
    facts = [r for r in rows if r["table"] == "facts"]
    heights = list(dict.fromkeys(r["C"] for r in facts if r["C"] and "square" not in r["fact"]))
    cells: dict[str, dict[int, str]] = {}
    for r in facts:
        cells.setdefault(r["fact"], {})[r["C"]] = cell(r)
    names = list(cells)
    products = [name for name in names if any(height in cells[name] for height in heights)]
    body = [[name, *(cells[name].get(height, "") for height in heights)] for name in products]
    alone = [[name, *cells[name].values()] for name in names if name not in products]
    floors = [[", ".join(map(str, r["shape"])), r["rows"], r["dW"], cell(r)] for r in rows if r["table"] == "floor"]
    return "\n\n".join(
        [
            markdown(["ms (TFLOP/s), C =", *heights], body),
            markdown(["alone", "ms (rate)"], alone),
            markdown(["floor 4U: N, D, V", "rows a chunk", "dW", "ms (TFLOP/s)"], floors),
        ]
    )


def cell(r: Row) -> str:
    if "failed" in r:
        return f"failed: {r['failed']}"
    if "flops" in r:
        return f"{r['median'] * 1e3:.4g} ({r['rate'] / 1e12:.0f})"
    return f"{r['median'] * 1e3:.4g}" + (f" ({r['rate'] / 1e12:.2f} TB/s)" if "rate" in r else "")
