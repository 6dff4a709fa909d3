"""How a benchmark runs: one process per row, a gate before a time, quantiles, peak memory, an environment header."""

from __future__ import annotations

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


def time_it(run: Callable[[], Any], repeats: int, device: str) -> dict[str, float]:
    """Seconds: median, p20, p80 of ``repeats`` calls after one to warm up."""
    times = []
    for i in range(repeats + 1):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        if i:
            times.append(time.perf_counter() - start)
    times.sort()
    return {"median": statistics.median(times), "p20": times[len(times) // 5], "p80": times[len(times) * 4 // 5]}


def peak_bytes(device: str) -> int:
    """Peak memory so far: of the allocator on CUDA, resident in this process on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_own_process(script: str, job: dict[str, Any], timeout: float = 1800.0) -> dict[str, Any]:
    """``job`` plus what ``script --child JOB`` prints as its last line, or plus "failed" and why."""
    command = [sys.executable, script, "--child", json.dumps(job)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return job | {"failed": f"took longer than {timeout:.0f} s"}
    if done.returncode == 0:
        return job | json.loads(done.stdout.splitlines()[-1])
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return job | {"failed": lines[-1]}


def environment(device: str) -> dict[str, Any]:
    here = Path(__file__).parent
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=here)
    facts = {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{_cpu()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
    }
    for name in ("triton", "transformers", "trl", "liger_kernel", "fla"):
        version = _version(name)
        facts |= {} if version is None else {name: version}
    return facts


def header(facts: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in facts.items())


def save(path: Path, facts: dict[str, Any], rows: list[dict[str, Any]], table: str) -> None:
    """PATH as JSON and, beside it, the table as Markdown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": facts, "rows": rows}, indent=1) + "\n")
    path.with_suffix(".md").write_text(f"{header(facts)}\n\n{table}\n")


def _cpu() -> str:
    flags = ""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        pass
    best = next((name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if name in flags), "")
    return f"{platform.machine()} CPU {best}".strip()


def _version(module: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version({"fla": "flash-linear-attention", "liger_kernel": "liger-kernel"}.get(module, module))
    except PackageNotFoundError:
        return None
