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
from contextlib import suppress
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
    if sys.platform == "linux":  # whose ru_maxrss begins with that of the parent process
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak(device: str) -> int:
    """Forget the peak so far; the bytes in use now. Making bf16 inputs takes more memory than the loss of them may."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):  # of Linux alone
            Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes(device)


def in_own_process(script: str, jobs: list[dict[str, Any]], timeout: float = 1800.0) -> list[dict[str, Any]]:
    """Each job plus what ``script --child JOBS`` prints for it, one JSON line a job, or plus "failed" and why."""
    command = [sys.executable, script, "--child", json.dumps(jobs)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        out, errors, status = done.stdout, done.stderr, f"exit status {done.returncode}"
    except subprocess.TimeoutExpired as stopped:
        out, errors, status = (stopped.stdout or b"").decode(), "", f"took longer than {timeout:.0f} s"
    found = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    why = (errors.strip().splitlines() or [status])[-1]
    return [job | row for job, row in zip(jobs, found + [{"failed": why}] * (len(jobs) - len(found)), strict=True)]


def run_jobs(jobs: list[dict[str, Any]], run: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The child's side of `in_own_process`. A job that fails does not stop the next."""
    for job in jobs:
        if job["device"] == "cuda":
            torch.cuda.empty_cache()
        try:
            row = run(job)
        except Exception as error:
            row = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(row), flush=True)


def in_processes(script: str, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One process for all jobs on CUDA, whose allocator tells their peaks apart, and one for each on a CPU."""
    if jobs[0]["device"] == "cuda":
        return in_own_process(script, jobs)
    return [in_own_process(script, [job])[0] for job in jobs]


def environment(device: str) -> dict[str, Any]:
    here = Path(__file__).parent
    try:
        command = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(command, capture_output=True, text=True, cwd=here).stdout.strip()
    except OSError:  # no git on this machine
        commit = ""
    facts = {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{_cpu()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit or "unknown",
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
