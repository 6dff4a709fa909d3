"""Rows of the GPU suite: each is saved as it is made, and one that fails, hangs or ends the process is a row too.

`gpu_suite.sh` starts a part again where its process ended: rows that are there are not made twice, and the row that
was being made gets its reason.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
AGAIN = 75  # exit status that asks gpu_suite.sh for a new process
ROW_SECONDS = 60.0
EXPECTED = ("is not installed", "needs a GPU", "is not there", "out of memory")  # no fault of the suite
STICKY = ("CUDA error", "device-side assert", "illegal memory access", "unspecified launch failure")


class Recorder:
    """Appends rows to FOLDER/rows.jsonl. After ``deadline`` (seconds since the epoch) no row is begun."""

    def __init__(self, folder: Path, device: str, deadline: float = float("inf"), only: str = "") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.begun = folder / "rows.jsonl", folder / "begun.json"
        self.device, self.deadline, self.only = device, deadline, only.split()
        self.rows = load(self.path)
        if self.begun.exists():
            self._append(json.loads(self.begun.read_text()) | {"failed": "the process ended in this row"})

    def row(self, table: str, key: Row, make: Callable[[], Row], seconds: float = ROW_SECONDS) -> Row:
        """The row ``key | make()`` of ``table``. One that takes longer than ``seconds`` ends the process."""
        row = {"table": table} | json.loads(json.dumps(key))
        for old in self.rows:
            if all(old.get(name) == value for name, value in row.items()):
                return old
        if time.time() > self.deadline:
            return self._append(row | {"failed": "no time was left"})
        self.begun.write_text(json.dumps(row))
        watchdog = threading.Timer(seconds, self._hung, (row, seconds))
        watchdog.daemon = True
        watchdog.start()
        start, broken = time.perf_counter(), False
        try:
            row |= make()
            synchronize(self.device)
        except Exception as error:
            reason = reason_of(error)
            row["failed"] = reason
            broken = self.device == "cuda" and any(sign in reason for sign in STICKY)
        watchdog.cancel()
        row["row_seconds"] = round(time.perf_counter() - start, 2)
        self._append(row)
        if broken:  # nothing runs in this process any more
            sys.stdout.flush()
            os._exit(AGAIN)
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
        return row

    def wants(self, *tables: str) -> bool:
        return not self.only or any(table in self.only for table in tables)

    def skip(self, table: str, key: Row, reason: str) -> None:
        self.row(table, key, lambda: {"failed": reason})

    def faults(self) -> list[Row]:
        return [r for r in self.rows if "failed" in r and not r["failed"].endswith(EXPECTED)]

    def _append(self, row: Row) -> Row:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.begun.unlink(missing_ok=True)
        self.rows.append(row)
        return row

    def _hung(self, row: Row, seconds: float) -> None:
        self._append(row | {"failed": f"took longer than {seconds:.0f} s"})
        sys.stdout.flush()
        os._exit(AGAIN)


def load(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def reason_of(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return (f"{type(error).__name__}: {error}".splitlines() or [""])[0][:160]


def add_wheels(folder: str) -> None:
    """Wheels of pure Python packages onto the path: zip files are importable, but their data files and their
    ``triton.jit`` sources are not, so that they are unpacked beside themselves."""
    import zipfile

    target = Path(folder) / "unpacked"
    for wheel in sorted(Path(folder).glob("*.whl")):
        done = target / f".{wheel.name}"
        if not done.exists():
            zipfile.ZipFile(wheel).extractall(target)
            done.touch()
    if target.exists():
        sys.path.append(str(target))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(target)]))


def missing(*modules: str) -> str | None:
    """A named reason if one of these cannot be imported."""
    for name in modules:
        try:
            found = importlib.util.find_spec(name) is not None
        except ImportError:
            found = False
        if not found:
            return f"{name} is not installed"
    return None


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(run: Callable[[], Any], device: str) -> float:
    """One call: of the device's own clock on CUDA, host time until it is done elsewhere."""
    if device != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def timed(run: Callable[[], Any], device: str, repeats: int, warmups: int = 1) -> Row:
    for _ in range(warmups):
        run()
    return quantiles([seconds_of(run, device) for _ in range(repeats)])


def in_turns(
    first: Callable[[], Any], second: Callable[[], Any], device: str, repeats: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Both timed in turns, so that a clock that falls as the card warms slows both alike."""
    first(), second()
    pairs = [(seconds_of(first, device), seconds_of(second, device)) for _ in range(repeats)]
    one, two = zip(*pairs, strict=True)
    return quantiles(list(one)), quantiles(list(two))


def quantiles(times: list[float]) -> dict[str, float]:
    times = sorted(times)
    return {"median": statistics.median(times), "p20": times[len(times) // 5], "p80": times[len(times) * 4 // 5]}


def markdown(header: list[str], rows: list[list[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"
