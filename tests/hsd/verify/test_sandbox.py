"""What programs try, under all layers and under each alone; `benchmarks/bench_verifiers.py` runs 1,000 of them."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time

import pytest

from hsd.verify import sandbox
from hsd.verify.sandbox import Isolation, Limits, isolation, run_program

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the sandbox's layers are Linux's"),
    pytest.mark.usefixtures("no_leftovers"),
]
LIMITS = Limits(timeout=20.0, output=1 << 20)
# Of an earlier program. The folder itself is in the sandbox where the environment that runs the tests lies below it.
NOTE = tempfile.NamedTemporaryFile()
X86 = r"""
import ctypes, mmap
page = mmap.mmap(-1, 4096, prot=7)
page.write(b"\xb8\x14\0\0\0\xcd\x80\xc3")  # mov eax, 20 (getpid); int 0x80; ret
ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
"""
FORBIDDEN = {
    "fork": "import os; os.fork()",
    "fork bomb": "import os\nwhile True: os.fork()",
    "spawn": "import subprocess; subprocess.run(['/bin/true'])",
    "multiprocessing": "import multiprocessing as m\np = m.get_context('fork').Process(target=print); p.start()",
    "exec": "import os; os.execv('/bin/sh', ['sh', '-c', 'true'])",
    "leave the session": "import os; os.setsid()",
    "kill": "import os; os.kill(os.getppid() or 1, 0)",
    "kill everything": "import os; os.kill(-1, 9)",
    "socket": "import socket; socket.socket()",
    "unix socket": "import socket; socket.socket(socket.AF_UNIX)",
    "name look-up": "import socket; socket.create_connection(('localhost', 1))",
    "read a file": "open('/etc/passwd').read()",
    "list a folder": "import os; os.listdir('/var')",
    "read the environment of others": "open('/proc/1/environ').read()",
    "write here": "open('x', 'w')",
    "write to /tmp": "open('/tmp/hsd-sandbox-was-here', 'w')",
    "write to /dev/shm": "open('/dev/shm/hsd-sandbox-was-here', 'w')",
    "make a folder": "import os; os.mkdir('x')",
    "delete": "import os; os.unlink('/tmp/hsd-sandbox-victim')",
    "change a file's mode": "import os; os.truncate('/tmp/hsd-sandbox-victim', 0)",
    "ten gigabytes": "x = bytearray(10 ** 10)",
    "threads without end": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(9,)).start()",
    "files without end": "import os\nwhile True: os.pipe()",
    "segmentation fault": "import ctypes; ctypes.string_at(0)",
    "own limits raised": "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))",
    "others' limits": "import resource; resource.prlimit(2, resource.RLIMIT_NOFILE, (9, 9))",
    "shared memory": "from multiprocessing import shared_memory as s; s.SharedMemory('x', True, 99)",
    "anonymous file": "import os; os.memfd_create('x')",
    "namespaces": "import ctypes; c = ctypes.CDLL(None); print(1 / (1 + c.unshare(0x10000000)))",
    "trace": "import ctypes; c = ctypes.CDLL(None); print(1 / (1 + c.ptrace(16, 1, 0, 0)))",
    "change a mode": "import os; os.chmod(os.__file__, 0o644)",
    "change the mode of an open file": "import os; os.fchmod(2, 0o644)",
    "change times": "import os; os.utime(os.__file__)",
    "change a device": "import os; os.chmod('/dev/null', 0o666)",
    "touch a device": "import os; os.utime('/dev/null')",
    "extended attributes": "import os; os.setxattr(os.__file__, 'user.note', b'1')",
    "owner": "import os; os.chown(os.__file__, 0, 0)",
    "stat of the trainer's files": f"import os; os.stat({os.path.abspath(__file__)!r})",
    "stat of a system file": "import os; os.stat('/etc/passwd')",
    "a note in the temporary folder": f"import os; os.stat({NOTE.name!r})",
    "owner of a signal": "import fcntl, os; r, w = os.pipe(); fcntl.fcntl(r, fcntl.F_SETOWN, 1)",
    "signal of a file": "import fcntl, os; r, w = os.pipe(); fcntl.fcntl(r, fcntl.F_SETSIG, 9)",
    "owner by ioctl": "import fcntl, os, struct; r, w = os.pipe(); fcntl.ioctl(r, 0x8901, struct.pack('i', 1))",
    "lock": "import fcntl, os; fcntl.flock(os.open(os.__file__, os.O_RDONLY), fcntl.LOCK_SH)",
    "record lock": "import fcntl, os; fcntl.lockf(os.open(os.__file__, os.O_RDONLY), fcntl.LOCK_SH)",
    "another's priority": "import os; os.getpriority(os.PRIO_PROCESS, 1)",
    "another's cores": "import os; os.sched_getaffinity(1)",
    "another's group": "import os; os.getpgid(1)",
    "system call of 32 bits": X86,
    "locked memory": "import ctypes as c; print(1 / (1 + c.CDLL(None).mlock(c.create_string_buffer(9), 9)))",
    "lease": "import fcntl, os; fcntl.fcntl(os.open(os.__file__, os.O_RDONLY), fcntl.F_SETLEASE, fcntl.F_WRLCK)",
    "forget the parent's death": "import ctypes; c = ctypes.CDLL(None); print(1 / (1 + c.prctl(1, 0, 0, 0, 0)))",
    "key ring": "import ctypes; c = ctypes.CDLL(None); print(1 / (1 + c.syscall(250, 0, -3, 0)))",
    "fchmodat2": "import ctypes; c = ctypes.CDLL(None); print(1 / (1 + c.syscall(452, -100, b'/dev/null', 0o666, 0)))",
    "recursion": "f = lambda: f()\nf()",
    "deep nesting": "eval('(' * 10 ** 5)",
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_a_program_may_not(name):
    if isolation().level != "strong":
        pytest.skip(f"this machine's isolation is {isolation()}")
    endless = name == "threads without end"
    outcome = run_program(FORBIDDEN[name], "", Limits(timeout=2.0) if endless else LIMITS)
    assert outcome.status in ("crashed", "timeout") if endless else outcome.status == "crashed", outcome
    assert not os.path.exists("/tmp/hsd-sandbox-was-here") and not os.path.exists("/dev/shm/hsd-sandbox-was-here")


@pytest.mark.parametrize("layers", [(), ("bubblewrap",), ("landlock",), ("seccomp",)])
def test_each_layer_alone_runs_programs(layers):
    if "bubblewrap" in layers and "bubblewrap" not in isolation().layers:
        pytest.skip("bubblewrap does not start here")
    outcome = sandbox._run("import json, numbers; print(int(input()) + 1)", stdin="41", layers=layers)
    assert (outcome.status, outcome.stdout) == ("finished", b"42\n"), outcome
    assert set(outcome.layers) <= set(layers)


STOPPED_BY = {
    "bubblewrap": ["read a file", "list a folder", "write here", "write to /tmp", "make a folder", "change a mode",
                   "change times", "change a device", "touch a device", "extended attributes", "owner", "name look-up",
                   "stat of the trainer's files", "stat of a system file", "a note in the temporary folder"],
    "seccomp": ["fork", "exec", "leave the session", "kill", "socket", "anonymous file", "others' limits", "lease",
                "lock", "record lock", "another's priority", "another's cores", "another's group",
                "system call of 32 bits", "locked memory",
                "change a mode", "change the mode of an open file", "change times", "change a device", "touch a device",
                "extended attributes", "owner", "owner of a signal", "signal of a file", "owner by ioctl", "fchmodat2",
                "forget the parent's death", "key ring", "write here" if os.geteuid() else "fork"],
    "landlock": ["read a file", "list a folder", "write here", "write to /tmp", "make a folder", "exec"],
}  # fmt: skip


@pytest.mark.parametrize("layer", STOPPED_BY)
def test_what_a_layer_alone_stops(layer):
    control = sandbox._run("print(1)", layers=(layer,)) if layer != "bubblewrap" or sandbox.bubblewrap() else None
    if control is None or control.layers != (layer,):
        pytest.skip(f"no {layer} here")
    passed = [n for n in STOPPED_BY[layer] if sandbox._run(FORBIDDEN[n], layers=(layer,)).status != "crashed"]
    assert not passed


def test_a_level_says_what_it_stops():
    """Each promise of `STOPS` by what a program tries; a level that lets one through is not called strong."""
    tried = {
        "reading and writing files": ["read a file", "write to /tmp"],
        "chmod, utime, setxattr on files": ["change a mode", "change times", "extended attributes", "change a device"],
        "stat of any path": ["stat of a system file", "stat of the trainer's files"],
        "notes for later programs": ["a note in the temporary folder", "write here"],
        "network": ["socket", "name look-up"],
        "signals to other processes": ["kill", "owner of a signal", "signal of a file"],
        "new processes and other programs": ["fork", "exec"],
        "tracing, shared memory, kernel interfaces": ["trace", "shared memory", "key ring"],
    }
    assert tried.keys() == sandbox.STOPS.keys()
    for layers in (isolation().layers, ("landlock", "seccomp"), ("seccomp",)):
        control = sandbox._run("print(1)", layers=layers)
        for what, stopped in Isolation(control.layers, 7).stops.items():
            for name in tried[what] if stopped else []:
                outcome = sandbox._run(FORBIDDEN[name], layers=layers)
                assert outcome.status == "crashed", (layers, what, name, outcome)


def test_without_layers_the_group_is_still_killed():
    """Children that stay in the program's process group end with it, and the limits hold."""
    fork = "import os, time\nif os.fork() == 0:\n    time.sleep(60)\nprint(1)"
    outcome = sandbox._run(fork, layers=(), limits=LIMITS)
    assert outcome.status == "finished"  # the fixture finds no leftovers
    assert "MemoryError" in sandbox._run(FORBIDDEN["ten gigabytes"], layers=()).detail


def test_the_environment_and_the_working_directory_are_the_programs_own(monkeypatch):
    monkeypatch.setenv("API_TOKEN", "secret")
    outcome = run_program("import os; print(sorted(os.environ), os.getcwd())", "", LIMITS)
    names, folder = outcome.stdout.decode().rsplit(" ", 1)
    assert "API_TOKEN" not in names and folder.strip() != os.getcwd()


def test_text_that_is_not_text():
    assert run_program("import sys; sys.stdout.buffer.write(bytes(range(256)))", "", LIMITS).stdout == bytes(range(256))
    assert run_program("print(input())", "\udcff\u00e9", LIMITS).status in ("finished", "crashed")
    assert run_program("x = '\ud800'", "", LIMITS).status in ("finished", "crashed")
    assert run_program("x = '\0'", "", LIMITS).status == "crashed"


def test_a_layer_that_is_no_longer_granted_is_the_verifiers_failure():
    layers = isolation().layers
    outcome = sandbox._run("print(1)", layers=layers[1:], expected=layers)
    assert outcome.status == "verifier_failed" and "expected" in outcome.detail


def test_a_sandbox_that_does_not_start_is_the_verifiers_failure(monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox, "HARNESS", tmp_path / "absent.py")
    outcome = run_program("print(1)", "", LIMITS)
    assert outcome.status == "verifier_failed" and "did not start" in outcome.detail


def test_isolation_is_printable_and_says_what_is_missing():
    weak = Isolation(("landlock", "seccomp"), 7)
    assert weak.level == "partial" and "apt install bubblewrap" in weak.remedy
    assert "not stopped: stat of any path, notes for later programs" in str(weak) and "landlock 7" in str(weak)
    assert Isolation((), 0).level == "limits" and "pyseccomp" in Isolation((), 0).remedy
    strong = Isolation(("bubblewrap", "seccomp"), 7)
    assert strong.level == "strong" and not strong.remedy and all(strong.stops.values())


def test_a_full_disk_is_no_fault_of_the_program(monkeypatch, tmp_path):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sandbox.tempfile, "mkdtemp", full)
    monkeypatch.setattr(sandbox.tempfile, "TemporaryFile", full)
    assert run_program("print(1)", "", LIMITS).stdout == b"1\n"


def test_cpu_time_decides_and_a_machine_that_is_busy_is_not_the_programs_fault(monkeypatch):
    spin = "n = 0\nwhile True: n += 1"
    assert run_program(spin, "", Limits(timeout=1.0)).status == "timeout"
    assert (
        run_program(
            "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\n" + spin, "", Limits(timeout=1.0)
        ).status
        == "timeout"
    )
    assert run_program("import time; time.sleep(60)", "", Limits(timeout=1.0)).status == "timeout"
    clock = time.monotonic()
    monkeypatch.setattr(sandbox, "_waited", lambda pid: time.monotonic() - clock)
    monkeypatch.setattr(sandbox, "WIDE", 4)
    outcome = run_program("import time; time.sleep(60)", "", Limits(timeout=1.0))
    assert outcome.status == "verifier_failed" and "busy" in outcome.detail


def test_a_program_that_is_killed_from_outside_is_not_judged():
    """The system's out-of-memory killer; a program itself may not send signals."""
    results = []
    thread = threading.Thread(target=lambda: results.append(run_program("import time; time.sleep(30)", "", LIMITS)))
    thread.start()
    deadline = time.monotonic() + 20
    while len(found := _below(os.getpid(), "harness.py")) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(max(_below(os.getpid(), "harness.py")), signal.SIGKILL)
    thread.join()
    assert results[0].status == "verifier_failed" and "killed from outside" in results[0].detail, (results, found)


def _below(pid: int, word: str) -> list[int]:
    found, pids = [], [pid]
    for parent in pids:
        for thread in os.listdir(f"/proc/{parent}/task"):
            try:
                with open(f"/proc/{parent}/task/{thread}/children") as file:
                    pids += map(int, file.read().split())
                with open(f"/proc/{parent}/cmdline") as file:
                    if word in file.read() and parent != pid and parent not in found:
                        found.append(parent)
            except OSError:
                pass
    return found


def test_the_order_of_a_set_is_the_same_in_each_run():
    program = "print({str(i) for i in range(50)})"
    assert len({run_program(program, "", LIMITS).stdout for _ in range(3)}) == 1


def test_programs_end_with_the_process_that_runs_them():
    """A trainer that is killed leaves no program behind."""
    code = (
        "from hsd.verify.sandbox import Limits, run_program\n"
        "run_program('import time\\nprint(1, flush=True)\\ntime.sleep(60)', 'hsd-orphan', Limits(timeout=60))"
    )
    trainer = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    started, deadline = [], time.monotonic() + 60
    while not started and time.monotonic() < deadline:  # one look may miss a process that another one becomes
        time.sleep(0.3)
        started = _harnesses(trainer.pid)
    trainer.kill()
    trainer.wait()
    deadline = time.monotonic() + 5
    while any(os.path.exists(f"/proc/{pid}") for pid in started) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert started and not any(os.path.exists(f"/proc/{pid}") for pid in started)


def _harnesses(parent: int) -> list[int]:
    """The harness below `parent` and its program."""
    tree: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as stat:
                tree.setdefault(int(stat.read().rsplit(")", 1)[1].split()[1]), []).append(int(name))
        except OSError:
            continue
    first = tree.get(parent, [])
    for pid in first:
        first += tree.get(pid, [])
    return first
