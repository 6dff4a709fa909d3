"""The fused loss beside its peers: time, memory and error of one forward and backward of the same work.

    python benchmarks/bench_kernel.py [--device cpu|cuda] [--shapes 1024,512,151936 ...] [--dtypes float32 bfloat16]
                                      [--workload gaussian|peaked|STATES.pt] [--json PATH]

Every contender runs in a process of its own, so that its peak memory is its own; one that fails is a row that says
why. The gate comes first: relative L1 error of loss, dH and dW against fp64 on a small problem. A contender that fails
the gate gets no time. benchmarks/README.md explains every column.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import workloads
from contenders import CONTENDERS, bare_gemms, contenders, step
from timing import environment, header, in_processes, peak_bytes, reset_peak, run_jobs, save, time_it

GATE_SHAPE = (96, 64, 1000)
GATE = {"float32": 1e-4, "bfloat16": 0.2}  # is it the same function at all? The error columns say how well.
FLOOR = "bare GEMMs (4U)"
FLOOR_ROWS = {"cpu": (128, 256, 512, 1024), "cuda": (1024, 2048, 4096, 8192)}  # the best of these is the floor


def child(job: dict[str, Any]) -> dict[str, Any]:
    name, device = job["contender"], job["device"]
    shape, dtype = tuple(job["shape"]), getattr(torch, job["dtype"])
    row: dict[str, Any] = {}
    if name != FLOOR:
        errors = gate(name, dtype, device)
        row |= dict(zip(("error_loss", "error_dH", "error_dW"), errors, strict=True))
        if not max(errors) < GATE[job["dtype"]]:
            return row | {"failed": f"gate: relative error {max(errors):.2g} against fp64"}
    tensors = load(job["workload"], shape, dtype, device)
    base = reset_peak(device)  # not the temporaries of making the inputs
    if name == FLOOR:
        runs = {rows: bare_gemms(*tensors, rows) for rows in FLOOR_ROWS[device] if rows <= max(shape[0], 128)}
        timed = {rows: time_it(run, job["repeats"], device) for rows, run in runs.items()}
        best = min(timed, key=lambda rows: timed[rows]["median"])
        return timed[best] | {"rows": best, "peak_bytes": peak_bytes(device) - base}
    row |= time_it(lambda: step(CONTENDERS[name], *tensors), job["repeats"], device)
    row["peak_bytes"] = peak_bytes(device) - base
    if "filter" in name:
        row |= look_at_filter(name, tensors)
    return row


def gate(name: str, dtype: torch.dtype, device: str) -> list[float]:
    """Relative L1 errors of loss, dH and dW against fp64 on the same rounded inputs."""
    from hsd_kernels.reference import hsd_kl

    small = workloads.gaussian(GATE_SHAPE, dtype, device, seed=1)
    exact = step(hsd_kl, *(t.double().cpu() for t in small))
    found = step(CONTENDERS[name], *small)
    return [((a.double().cpu() - b).abs().sum() / b.abs().sum()).item() for a, b in zip(found, exact, strict=True)]


def load(workload: str, shape: Any, dtype: torch.dtype, device: str) -> workloads.Workload:
    if workload in ("gaussian", "peaked"):
        return getattr(workloads, workload)(shape, dtype, device)
    return workloads.recorded(workload, shape[0], dtype, device)


def look_at_filter(name: str, tensors: workloads.Workload) -> dict[str, float]:
    """L1 share of the logit gradient that the filter left out, and the share of the columns that it kept."""
    from hsd_kernels import HSDKLOutput, driver, fused_hsd_kl

    original, kept = driver.active_columns, []

    def watched(*args):
        active = original(*args)
        kept.append(1.0 if active.columns is None else active.columns.numel() / args[0].shape[1])
        return active

    student, teacher, weight = tensors
    eps = "auto" if "auto" in name else float(name.split()[-1])
    driver.active_columns = watched
    out = fused_hsd_kl(student.detach().requires_grad_(), teacher, weight, filter_eps=eps, return_stats=True)
    driver.active_columns = original
    assert isinstance(out, HSDKLOutput) and out.filtered_share is not None
    return {"filtered_share": out.filtered_share.item(), "active_share": sum(kept) / len(kept)}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; ratios are to the bare GEMMs of the same shape, dtype and run."""
    lines = [
        "| N, D, V | dtype | contender | median s | p20 to p80 | x GEMMs | peak MiB | error loss / dH / dW |",
        "|---|---|---|---|---|---|---|---|",
    ]
    floors = {(tuple(r["shape"]), r["dtype"]): r.get("median") for r in rows if r["contender"] == FLOOR}
    for r in rows:
        start = f"| {', '.join(map(str, r['shape']))} | {r['dtype']} | {r['contender']} | "
        if "failed" in r:
            lines.append(start + f"failed: {r['failed']} | | | | |")
            continue
        floor = floors.get((tuple(r["shape"]), r["dtype"]))
        ratio = f"{r['median'] / floor:.2f}" if floor else ""
        errors = " / ".join(f"{r[k]:.1e}" for k in ("error_loss", "error_dH", "error_dW")) if "error_dH" in r else ""
        if "active_share" in r:
            errors += f" (columns kept {r['active_share']:.2f}, left out {r['filtered_share']:.1e})"
        errors += f" (chunks of {r['rows']})" if "rows" in r else ""
        spread = f"{r['p20']:.3g} to {r['p80']:.3g}"
        lines.append(start + f"{r['median']:.3g} | {spread} | {ratio} | {r['peak_bytes'] / 2**20:.0f} | {errors} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["1024,512,151936"], help="N,D,V")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=list(GATE))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--workload", default="gaussian", help="gaussian, peaked or a file of smollm2_states.py")
    parser.add_argument("--only", nargs="+", help="contenders whose name contains one of these")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="results; the table lands beside it as .md")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run_jobs(json.loads(args.child), child)
        return
    facts = environment(args.device) | {"workload": Path(args.workload).stem}
    print(header(facts))
    shapes = [[int(x) for x in text.split(",")] for text in args.shapes]
    rows: list[dict[str, Any]] = []

    def order(row: dict[str, Any]) -> tuple[int, int]:
        return shapes.index(row["shape"]), args.dtypes.index(row["dtype"])

    for dtype in args.dtypes:
        for name, reason in {FLOOR: None, **contenders(args.device, dtype)}.items():
            if args.only and name != FLOOR and not any(part in name for part in args.only):
                continue
            job = {"contender": name, "dtype": dtype, "device": args.device}
            job |= {"workload": args.workload, "repeats": args.repeats}
            jobs = [job | {"shape": shape} for shape in shapes]
            rows += [j | {"failed": reason} for j in jobs] if reason else in_processes(__file__, jobs)
            for row in rows[-len(jobs) :]:
                found = row.get("failed") or round(row["median"], 4)
                print(f"  {dtype} {name} {row['shape']}: {found}", file=sys.stderr)
            if args.json:  # after each contender: a run that is cut off leaves what it has
                done = sorted(rows, key=order)
                save(args.json, facts, done, table(done))
    print(table(sorted(rows, key=order)))


if __name__ == "__main__":
    main()
