"""Compares answers with math-verify: `python -I -B sympy_server.py MEMORY`, a JSON line in, a JSON line out.

math-verify's own time limits use SIGALRM and a handler, which C code and `except` clauses can hold up. Here they are
off: the parent kills this process, and if the parent is gone an alarm without a handler does.
"""

import json
import logging
import os
import signal
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import confine

sys.path.pop(0)


def main() -> None:
    out = os.dup(1)
    os.dup2(2, 1)  # what a library prints must not look like a reply
    logging.disable(logging.CRITICAL)
    confine.lower_limits(cpu=1e6, memory=int(sys.argv[1]), file_size=0)
    from math_verify import LatexExtractionConfig, parse, verify

    def parsed(answer: str) -> list:
        boxed = [LatexExtractionConfig(boxed_match_priority=0)]
        return parse("\\boxed{" + answer + "}", extraction_config=boxed, parsing_timeout=0, raise_on_error=True)

    verify(parsed("\\frac{1}{2}x"), parsed("0.5x"), timeout_seconds=0)  # imports what is imported late
    layers = ["landlock", "seccomp"]
    confine.shut_files(layers)
    confine.shut_calls(layers, [])
    os.write(out, b'{"ready": true}\n')
    for line in sys.stdin:
        ask = json.loads(line)
        signal.alarm(int(ask["timeout"]) + 2)
        try:
            equal = verify(parsed(ask["gold"]), parsed(ask["answer"]), timeout_seconds=0, raise_on_error=True)
            reply = {"equal": bool(equal)}
        except Exception as error:
            reply = {"error": type(error).__name__}
        signal.alarm(0)
        os.write(out, json.dumps(reply).encode() + b"\n")


main()
