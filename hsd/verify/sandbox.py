"""Runs a program, and the tests that judge it, in a child process that is shut in and always killed.

`child/harness.py` is the other side, `child/confine.py` what it gives up. Each run is a fresh `python -I` in its own
session with an empty environment and a temporary working directory; all of its processes are killed when it ends or
its time is over. The verdict comes back in a file that the program has not open, with a number it has not seen.
"""

from __future__ import annotations

import functools
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

HARNESS = Path(__file__).parent / "child" / "harness.py"
LAYERS = ("user", "namespaces", "landlock", "seccomp")  # child/confine.py says what each one is
REPORT = 64 << 10  # bytes of the verdict and of stderr that are read


@dataclass(frozen=True)
class Limits:
    timeout: float = 10.0  # seconds of wall clock for one process, its start included
    memory: int = 1 << 30  # bytes of address space
    output: int = 16 << 20  # bytes of stdout


@dataclass(frozen=True)
class Outcome:
    status: str  # of `hsd.verify.status`; "finished": stdout counts
    detail: str = ""
    stdout: bytes = b""
    layers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Isolation:
    """What this machine grants a sandboxed program. Detected once; every later run must get the same or fails."""

    platform: str
    layers: tuple[str, ...]
    landlock_abi: int
    missing: tuple[str, ...] = ()

    @property
    def level(self) -> str:
        """ "strong": files, network, processes and signals are closed. "partial": some of them. "limits": none."""
        if {"landlock", "seccomp"} <= set(self.layers):
            return "strong"
        return "partial" if self.layers else "limits"

    def __str__(self) -> str:
        have = ", ".join(f"landlock {self.landlock_abi}" if n == "landlock" else n for n in self.layers) or "none"
        lack = f"; not granted: {', '.join(self.missing)}" if self.missing else ""
        return f"{self.level} (layers: {have}{lack}; always: own session, rlimits, empty environment, kill on timeout)"


@functools.cache
def isolation() -> Isolation:
    """Tries the layers on a program that must still be able to import. Raises RuntimeError where none of them runs."""
    # As nobody, or without root's capabilities, the Python installation may be unreadable: then without these two.
    failures = []
    for tried in (LAYERS, LAYERS[1:], LAYERS[2:]):
        outcome = _run("import colorsys", layers=tried)
        if outcome.status == "finished":
            found = Isolation(sys.platform, outcome.layers, _landlock_abi(), _missing(outcome.layers))
            if found.level != "strong":
                warnings.warn(f"programs are judged in a weaker sandbox: {found}", stacklevel=2)
            return found
        failures.append(outcome.detail)
    raise RuntimeError(f"the code sandbox does not run here: {failures[-1]}")


def _missing(layers: tuple[str, ...]) -> tuple[str, ...]:
    possible = [n for n in LAYERS if n != "user" or os.geteuid() == 0]
    return tuple(n for n in possible if n not in layers)


def _landlock_abi() -> int:
    code = f"import sys; sys.path.append({str(HARNESS.parent)!r}); import confine; print(confine.landlock_abi())"
    return int(subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, timeout=60).stdout or 0)


def run_program(program: str, stdin: str, limits: Limits) -> Outcome:
    """Runs a script on `stdin`; "finished" with its stdout, or what went wrong."""
    layers = isolation().layers
    return _run(program, stdin=stdin, limits=limits, layers=layers, expected=layers)


def run_tests(program: str, setup: str, source: str, names: tuple[str, ...], limits: Limits) -> Outcome:
    """Runs `source` (it raises if the program is wrong) after `setup` in one process, where `names` are stand-ins for
    what `program` defines in another. Arguments and results cross as plain data, by value."""
    layers = isolation().layers
    tests = {"setup": setup, "source": source, "names": list(names)}
    return _run(program, tests=tests, limits=limits, layers=layers, expected=layers)


def _run(
    program: str,
    stdin: str = "",
    tests: dict[str, Any] | None = None,
    limits: Limits | None = None,
    layers: tuple[str, ...] = LAYERS,
    expected: tuple[str, ...] | None = None,
) -> Outcome:
    limits = limits or Limits(timeout=60.0)
    nonce = secrets.token_hex(16)
    job: dict[str, Any] = {
        "mode": "stdin" if tests is None else "tests",
        "program": program,
        "layers": layers,
        "timeout": limits.timeout,
        "memory": limits.memory,
        "file_size": limits.output,
    }
    if expected is not None:
        job["expected"] = expected
    with tempfile.TemporaryDirectory(prefix="hsd-", ignore_cleanup_errors=True) as folder, _files() as files:
        job_file, secret_file, verdict_file, input_file, output_file, error_file = files
        _fill(job_file, json.dumps(job))
        _fill(secret_file, json.dumps({"nonce": nonce, **(tests or {})}))
        _fill(input_file, stdin)
        inherited = [f.fileno() for f in (job_file, secret_file, verdict_file)]
        child = subprocess.Popen(
            [sys.executable, "-I", "-B", str(HARNESS), *map(str, inherited)],
            stdin=input_file,
            stdout=output_file if tests is None else subprocess.DEVNULL,
            stderr=error_file,
            cwd=folder,
            env={},
            pass_fds=inherited,
            start_new_session=True,
        )
        in_time = _wait_and_kill(child, limits.timeout)
        return _outcome(files, nonce, in_time, limits)


class _files:
    """Six open files without a name. Files, not pipes: nothing blocks, and RLIMIT_FSIZE caps what is written."""

    def __enter__(self) -> list[IO[bytes]]:
        self.files: list[IO[bytes]] = [tempfile.TemporaryFile() for _ in range(6)]
        return self.files

    def __exit__(self, *_: object) -> None:
        for file in self.files:
            file.close()


def _fill(file: IO[bytes], text: str) -> None:
    file.write(text.encode("utf-8", "surrogatepass"))
    file.flush()
    file.seek(0)


def _wait_and_kill(child: subprocess.Popen, timeout: float) -> bool:
    """Whether the child ended in time. Afterwards nothing of its process group runs."""
    try:
        return _ended(child, timeout)
    finally:
        try:
            os.killpg(child.pid, signal.SIGKILL)  # before the child is reaped: until then its number is its own
        except (ProcessLookupError, PermissionError):  # macOS refuses for a group of zombies
            pass
        child.wait()


def _ended(child: subprocess.Popen, timeout: float) -> bool:
    if hasattr(os, "pidfd_open"):
        try:
            fd = os.pidfd_open(child.pid)
        except OSError:  # before Linux 5.3
            pass
        else:
            try:
                poll = select.poll()
                poll.register(fd, select.POLLIN)
                return bool(poll.poll(timeout * 1000))
            finally:
                os.close(fd)
    try:
        child.wait(timeout)
        return True
    except subprocess.TimeoutExpired:
        return False


def _outcome(files: list[IO[bytes]], nonce: str, in_time: bool, limits: Limits) -> Outcome:
    _, _, verdict_file, _, output_file, error_file = files
    lines = [json.loads(line) for line in _contents(verdict_file, REPORT).splitlines()]
    lines = [line for line in lines if line["nonce"] == nonce]
    errors = _tail(error_file).decode(errors="replace").strip()
    if not lines:
        what = "did not start in time" if not in_time else "did not start"
        return Outcome("verifier_failed", f"the sandbox {what}: {errors[-500:]}")
    last = lines[-1]
    layers, detail = tuple(last["layers"]), last.get("detail", "")
    if last["status"] == "started":
        return Outcome("crashed" if in_time else "timeout", errors[-1500:], layers=layers)
    stdout = _contents(output_file, limits.output + 1)
    if len(stdout) >= limits.output:
        return Outcome("too_long", f"stdout reached {limits.output} bytes", layers=layers)
    if last["status"] == "crashed" and errors:
        detail = f"{errors[-1500:]}\n{detail}".strip()
    return Outcome(last["status"], detail, stdout, layers)


def _contents(file: IO[bytes], size: int) -> bytes:
    file.seek(0)
    return file.read(size)


def _tail(file: IO[bytes]) -> bytes:
    file.seek(max(0, os.fstat(file.fileno()).st_size - REPORT))
    return file.read(REPORT)
