"""Compares answers with math-verify: `python -I -B sympy_server.py MEMORY FILTER`, a JSON line in, a JSON line out.

math-verify's own time limits use SIGALRM and a handler, which C code and `except` clauses can hold up. Here they are
off: this process has SymPy imported and reads no answer itself. A fork of it does, until one takes too long or ends it.
The next fork is there in milliseconds; a new process would import SymPy for a second.
"""

import gc
import json
import logging
import os
import select
import signal
import sys
import time
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import confine

sys.path.pop(0)

WARM_UP = (  # imports what is imported late and fills the parser's tables, for all forks
    (r"\frac{1}{2}x + 1", "0.5x"),
    (r"\sqrt{2} + 3", r"\frac{3\sqrt{5}}{7}"),
    (r"[1, \infty)", r"(1, \frac{\pi}{2})"),
)


def main() -> None:
    out = os.dup(1)
    os.dup2(2, 1)  # what a library prints must not look like a reply
    logging.disable(logging.CRITICAL)
    confine.lower_limits(cpu=1e6, memory=int(sys.argv[1]), file_size=0)
    for gold, answer in WARM_UP:
        compare(gold, answer)
    confine.shut_files(["landlock"], [p for p in sys.path if p])
    gc.freeze()
    os.write(out, b'{"ready": true}\n')
    fork = None
    for line in sys.stdin:
        fork = fork or Fork()
        wanted = json.loads(line)
        reply = fork.ask(line.encode(), wanted["timeout"], wanted["wide"])
        if "ended" in reply:
            fork.kill()
            fork = None
        os.write(out, json.dumps(reply).encode() + b"\n")


class Fork:
    def __init__(self) -> None:
        asks, self.asks = os.pipe()
        self.replies, replies = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.asks)  # so that it ends when this process does
            try:
                answer_all(asks, replies)
            finally:
                os._exit(0)
        os.close(asks)
        os.close(replies)

    def ask(self, line: bytes, timeout: float, wide: float) -> dict[str, Any]:
        """Its reply; "timeout" after `timeout` seconds of its CPU time, "busy" after `wide` times that."""
        poll = select.poll()
        poll.register(self.replies, select.POLLIN)
        try:
            used = self._cpu()
            os.write(self.asks, line)
        except OSError:  # it ended meanwhile
            return self._died()
        end, left = time.monotonic() + wide * timeout, timeout
        while not poll.poll(left * 1000):
            left = timeout - (self._cpu() - used)
            if left <= 0:
                return {"ended": "timeout"}
            if time.monotonic() > end:
                return {"ended": "busy"}
        reply = os.read(self.replies, 1 << 16)
        return json.loads(reply) if reply else self._died()

    def _cpu(self) -> float:
        return time.clock_gettime((~self.pid << 3) | 2)  # the clock of another process, as clock_getcpuclockid(3)

    def _died(self) -> dict[str, Any]:
        """Killed from outside, as by the system's out-of-memory killer, says nothing about the answer."""
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return {"ended": "killed" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL else "died"}

    def kill(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.asks)
        os.close(self.replies)


def answer_all(asks: int, replies: int) -> None:
    confine.die_with_parent()
    confine.shut_calls(["seccomp"], bytes.fromhex(sys.argv[2]))
    with os.fdopen(asks) as lines:
        for line in lines:
            ask = json.loads(line)
            os.write(replies, json.dumps(compare(ask["gold"], ask["answer"], ask["tolerance"])).encode())


CLOSE = 1e-6  # the relative difference that equal numbers may have
POINTS = ((7, 3), (13, 11))  # where expressions with variables are compared as numbers: (numerator, denominator)


def compare(gold: str, answer: str, tolerance: float | None = None) -> dict[str, Any]:
    from latex2sympy2_extended import NormalizationConfig, latex2sympy
    from math_verify.grader import sympy_expr_eq
    from sympy import Basic, Float, MatrixBase, Set

    config = NormalizationConfig(basic_latex=True, malformed_operators=True, boxed="none")
    try:
        left: Any = latex2sympy(gold, normalization_config=config)
        right: Any = latex2sympy(answer, normalization_config=config)
        left, right = with_complex_unit(left, right)
        close = near(left, right, tolerance or CLOSE)
        if close is not None and isinstance(left, Basic) and isinstance(right, Basic):
            decimal = left.has(Float) or right.has(Float)
            constant = not (left.free_symbols | right.free_symbols)
            if not close or tolerance or (constant and decimal):
                return {"equal": close}
            if constant:
                exact = [x.doit() for x in (left, right)]
                return {"equal": exact[0] == exact[1] if all(x.is_Rational for x in exact) else near(*exact, 1e-25)}
        if isinstance(left, Set | MatrixBase) != isinstance(right, Set | MatrixBase):
            return {"equal": False}
        return {"equal": bool(sympy_expr_eq(left, right, 6, 15))}
    except Exception as error:
        return {"error": type(error).__name__}


def with_complex_unit(left: Any, right: Any) -> tuple[Any, Any]:
    """Where the only letter is i, it is the complex unit."""
    from sympy import Expr, I

    if not (isinstance(left, Expr) and isinstance(right, Expr)):
        return left, right
    symbols = left.free_symbols | right.free_symbols
    return (
        tuple(x.subs(dict.fromkeys(symbols, I)) for x in (left, right))
        if {str(x) for x in symbols} == {"i"}
        else (left, right)
    )


def near(left: Any, right: Any, allowed: float) -> bool | None:
    """Whether two expressions have values that differ by at most `allowed` of their size, with the same numbers for
    their variables; None where they have no value."""
    from sympy import Expr, Rational, nan, zoo

    if not (isinstance(left, Expr) and isinstance(right, Expr)):
        return None
    symbols = sorted(left.free_symbols | right.free_symbols, key=str)
    known = None
    for top, bottom in POINTS if symbols else POINTS[:1]:
        at: Any = {symbol: Rational(top + i, bottom + 2 * i) for i, symbol in enumerate(symbols)}
        try:
            a, b = (x.subs(at).doit().evalf(30) for x in (left, right))
        except Exception:
            return None
        if a == b and a not in (nan, zoo):
            known = True
            continue
        if not (a.is_number and b.is_number and a.is_finite and b.is_finite):
            return None
        if abs(a - b) > allowed * max(abs(a), abs(b)):
            return False
        known = True
    return known


main()
