"""What programs try, under all layers and under each alone; `benchmarks/bench_verifiers.py` runs 1,000 of them."""

import os
import subprocess
import sys
import time

import pytest

from hsd.verify import sandbox
from hsd.verify.sandbox import Isolation, Limits, isolation, run_program

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the sandbox's layers are Linux's"),
    pytest.mark.usefixtures("no_leftovers"),
]
LIMITS = Limits(timeout=20.0, output=1 << 20)
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
    "list a folder": "import os; os.listdir('/')",
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


@pytest.mark.parametrize("layers", [(), ("namespaces",), ("landlock",), ("seccomp",)])
def test_each_layer_alone_runs_programs(layers):
    outcome = sandbox._run("import json, numbers; print(int(input()) + 1)", stdin="41", layers=layers)
    assert (outcome.status, outcome.stdout) == ("finished", b"42\n"), outcome
    assert set(outcome.layers) <= set(layers)


def test_what_seccomp_alone_stops():
    for name in ("fork", "exec", "leave the session", "kill", "socket", "anonymous file", "others' limits"):
        outcome = sandbox._run(FORBIDDEN[name], layers=("seccomp",))
        if not outcome.layers:
            pytest.skip("no seccomp filters here")
        assert outcome.status == "crashed" and "Operation not permitted" in outcome.detail, name


def test_what_landlock_alone_stops():
    for name in ("read a file", "list a folder", "write here", "write to /tmp", "make a folder", "exec"):
        outcome = sandbox._run(FORBIDDEN[name], layers=("landlock",))
        if not outcome.layers:
            pytest.skip("no Landlock here")
        assert outcome.status == "crashed" and "Permission denied" in outcome.detail, (name, outcome)


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
    assert "API_TOKEN" not in names and folder.strip() != os.getcwd() and not os.path.exists(folder.strip())


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
    weak = Isolation("linux", ("seccomp",), 0, ("landlock",))
    assert weak.level == "partial" and "not granted: landlock" in str(weak)
    assert Isolation("darwin", (), 0).level == "limits"
    assert Isolation("linux", ("landlock", "seccomp"), 7).level == "strong"
    assert "landlock 7" in str(Isolation("linux", ("landlock", "seccomp"), 7))


def test_programs_end_with_the_process_that_runs_them():
    """A trainer that is killed leaves no program behind."""
    code = (
        "from hsd.verify.sandbox import Limits, run_program\n"
        "run_program('import time\\nprint(1, flush=True)\\ntime.sleep(60)', 'hsd-orphan', Limits(timeout=60))"
    )
    trainer = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    deadline = time.monotonic() + 20
    while not _harnesses(trainer.pid) and time.monotonic() < deadline:
        time.sleep(0.02)
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
    return first + [pid for child in first for pid in tree.get(child, [])]
