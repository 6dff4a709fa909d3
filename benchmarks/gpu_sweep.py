"""Part b: candidates for the pinned configurations of `hsd_kernels.configs`, each timed in a real call.

A narrow head (D = 64) leaves the call to its row kernels; the profiler tells each kernel's time apart. The winner of a
kernel is the candidate with the shortest time of that kernel.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import workloads
from contenders import fused
from suite import Recorder, Row, markdown, synchronize

from hsd_kernels import Divergence, Head

SHAPE = {"cuda": (1024, 64, 151_936), "cpu": (8, 16, 512)}
GRID: dict[str, tuple[int, ...]] = {"block_v": (1024, 2048, 4096), "num_warps": (2, 4, 8, 16), "num_stages": (1,)}
LANE_COLUMNS = (8, 64)  # columns a thread holds at a time: what is outside spills or starves
CALLS = 5
TWO_PASSES = ("statistics", "gradient")  # what runs where a row's slices do not fit the device, and over shards
WORK: dict[str, dict[str, Any]] = {"one_read_softcap": {"softcap": 30.0}}
PATHS: dict[str, dict[str, Any]] = {
    "forward KL": {},
    "reverse KL": {"divergence": "reverse_kl"},
    "forward KL, clip": {"divergence": Divergence(clip=0.05)},
    "JSD": {"divergence": "jsd"},
}


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
                    return {"kernels": kernel_seconds(device, kernel in TWO_PASSES, **WORK.get(kernel, {}))}
                finally:
                    configs.PINNED[kernel, arch] = pinned

            recorder.row("sweep", {"kernel": kernel, "config": dataclasses.asdict(config)}, measure)
    for name, options in PATHS.items():
        for two_passes in (False, True):
            measure_path = functools.partial(path, device, two_passes, options)
            key = {"path": name, "passes": "two passes" if two_passes else "one read"}
            recorder.row("sweep", key, measure_path)


def path(device: str, two_passes: bool, options: dict[str, Any]) -> Row:
    return {"kernels": kernel_seconds(device, two_passes, **options)}


def kernel_seconds(device: str, two_passes: bool, softcap: float | None = None, **options: Any) -> dict[str, float]:
    """Seconds a call of each kernel that Triton compiled, by the profiler."""
    from hsd_kernels import rows

    student, teacher, weight = workloads.gaussian(SHAPE[device], torch.bfloat16, device)
    student.requires_grad_()
    head = Head(weight, softcap=softcap)

    def call() -> None:
        student.grad = None
        fused(student, teacher, head, **options).backward()

    if device == "cuda" and two_passes:
        with mock.patch.object(rows, "both_in_one_read", return_value=None):
            return profiled(call)
    return profiled(call) if device == "cuda" else {}


def profiled(call: Callable[[], None]) -> dict[str, float]:
    from torch.profiler import ProfilerActivity, profile

    call()
    synchronize("cuda")
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(CALLS):
            call()
        synchronize("cuda")
    ours = triton_kernels()
    return {e.key: e.device_time_total / 1e6 / CALLS for e in seen.key_averages() if e.key.startswith(ours)}


def triton_kernels() -> tuple[str, ...]:
    """Names of all kernels in the package, wherever its modules keep them."""
    from triton.runtime import JITFunction

    modules = [module for name, module in sys.modules.items() if name.startswith("hsd_kernels")]
    return tuple({name for m in modules for name, value in vars(m).items() if isinstance(value, JITFunction)})


def table(rows: list[Row]) -> str:
    cells, best, paths = [], {}, []
    for r in [r for r in rows if r["table"] == "sweep"]:
        times = r.get("kernels", {})
        if "path" in r:
            failed = f"failed: {r.get('failed', 'no kernel was seen')}"
            paths.append([r["path"], r["passes"], f"{sum(times.values()) * 1e3:.3f}" if times else failed])
            continue
        config = ", ".join(f"{k} {v}" for k, v in r["config"].items())
        times = {name: s for name, s in times.items() if name.startswith(r["kernel"].removesuffix("_softcap"))}
        if "failed" in r or not times:
            cells.append([r["kernel"], config, f"failed: {r.get('failed', 'no kernel was seen')}"])
            continue
        time = sum(times.values())
        cells.append([r["kernel"], config, f"{time * 1e3:.3f}"])
        if r["kernel"] not in best or time < best[r["kernel"]][0]:
            best[r["kernel"]] = (time, config)
    cells += [[name, f"WINNER: {config}", f"{time * 1e3:.3f}"] for name, (time, config) in best.items()]
    swept = markdown(["row kernel", "configuration", "ms a call"], cells)
    return swept + "\n\n" + markdown(["divergence", "row kernels", "ms a call"], paths)
