"""Mathematical answers: last box, else last number; text first, then SymPy (math-verify) in a process that is killed
when its time is over."""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hsd.verify.answers import extract_answer, is_boxed, is_words, plain_number, same_text
from hsd.verify.numbers import last_number
from hsd.verify.status import (
    Completion,
    Result,
    Status,
    check_column,
    completion_text,
    default_workers,
    in_order,
    rewards,
)

SERVER = Path(__file__).parent / "child" / "sympy_server.py"
TIMEOUT = 5.0  # seconds of wall clock for one comparison
START_TIMEOUT = 120.0  # importing SymPy takes a second, more on a busy machine
GRACE = 30.0  # for the server's own work around a comparison
MEMORY = 2 << 30
MAX_ANSWER = 1_000  # characters; the longest gold answer of MATH-500 has 53


def math_reward(
    completions: Sequence[Completion],
    answer: Sequence[str | int | float],
    *,
    timeout: float = TIMEOUT,
    workers: int | None = None,
    **columns: Any,
) -> list[float | None]:
    """1.0 where the completion's answer equals `answer` (see `verify_math`), else 0.0; a TRL reward function.

    None where the verifier failed on the gold answer itself, with a warning, and for rows of another kind: those that
    have ``tests`` (`hsd.verify.code_reward`). The order is kept; `workers` processes, by default one per core.
    """
    check_column("answer", answer, completions)
    texts = [completion_text(c) for c in completions]
    other = columns.get("tests") or [None] * len(texts)
    mine = [i for i, tests in enumerate(other) if not tests]
    judged = in_order(lambda i: verify_math(texts[i], str(answer[i]), timeout=timeout), mine, workers)
    results = dict(zip(mine, judged, strict=True))
    return rewards("math", [results.get(i) for i in range(len(texts))], columns)


def verify_math(text: str, gold: str, *, timeout: float = TIMEOUT) -> Result:
    """Whether the answer in `text` equals `gold`, an answer or a solution that ends in one (``\\boxed{}``, ``####``).

    Equal means, in this order: the same spelling after normalization, the same plain number, or equal to math-verify
    0.9 (SymPy) within `timeout` seconds. A text answer is compared as text only. Where SymPy raises, dies or takes
    too long, it is tried on the gold answer alone: if it fails there too the status is ``verifier_failed``, else the
    answer was at fault (``incorrect``, ``crashed``, ``timeout``). The last box counts, and only if it is closed.
    """
    target = extract_answer(gold) if is_boxed(gold) or "####" in gold else gold.strip()
    if not target or len(target) > MAX_ANSWER:
        return Result(Status.VERIFIER_FAILED, f"gold: expected an answer of 1 to {MAX_ANSWER} characters")
    answer = extract_answer(text)
    number = plain_number(target)
    if number is not None and not is_boxed(text):
        last = last_number(text)
        if last is not None and plain_number(last) == number:
            return Result(Status.CORRECT)
    if answer is None:
        return Result(Status.NO_ANSWER)
    if len(answer) > MAX_ANSWER:
        return Result(Status.TOO_LONG, f"an answer of {len(answer)} characters")
    if same_text(target, answer):
        return Result(Status.CORRECT)
    if is_words(target):
        return Result(Status.INCORRECT)
    if number is not None and (other := plain_number(answer)) is not None:
        return Result(Status.CORRECT if number == other else Status.INCORRECT)
    return _ask_sympy(target, answer, timeout)


def _ask_sympy(gold: str, answer: str, timeout: float) -> Result:
    reply = _SERVERS.ask(gold, answer, timeout)
    if "equal" in reply:
        return Result(Status.CORRECT if reply["equal"] else Status.INCORRECT)
    alone = {} if "lost" in reply else _SERVERS.ask(gold, gold, timeout)
    if not alone.get("equal"):
        return Result(Status.VERIFIER_FAILED, f"SymPy on the gold answer {gold[:100]!r}: {alone}, before: {reply}")
    if "error" in reply:
        return Result(Status.INCORRECT, f"SymPy cannot compare it: {reply['error']}")
    return Result(Status.TIMEOUT if reply["ended"] == "timeout" else Status.CRASHED, "in SymPy")


class _Server:
    """One child process (`child/sympy_server.py`): `ask` returns its reply, or ``lost`` if it is of no more use."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(SERVER), str(MEMORY)],
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

    def ask(self, gold: str, answer: str, timeout: float) -> dict[str, Any]:
        line = json.dumps({"gold": gold, "answer": answer, "timeout": timeout}).encode() + b"\n"
        try:
            assert self.process.stdin is not None
            self.process.stdin.write(line)
            self.process.stdin.flush()
        except OSError:
            return {"lost": "the server had ended"}
        return self._reply(time.monotonic() + timeout + GRACE)

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
            try:
                assert pipe is not None
                pipe.close()
            except OSError:  # an unsent request in the buffer
                pass
        self.process.wait()


class _Servers:
    """Idle children of this process, kept because importing SymPy takes a second."""

    def __init__(self) -> None:
        self.idle: list[_Server] = []
        self.owner = os.getpid()
        self.lock = threading.Lock()
        self.starting = threading.BoundedSemaphore(default_workers())

    def ask(self, gold: str, answer: str, timeout: float) -> dict[str, Any]:
        if self.owner != os.getpid():  # forked: the pipes are the parent's
            self.__init__()
        with self.starting:
            server = self._take() or _Server()
            reply: dict[str, Any] = {"lost": "interrupted"}
            try:
                reply = server.ask(gold, answer, timeout)
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


_SERVERS = _Servers()
atexit.register(_SERVERS.close)
