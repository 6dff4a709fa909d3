"""Compares answers with math-verify: `python -I -B sympy_server.py MEMORY`, a JSON line in, a JSON line out.

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
    confine.shut_files(["landlock"])
    gc.freeze()
    os.write(out, b'{"ready": true}\n')
    fork = None
    for line in sys.stdin:
        fork = fork or Fork()
        reply = fork.ask(line.encode(), json.loads(line)["timeout"])
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

    def ask(self, line: bytes, timeout: float) -> dict[str, Any]:
        poll = select.poll()
        poll.register(self.replies, select.POLLIN)
        try:
            os.write(self.asks, line)
        except OSError:  # it ended meanwhile
            return {"ended": "died"}
        if not poll.poll(timeout * 1000):
            return {"ended": "timeout"}
        reply = os.read(self.replies, 1 << 16)
        return json.loads(reply) if reply else {"ended": "died"}

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.asks)
        os.close(self.replies)


def answer_all(asks: int, replies: int) -> None:
    confine.die_with_parent()
    confine.shut_calls(["seccomp"], [])
    with os.fdopen(asks) as lines:
        for line in lines:
            ask = json.loads(line)
            os.write(replies, json.dumps(compare(ask["gold"], ask["answer"])).encode())


def compare(gold: str, answer: str) -> dict[str, Any]:
    from math_verify import LatexExtractionConfig, parse, verify

    boxed = [LatexExtractionConfig(boxed_match_priority=0)]
    try:
        left, right = (
            parse("\\boxed{" + text + "}", extraction_config=boxed, parsing_timeout=0, raise_on_error=True)
            for text in (gold, answer)
        )
        return {"equal": bool(verify(left, right, timeout_seconds=0, raise_on_error=True))}
    except Exception as error:
        return {"error": type(error).__name__}


main()
