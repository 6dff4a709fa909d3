"""Compares answers with math-verify: `python -I -B sympy_server.py MEMORY`, a JSON line in, a JSON line out.

math-verify's own time limits use SIGALRM and a handler, which C code and `except` clauses can hold up. Here they are
off: this process has SymPy imported and reads no answer; it forks for each, and kills the fork when its time is over.
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


def main() -> None:
    out = os.dup(1)
    os.dup2(2, 1)  # what a library prints must not look like a reply
    logging.disable(logging.CRITICAL)
    confine.lower_limits(cpu=1e6, memory=int(sys.argv[1]), file_size=0)
    compare(r"\frac{1}{2}x", "0.5x")  # imports what is imported late
    confine.shut_files(["landlock"])
    gc.freeze()
    os.write(out, b'{"ready": true}\n')
    for line in sys.stdin:
        os.write(out, json.dumps(in_fork(**json.loads(line))).encode() + b"\n")


def in_fork(gold: str, answer: str, timeout: float) -> dict[str, Any]:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            confine.die_with_parent()
            confine.shut_calls(["seccomp"], [])
            os.write(write, json.dumps(compare(gold, answer)).encode())
        finally:
            os._exit(0)
    os.close(write)
    poll = select.poll()
    poll.register(read, select.POLLIN)
    ended = bool(poll.poll(timeout * 1000))
    reply = os.read(read, 1 << 16) if ended else b""
    os.close(read)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return json.loads(reply) if reply else {"ended": "died" if ended else "timeout"}


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
