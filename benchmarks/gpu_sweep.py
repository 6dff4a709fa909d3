"""Part b: candidates for the pinned configurations of `hsd_kernels.configs`, each timed in a real call.

A narrow head (D = 64) leaves the call to its row kernels; the profiler tells each kernel's time apart. The winner of a
kernel is the candidate with the shortest time of that kernel.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from typing import Any

import torch
import workloads
from contenders import fused
from suite import Recorder, Row, markdown, synchronize

SHAPE = {"cuda": (1024, 64, 151_936), "cpu": (8, 16, 512)}
GRID: dict[str, tuple[int, ...]] = {"block_v": (1024, 2048, 4096), "num_warps": (4, 8, 16), "num_stages": (1,)}
LANE_COLUMNS = (8, 32)  # columns a thread holds at a time: what is outside spills or starves
CALLS = 5


def candidates(pinned: Any) -> list[Any]:
    """The grid around a pinned configuration, itself first, over those fields that it has."""
    fields = [f.name for f in dataclasses.fields(pinned) if f.name in GRID]
    found = [pinned]
    for values in itertools.product(*(GRID[name] for name in fields)):
        config = dataclasses.replace(pinned, **dict(zip(fields, values, strict=True)))
        a_thread = config.block_v / (32 * config.num_warps)
        if config not in found and LANE_COLUMNS[0] <= a_thread <= LANE_COLUMNS[1]:
            found.append(config)
    return found


def run(recorder: Recorder) -> None:
    from hsd_kernels import configs

    if not recorder.wants("sweep"):
        return
    device = recorder.device
    arch = max(configs.ARCHITECTURES)
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        arch = max(a for a in configs.ARCHITECTURES if a <= 10 * major + minor)
    for kernel in configs.KERNELS:
        if (kernel, arch) not in configs.PINNED:
            continue
        pinned = configs.PINNED[kernel, arch]
        for config in candidates(pinned)[: None if device == "cuda" else 2]:

            def measure(kernel: str = kernel, config: Any = config, pinned: Any = pinned) -> Row:
                configs.PINNED[kernel, arch] = config
                try:
                    return {"kernels": kernel_seconds(device)}
                finally:
                    configs.PINNED[kernel, arch] = pinned

            recorder.row("sweep", {"kernel": kernel, "config": dataclasses.asdict(config)}, measure)


def kernel_seconds(device: str) -> dict[str, float]:
    """Seconds a call of each kernel that Triton compiled, by the profiler."""
    from torch.profiler import ProfilerActivity, profile

    student, teacher, weight = workloads.gaussian(SHAPE[device], torch.bfloat16, device)
    student.requires_grad_()

    def call() -> None:
        student.grad = None
        fused(student, teacher, weight).backward()

    call()
    synchronize(device)
    if device != "cuda":
        return {}
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(CALLS):
            call()
        synchronize(device)
    ours = triton_kernels()
    return {e.key: e.device_time_total / 1e6 / CALLS for e in seen.key_averages() if e.key.startswith(ours)}


def triton_kernels() -> tuple[str, ...]:
    """Names of all kernels in the package, wherever its modules keep them."""
    from triton.runtime import JITFunction

    modules = [module for name, module in sys.modules.items() if name.startswith("hsd_kernels")]
    return tuple({name for m in modules for name, value in vars(m).items() if isinstance(value, JITFunction)})


def table(rows: list[Row]) -> str:
    cells, best = [], {}
    for r in [r for r in rows if r["table"] == "sweep"]:
        config = ", ".join(f"{k} {v}" for k, v in r["config"].items())
        times = {name: s for name, s in r.get("kernels", {}).items() if name.startswith(r["kernel"])}
        if "failed" in r or not times:
            cells.append([r["kernel"], config, f"failed: {r.get('failed', 'no kernel was seen')}"])
            continue
        time = sum(times.values())
        cells.append([r["kernel"], config, f"{time * 1e3:.3f}"])
        if r["kernel"] not in best or time < best[r["kernel"]][0]:
            best[r["kernel"]] = (time, config)
    cells += [[name, f"WINNER: {config}", f"{time * 1e3:.3f}"] for name, (time, config) in best.items()]
    return markdown(["row kernel", "configuration", "ms a call"], cells)
