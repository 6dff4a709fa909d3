"""The fused loss beside its peers: time, memory and error of one forward and backward of the same work.

    python benchmarks/bench_kernel.py [--shapes 1024,512,151936 ...] [--dtypes float32 bfloat16] [--json PATH]

Every contender runs in a process of its own, so that its peak memory is its own; a contender that fails is a row that
says why. The gate comes first: relative L1 error of loss, dH and dW against fp64 on a small problem. A contender that
fails the gate gets no time.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
GATE_SHAPE = (96, 64, 1000)
GATE = {"float32": 1e-4, "bfloat16": 0.2}  # is it the same function at all? The error columns say how well.


def ours(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    from hsd_kernels import fused_hsd_kl

    loss = fused_hsd_kl(student, teacher, weight)
    assert isinstance(loss, Tensor)
    return loss


def naive(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    ls = F.log_softmax(F.linear(student, weight).float(), -1)
    with torch.no_grad():
        lt = F.log_softmax(F.linear(teacher, weight).float(), -1)
    return F.kl_div(ls, lt, log_target=True, reduction="none").sum(-1).mean()


def trl_chunked(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    per_token, _ = ChunkedDivergenceFunction.apply(student, weight, None, teacher, weight.detach(), None, 0.0)  # type: ignore[misc]
    return per_token.mean()


def liger_chunked(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # pyright: ignore[reportMissingImports]

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False)
    ids = torch.zeros(student.shape[0], dtype=torch.long, device=student.device)
    return loss(student, weight, teacher, weight.detach(), ids)


CONTENDERS: dict[str, Loss | None] = {
    "bare GEMMs (4U)": None,
    "hsd_kernels": ours,
    "naive full logits": naive,
    "TRL chunked": trl_chunked,
    "Liger chunked": liger_chunked,
}


def inputs(shape: tuple[int, int, int], dtype: torch.dtype, device: str, seed: int = 0) -> tuple[Tensor, ...]:
    """Student states (N, D), a teacher near them, and W (V, D), with logits of standard deviation 2."""
    n, d, v = shape
    g = torch.Generator().manual_seed(seed)
    student = torch.randn(n, d, generator=g)
    teacher = student + 0.3 * torch.randn(n, d, generator=g)
    weight = torch.randn(v, d, generator=g) * (2.0 / d**0.5)
    return tuple(t.to(device, dtype) for t in (student, teacher, weight))


def step(loss_fn: Loss, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher, weight = tensors
    student, weight = student.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = loss_fn(student, teacher, weight)
    loss.backward()
    assert student.grad is not None and weight.grad is not None
    return loss.detach(), student.grad, weight.grad


def bare_gemms(tensors: tuple[Tensor, ...]) -> Callable[[], None]:
    """The floor: the stacked forward GEMM and both backward GEMMs, chunked, into preallocated memory. 4U FLOPs."""
    student, teacher, weight = tensors
    n = min(256, student.shape[0])
    z = student.new_empty(2 * n, weight.shape[0])
    dw, dh = torch.zeros_like(weight), torch.empty_like(student[:n])

    def run() -> None:
        for start in range(0, student.shape[0], n):
            h = student[start : start + n]
            torch.mm(torch.cat([h, teacher[start : start + n]]), weight.t(), out=z[: 2 * len(h)])
            torch.mm(z[: len(h)], weight, out=dh[: len(h)])
            dw.addmm_(z[: len(h)].t(), h)

    return run


def child(name: str, shape: tuple[int, int, int], dtype_name: str, device: str, repeats: int) -> dict[str, Any]:
    dtype = getattr(torch, dtype_name)
    fn = CONTENDERS[name]
    row: dict[str, Any] = {"contender": name, "shape": shape, "dtype": dtype_name}
    if fn is not None:
        small = inputs(GATE_SHAPE, dtype, device, seed=1)
        exact = step(naive_fp64, tuple(t.double().cpu() for t in small))
        errors = [
            ((a.double().cpu() - b).abs().sum() / b.abs().sum()).item()
            for a, b in zip(step(fn, small), exact, strict=True)
        ]
        row |= dict(zip(("error_loss", "error_dH", "error_dW"), errors, strict=True))
        if not max(errors) < GATE[dtype_name]:
            return row | {"failed": f"gate: relative error {max(errors):.2g} against fp64"}
    tensors = inputs(shape, dtype, device)
    run = bare_gemms(tensors) if fn is None else lambda: step(fn, tensors)
    base = peak(device)
    times = []
    for i in range(repeats + 1):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        if i:  # the first is the warm-up
            times.append(time.perf_counter() - start)
    times.sort()
    row |= {"median": statistics.median(times), "p20": times[len(times) // 5], "p80": times[len(times) * 4 // 5]}
    return row | {"peak_bytes": peak(device) - base}


def naive_fp64(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    from hsd_kernels.reference import hsd_kl

    return hsd_kl(student, teacher, weight)


def peak(device: str) -> int:
    """Peak memory so far: of the allocator on CUDA, resident in this process on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(name: str, shape: tuple[int, int, int], dtype: str, device: str, repeats: int) -> dict[str, Any]:
    job = json.dumps([name, shape, dtype, device, repeats])
    command = [sys.executable, __file__, "--child", job]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    except subprocess.TimeoutExpired:
        return {"contender": name, "shape": shape, "dtype": dtype, "failed": "took longer than 30 minutes"}
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return {"contender": name, "shape": shape, "dtype": dtype, "failed": lines[-1]}


def environment(device: str) -> dict[str, Any]:
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    name = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
    return {
        "device": name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": git.stdout.strip(),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; ratios are to the bare GEMMs of the same shape and dtype in the same run."""
    lines = [
        "| N, D, V | dtype | contender | median s | p20 to p80 | x GEMMs | peak MiB | error loss / dH / dW |",
        "|---|---|---|---|---|---|---|---|",
    ]
    floors = {(tuple(r["shape"]), r["dtype"]): r.get("median") for r in rows if r["contender"].startswith("bare")}
    for r in rows:
        start = f"| {', '.join(map(str, r['shape']))} | {r['dtype']} | {r['contender']} | "
        if "failed" in r:
            lines.append(start + f"failed: {r['failed']} | | | | |")
            continue
        floor = floors.get((tuple(r["shape"]), r["dtype"]))
        ratio = f"{r['median'] / floor:.2f}" if floor else ""
        errors = " / ".join(f"{r[k]:.1e}" for k in ("error_loss", "error_dH", "error_dW")) if "error_dH" in r else ""
        spread = f"{r['p20']:.3g} to {r['p80']:.3g}"
        lines.append(start + f"{r['median']:.3g} | {spread} | {ratio} | {r['peak_bytes'] / 2**20:.0f} | {errors} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["1024,512,151936"], help="N,D,V")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=list(GATE))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        name, shape, dtype, device, repeats = json.loads(args.child)
        print(json.dumps(child(name, tuple(shape), dtype, device, repeats)))
        return
    facts = environment(args.device)
    print(", ".join(f"{k} {v}" for k, v in facts.items()))
    rows = []
    for shape_text in args.shapes:
        n, d, v = map(int, shape_text.split(","))
        for dtype in args.dtypes:
            for name in CONTENDERS:
                rows.append(measure(name, (n, d, v), dtype, args.device, args.repeats))
                print(f"  {dtype} {name}: {rows[-1].get('failed') or round(rows[-1]['median'], 3)}", file=sys.stderr)
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps({"environment": facts, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
