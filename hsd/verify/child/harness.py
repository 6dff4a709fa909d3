"""The sandbox from inside: `python -S -s -P -B harness.py JOB SECRET VERDICT`, three open files. Never imported.

This process is the keeper. It forks the program, which gets its own source and, for tests, one socket; then it shuts
itself in too, reads the tests (SECRET) and runs them here, where the program's functions are stand-ins that ask the
program over the socket. The program never sees the tests, and the verdict goes to a file that it has not open.
"""

from __future__ import annotations

import builtins
import json
import linecache
import os
import signal
import socket
import sys
import time
import traceback
import types
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import confine
import wire

sys.path.pop(0)


def main() -> None:
    job_fd, secret_fd, verdict_fd = map(int, sys.argv[1:])
    job = json.loads(_read(job_fd))
    inside = "bubblewrap" in job["layers"]
    confine.lower_limits(job["timeout"], job["memory"], job["file_size"], confine.THREADS if inside else None)
    _die_first()
    _look_like_python(job["packages"])
    separated = (["bubblewrap"] if inside else []) + confine.become_nobody(job["layers"])
    confine.die_with_parent()
    outer = separated + confine.shut_files(job["layers"], job["readable"])
    here, there = socket.socketpair()
    granted, grants = os.pipe()
    pid = os.fork()
    if pid == 0:
        _program(job, there, grants, separated)
    there.close()
    os.close(grants)
    mine = outer + confine.shut_calls(job["layers"], bytes.fromhex(job["filter"]))
    secret = json.loads(_read(secret_fd))
    verdict: dict[str, Any] = {"nonce": secret["nonce"], "layers": mine}
    theirs = os.read(granted, 100).decode().split()  # written before the program runs
    if theirs != mine:
        _finish(verdict_fd, verdict | {"status": "verifier_failed", "detail": f"sandbox: {theirs}, tests: {mine}"})
    if mine != job.get("expected", mine):
        detail = f"sandbox: expected {job['expected']}, got {mine}"
        _finish(verdict_fd, verdict | {"status": "verifier_failed", "detail": detail})
    _append(verdict_fd, verdict | {"status": "started"})
    sys.set_int_max_str_digits(0)
    outcome = _run_tests(secret, here) if job["mode"] == "tests" else {"gone": True, "wait": True}
    if outcome.pop("gone", False):  # how the program ended says more
        outcome |= _ended(pid, job["timeout"], outcome.pop("wait", False))
    _finish(verdict_fd, verdict | outcome)


def _look_like_python(packages: list[str]) -> None:
    """What `site` would have done, which is slow (this runs with -S), without ``.pth`` files."""
    import _sitebuiltins

    sys.path += packages
    for name in ("exit", "quit"):
        setattr(builtins, name, _sitebuiltins.Quitter(name, "Ctrl-D"))
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # one buffer per core would not fit into the address space
    os.environ.pop("PYTHONHASHSEED", None)


def _read(fd: int) -> bytes:
    with os.fdopen(fd, "rb") as file:
        return file.read()


def _append(fd: int, line: dict[str, Any]) -> None:
    os.write(fd, json.dumps(line).encode() + b"\n")


def _finish(fd: int, line: dict[str, Any]) -> None:
    _append(fd, line)
    os._exit(0)


def _die_first() -> None:
    """If the machine runs out of memory, this process goes before the trainer."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError:
        pass


def _ended(pid: int, limit: float, wait: bool) -> dict[str, Any]:
    """How the program ended, and its CPU time; nothing where it still runs."""
    for _ in range(1 if wait else 50):
        done, status, used = os.wait4(pid, 0 if wait else os.WNOHANG)
        if done:
            break
        time.sleep(0.02)  # it closed its channel, and may be on its way out
    else:
        return {}
    code, cpu = os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime
    if code == -signal.SIGXCPU or (code == -signal.SIGKILL and cpu >= limit):
        return {"status": "timeout", "detail": f"{limit:g} s of CPU time"}
    if code == -signal.SIGKILL:  # it cannot do that itself
        return {"status": "verifier_failed", "detail": "the program was killed from outside: out of memory?"}
    if not wait:
        return {}
    if code == 0:
        return {"status": "finished", "cpu": cpu}
    return {"status": "crashed", "detail": f"exit code {code}" if code > 0 else f"killed by signal {-code}"}


# What LiveCodeBench's harness has imported when a program starts, and its recursion depth.
_MODULES = (
    *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics"),
    *("itertools", "functools", "operator", "io", "sys", "json", "builtins", "typing"),
)
OFFICIAL = "\n".join(
    [*(f"from {m} import *" for m in _MODULES), f"import {', '.join(_MODULES)}", "sys.setrecursionlimit(50_000)"]
)


def _program(job: dict[str, Any], channel: socket.socket, grants: int, separated: list[str]) -> None:
    code = 1
    try:
        confine.die_with_parent()
        tests = job["mode"] == "tests"
        granted = separated + confine.shut_files(job["layers"], job["readable"])
        granted += confine.shut_calls(job["layers"], bytes.fromhex(job["filter"]))
        os.write(grants, " ".join(granted).encode())
        rpc = os.dup2(channel.fileno(), 3) if tests else 2
        kept = [grants, channel.fileno(), *map(int, sys.argv[1:])]  # the keeper's files
        os.closerange(rpc + 1, max(kept) + 16)
        sys.argv[:] = ["program.py"]
        linecache.cache["program.py"] = (0, None, job["program"].splitlines(True), "program.py")  # for tracebacks
        module = types.ModuleType("program" if tests else "__main__")
        module.__dict__["__builtins__"] = builtins
        sys.modules[module.__name__] = module
        sys.set_int_max_str_digits(0)
        if job["official"]:
            exec(OFFICIAL, module.__dict__)
        if tests:
            _serve(socket.socket(fileno=rpc), module, job["program"])
        code = _run(module, job["program"])
    except wire.Gone:
        pass  # the tests are over
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _run(module: types.ModuleType, source: str) -> int:
    import atexit
    import threading

    code = 0
    try:
        exec(compile(source, "program.py", "exec", dont_inherit=True), module.__dict__)
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 0 if exit_.code is None else 1
    except BaseException:
        _print_error()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    return code & 0xFF


def _print_error() -> None:
    try:
        traceback.print_exc(limit=-3)
    except BaseException as error:  # an exception whose __str__ raises
        os.write(2, f"{type(error).__name__} while printing the error".encode())


def _serve(channel: socket.socket, module: types.ModuleType, source: str) -> None:
    objects: list[Any] = []

    def refer(value: Any) -> int:
        objects.append(value)
        return len(objects) - 1

    def answer(ask: list[Any]) -> Any:
        what, *rest = ask
        if what == "load":
            exec(compile(source, "program.py", "exec", dont_inherit=True), module.__dict__)
            return [name for name in vars(module) if isinstance(name, str)]
        if what == "get":
            return getattr(module, rest[0])
        if what == "next":
            return next(objects[rest[0]])
        if what == "attribute":
            return getattr(objects[rest[0]], rest[1])
        args, kwargs = (wire.decode(x, objects.__getitem__) for x in rest[1:])
        return objects[rest[0]](*args, **kwargs)

    while True:
        ask = wire.receive(channel)
        try:
            reply = ["value", wire.encode(answer(ask), refer)]
            wire.send(channel, reply)
            continue
        except SystemExit:
            reply = ["raise", "SystemExit", "the program exited"]
        except BaseException as error:
            reply = ["raise", type(error).__name__, _last_lines()]
        wire.send(channel, reply)


def _last_lines() -> str:
    try:
        return traceback.format_exc(limit=-2)[-1500:]
    except BaseException as error:
        return f"{type(error).__name__} while printing the error"


class Remote:
    """An object of the program: called and asked for attributes over the socket, compared by identity only."""

    def __init__(self, program: _Program, number: int):
        self._program, self._number = program, number

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            encoded = [wire.encode(x, _number_of) for x in (list(args), kwargs)]
        except (Unsupported, RecursionError) as error:
            self._program.unsupported = str(error)
            raise Unsupported(str(error)) from None
        return self._program.ask("call", self._number, *encoded)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_program") or name == "_number":
            raise AttributeError(name)
        return self._program.ask("attribute", self._number, name)

    def __next__(self) -> Any:
        return self._program.ask("next", self._number)

    def __bool__(self) -> bool:  # and no __contains__: `assert x in f()` is answered here, item by item
        raise TypeError("expected plain data from the program, got an object, whose truth is its own")


class Unsupported(BaseException):
    """The tests pass what cannot cross. Not an Exception: a test's ``except`` lets it pass."""


def _number_of(value: Any) -> int:
    if isinstance(value, Remote):
        return value._number
    raise Unsupported(f"the tests pass the program a {type(value).__name__}; only plain data can cross")


def _forward(name: str) -> Any:
    def method(self: Remote, *args: Any) -> Any:
        try:
            bound = self.__getattr__(name)
        except AttributeError as error:  # list() asks for a length and goes on without
            raise TypeError(f"object of the program has no {name}") from error
        return bound(*args)

    return method


for _name in ("__iter__", "__len__", "__getitem__", "__str__", "__repr__"):
    setattr(Remote, _name, _forward(_name))


class _Program:
    def __init__(self, channel: socket.socket):
        self.channel, self.gone, self.unsupported, self.asked = channel, "", "", 0

    def ask(self, *message: Any) -> Any:
        self.asked += message[0] not in ("load", "get")
        try:
            wire.send(self.channel, message)
            kind, *rest = wire.receive(self.channel)
            if kind == "value":
                return wire.decode(rest[0], lambda number: Remote(self, number))
            name, text = rest
        except wire.Gone as gone:
            self.gone = str(gone)
            raise
        except (OSError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError) as error:
            self.gone = f"the program's answer cannot be read: {type(error).__name__}"
            raise wire.Gone(self.gone) from None
        kind = getattr(builtins, name, None)
        if kind is StopIteration and message[0] != "next":
            kind = RuntimeError  # it would end a test's map() or zip() early and unseen
        if not (isinstance(kind, type) and issubclass(kind, Exception)):
            kind = type(name, (Exception,), {}) if name.isidentifier() else Exception
        try:
            error = kind(text)
        except TypeError:  # UnicodeDecodeError and its like want more arguments
            error = Exception(text)
        error._program = True  # type: ignore[attr-defined]
        raise error


def _run_tests(secret: dict[str, Any], channel: socket.socket) -> dict[str, Any]:
    try:
        setup = compile(secret["setup"], "setup.py", "exec", dont_inherit=True)
        source = compile(secret["source"], "tests.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        return {"status": "verifier_failed", "detail": f"tests: {type(error).__name__}: {error}"}
    linecache.cache["tests.py"] = (0, None, secret["source"].splitlines(True), "tests.py")
    program = _Program(channel)
    outcome = _verdict(program, secret, setup, source)
    if program.gone:  # whatever the tests made of it
        return {"status": "crashed", "detail": program.gone, "gone": True}
    if program.unsupported:
        return {"status": "verifier_failed", "detail": program.unsupported}
    if outcome["status"] == "correct" and not program.asked:
        return {"status": "verifier_failed", "detail": "the tests ask nothing of the program"}
    return outcome


def _verdict(program: _Program, secret: dict[str, Any], setup: Any, source: Any) -> dict[str, Any]:
    try:
        space: dict[str, Any] = {"__name__": "tests", "__builtins__": builtins}
        if secret.get("cases") is not None:
            space["CASES"] = wire.decode(secret["cases"], list().__getitem__)
        exec(setup, space)
    except BaseException as error:
        return {"status": "verifier_failed", "detail": f"setup: {_describe(error)}"}
    try:
        present = program.ask("load")
        names = [name for name in secret["names"] if isinstance(present, list) and name in present]
        space.update({name: program.ask("get", name) for name in names})
    except BaseException as error:
        return {"status": "crashed", "detail": _describe(error)}
    try:
        exec(source, space)
    except wire.Gone as gone:
        return {"status": "crashed", "detail": str(gone)}
    except BaseException as error:
        return {"status": "crashed" if hasattr(error, "_program") else "incorrect", "detail": _describe(error)}
    return {"status": "correct", "detail": ""}


def _describe(error: BaseException) -> str:
    try:
        if hasattr(error, "_program"):
            return str(error)[-1500:]
        line = next((f for f in reversed(traceback.extract_tb(error.__traceback__)) if f.filename == "tests.py"), None)
        where = linecache.getline("tests.py", line.lineno).strip()[:300] if line and line.lineno else ""
        return f"{type(error).__name__}: {error}"[:1000].strip() + (f"\n{where}" if where else "")
    except BaseException:
        return type(error).__name__


main()
