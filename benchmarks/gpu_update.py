"""Part c: the whole update of a group, sizes of the kernel's problem, small problems, and the error on real states."""

from __future__ import annotations

import os
from pathlib import Path

import bench_error
import bench_scaling
import bench_update
import torch
import workloads
from contenders import CONTENDERS, NEEDS
from gpu_kernel import ALL, OURS, floor_rows, measure
from suite import Recorder, Row, markdown, missing, ms

UPDATE = {
    "cuda": ("qwen3-0.6b", [(200, 4096, 4096, 8), (2000, 500, 500, 8), (200, 1000, 1000, 16)]),
    "cpu": ("toy", [(24, 12, 10, 4)]),
}
UPDATE_REPEATS = {"cuda": 3, "cpu": 1}
SCALING = {"cuda": "cuda", "cpu": "toy"}
SCALED = ("hsd_kernels", "naive full logits")
SMALL = {
    "cuda": [(256, 512, 16_384), (256, 1024, 32_768), (512, 896, 151_936), (1024, 2048, 151_936)],
    "cpu": [(96, 64, 1000)],
}
SMALL_NAMES = ("hsd_kernels", "naive full logits", "naive, torch.compile")
STATES = os.environ.get("SUITE_STATES", ".states/smollm2_8k.pt")
STATE_ROWS = ("hsd_kernels", "hsd_kernels, linear bf16", "naive full logits", "TRL chunked", "Liger chunked")
STATE_ROWS += ("Liger Triton JSD",)


def run(recorder: Recorder) -> None:
    for table, make in (
        ("error", error_rows),
        ("small", small_rows),
        ("update", update_rows),
        ("scaling", scaling_rows),
    ):
        if recorder.wants(table):
            make(recorder)


def error_rows(recorder: Recorder) -> None:
    device, tensors = recorder.device, []
    if Path(STATES).exists():
        tokens = torch.load(STATES, weights_only=True)["student"].shape[0] if device == "cuda" else 64
        tensors = list(workloads.recorded(STATES, tokens, torch.bfloat16, device))
        if device == "cpu":
            tensors[2] = tensors[2][:512].clone()
    for name in STATE_ROWS:
        reason = missing(*NEEDS.get(name, ())) or (None if tensors else f"{STATES} is not there")
        if device == "cpu" and "Triton" in name:
            reason = "needs a GPU"

        def measure_errors(name: str = name) -> Row:
            loss = OURS[name][0] if name in OURS else CONTENDERS[name]
            student, teacher, weight = tensors
            return {"quartiles": bench_error.quartile_errors(loss, (student, teacher, weight))}

        if reason:
            recorder.skip("error", {"contender": name}, reason)
        else:
            recorder.row("error", {"contender": name}, measure_errors)


def small_rows(recorder: Recorder) -> None:
    for shape in SMALL[recorder.device]:
        timed_rows(recorder, "small", {}, shape, SMALL_NAMES)


def scaling_rows(recorder: Recorder) -> None:
    for axis, shape in bench_scaling.shapes(bench_scaling.PLANS[SCALING[recorder.device]]):
        timed_rows(recorder, "scaling", {"axis": axis}, shape, SCALED)


def timed_rows(recorder: Recorder, table: str, key: Row, shape: tuple[int, int, int], names: tuple[str, ...]) -> None:
    tensors: list[workloads.Workload] = []
    rows = floor_rows(recorder, shape, tensors)
    for name in names:

        def time_one(name: str = name) -> Row:
            return measure(CONTENDERS[name], ALL, tensors, shape, rows, recorder.device)

        recorder.row(table, key | {"shape": shape, "contender": name}, time_one)


def update_rows(recorder: Recorder) -> None:
    device = recorder.device
    model_name, shapes = UPDATE[device]
    reasons: dict[str, str | None] = dict.fromkeys(bench_update.CONTENDERS)
    reasons["grpo"] = missing("datasets", "trl")
    for contender in bench_update.CONTENDERS:

        def check(contender: str = contender) -> Row:
            reason = bench_update.gate(contender, device)
            return {} if reason is None else {"failed": reason}

        gate = recorder.row("update gate", {"contender": contender}, check, seconds=120)
        reasons[contender] = reasons[contender] or gate.get("failed")
    model = None
    for shape in shapes:
        for contender in bench_update.CONTENDERS:
            key = {"model": model_name, "shape": shape, "contender": contender}
            if reasons[contender]:
                recorder.skip("update", key, reasons[contender] or "")
                continue

            def measure_update(contender: str = contender, shape: tuple[int, ...] = shape) -> Row:
                nonlocal model
                if model is None:
                    dtype = torch.bfloat16 if device == "cuda" else torch.float32
                    model = bench_update.build(model_name, device, dtype)
                return bench_update.one_update(contender, model, model_name, shape, device, UPDATE_REPEATS[device])

            recorder.row("update", key, measure_update, seconds=90)


def table(rows: list[Row]) -> str:
    def of(name: str) -> list[Row]:
        return [r for r in rows if r["table"] == name]

    parts = [bench_update.table(of("update")), bench_error.table(of("error"))]
    for name in ("small", "scaling"):
        cells = []
        for r in of(name):
            start = [r.get("axis", ""), ", ".join(map(str, r["shape"])), r["contender"]]
            if "failed" in r:
                cells.append([*start, f"failed: {r['failed']}", "", ""])
            else:
                extra = "" if r["extra_bytes"] is None else f"{r['extra_bytes'] / 1e9:.2f}"
                cells.append([*start, ms(r["median"]), f"{r['ratio']:.2f}", extra])
        parts.append(markdown([name, "N, D, V", "contender", "ms", "x GEMMs", "GB above"], cells))
    return "\n\n".join(parts)
