"""The three bf16 products of a chunk on a CPU, by everyone who could compute them, and the filter's passes.

    python benchmarks/bench_products.py [--json PATH]

One thread, best of several calls. GFLOP/s are of the product alone; the filter's passes are milliseconds. What a CPU
without bf16 instructions would do: ONEDNN_MAX_CPU_ISA=AVX512_CORE.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from timing import environment, header, save

from hsd_kernels import gemm, native, vocab_filter

BF16 = torch.bfloat16
N, D, V = 512, 512, 18992  # an eighth of Qwen3's vocabulary: rows a power of two apart meet in a few sets of the caches
TOKENS, VOCABULARY, KEPT = 1024, 49152, 23000  # of the filter's passes: SmolLM2's states at 1e-5


def best(call: Callable[[], Any], repeats: int = 7) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def products() -> list[dict[str, Any]]:
    hidden, weight, dz = (torch.randn(*s).to(BF16) for s in ((N, D), (V, D), (N, V)))
    logits, dh, dw = torch.empty(N, V), torch.empty(N, D), torch.empty(V, D)
    calls: dict[str, dict[str, Callable[[], Any]]] = {
        "torch, bf16 result": {
            "logits": lambda: torch.mm(hidden, weight.t()),
            "dH": lambda: torch.mm(dz, weight),
            "dW": lambda: torch.mm(dz.t(), hidden),
        }
    }
    if gemm._mkl_routine() is not None:
        calls["MKL, fp32 result"] = {
            "logits": lambda: gemm._mkl_gemm(hidden, weight, logits, trans_b=True),
            "dH": lambda: gemm._mkl_gemm(dz, weight, dh),
            "dW": lambda: gemm._mkl_gemm(dz, hidden, dw, trans_a=True),
        }
    own, here = torch.ops.hsd_cpu, gemm.machine()
    for name, there in {"vdpbf16ps": here.vdpbf16ps, "tiles": here.tiles}.items():
        if there:
            how = {"tiles": name == "tiles", "threads": 1}
            calls[f"C++ {name}, fp32 result"] = {
                "logits": partial(own.project_out, logits, hidden, weight, **how),
                "dW": partial(own.accumulate, dw, dz, hidden, adds=False, **how),
            }
    wide = [t.float() for t in (hidden, weight, dz)]
    calls["torch, fp32 operands"] = {"logits": lambda: torch.mm(wide[0], wide[1].t(), out=logits)}
    flops = 2 * N * D * V / 1e9
    return [{"by": by} | {name: flops / best(call) for name, call in row.items()} for by, row in calls.items()]


def passes() -> list[dict[str, Any]]:
    rows = []
    columns = torch.randperm(VOCABULARY)[:KEPT].sort().values
    for dtype in (torch.float32, BF16):
        dz = torch.randn(TOKENS, VOCABULARY).to(dtype)
        for by in ("torch", "C++") if native.available() else ("torch",):
            with patch.object(native, "available", return_value=by == "C++"):
                norms = best(partial(vocab_filter.column_norms, dz))
                take = best(partial(vocab_filter.take_columns_, dz, columns))
            rows.append({"by": f"{by}, {dtype}", "column norms": 1e3 * norms, "taking columns": 1e3 * take})
    return rows


def table(rows: list[dict[str, Any]], unit: str) -> str:
    names = [n for n in max(rows, key=len) if n != "by"]
    lines = [f"| {unit} | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += ["| " + " | ".join([r["by"], *(f"{r[n]:.3g}" if n in r else "" for n in names)]) + " |" for r in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    facts = environment("cpu")
    found = products(), passes()
    shown = [
        table(found[0], f"GFLOP/s, (N, D, V) = ({N}, {D}, {V})"),
        table(found[1], f"ms, {KEPT:,} of {VOCABULARY:,} columns, {TOKENS:,} rows"),
    ]
    print(header(facts), *shown, sep="\n\n")
    if args.json:
        save(args.json, facts, [*found[0], *found[1]], "\n\n".join(shown))


if __name__ == "__main__":
    main()
