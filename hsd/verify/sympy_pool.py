"""Processes that ask SymPy (`child/sympy_server.py`), kept while the trainer runs: importing it takes a second."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from hsd.verify.status import default_workers
from hsd.verify.syscalls import filter_program

SERVER = Path(__file__).parent / "child" / "sympy_server.py"
START_TIMEOUT = 120.0  # importing SymPy takes a second, more on a busy machine
WIDE = 6  # wall clock over CPU time for one comparison
GRACE = 30.0  # for the server's own work around it
MEMORY = 2 << 30


class _Server:
    """One child process (`child/sympy_server.py`): `ask` returns its reply, or ``lost`` if it is of no more use."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(SERVER), str(MEMORY), filter_program().hex()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is the trainer's
        )
        self.buffer = b""
        reply = self._reply(time.monotonic() + START_TIMEOUT)
        if "ready" not in reply:
            self.kill()
            raise RuntimeError(f"math-verify: expected the child process to start, got {reply}; is it installed?")

    def ask(self, gold: str, answer: str, timeout: float, tolerance: float | None = None) -> dict[str, Any]:
        asked = {"gold": gold, "answer": answer, "tolerance": tolerance, "timeout": timeout, "wide": WIDE}
        try:
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(asked).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            return {"lost": "the server had ended"}
        return self._reply(time.monotonic() + WIDE * timeout + GRACE)

    def _reply(self, deadline: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        fd = self.process.stdout.fileno()
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        while b"\n" not in self.buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                return {"lost": "the server did not answer"}
            part = os.read(fd, 1 << 16)
            if not part:
                return {"lost": "the server ended"}
            self.buffer += part
        line, self.buffer = self.buffer.split(b"\n", 1)
        return json.loads(line)

    def kill(self) -> None:
        self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # an unsent request in the buffer
                pipe.close()
        self.process.wait()


class _Servers:
    """Idle children of this process."""

    def __init__(self) -> None:
        self._start_over()

    def _start_over(self) -> None:
        self.idle: list[_Server] = []
        self.owner = os.getpid()
        self.lock = threading.Lock()
        self.starting = threading.BoundedSemaphore(default_workers())

    def ask(self, gold: str, answer: str, timeout: float, tolerance: float | None = None) -> dict[str, Any]:
        if self.owner != os.getpid():  # forked: the pipes are the parent's
            self._start_over()
        with self.starting:
            server = self._take() or _Server()
            reply: dict[str, Any] = {"lost": "interrupted"}
            try:
                reply = server.ask(gold, answer, timeout, tolerance)
            finally:
                if "lost" in reply:
                    server.kill()
                else:
                    with self.lock:
                        self.idle.append(server)
            return reply

    def _take(self) -> _Server | None:
        with self.lock:
            while self.idle:
                server = self.idle.pop()
                if server.process.poll() is None:
                    return server
                server.kill()  # someone else ended it
        return None

    def close(self) -> None:
        if self.owner == os.getpid():
            with self.lock:
                while self.idle:
                    self.idle.pop().kill()


SERVERS = _Servers()
atexit.register(SERVERS.close)
