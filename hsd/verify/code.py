"""Programs: unit tests in a sandbox (`hsd.verify.sandbox`), one fresh process for each script input or test suite."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from hsd.verify.sandbox import Limits, Outcome, isolation, run_program, run_tests
from hsd.verify.status import Completion, Result, Status, check_column, completion_text, in_order, rewards
from hsd.verify.suites import Script, read_tests, same_output

MAX_CODE = 1 << 16  # characters
# Possessive: a line of fences alone is read once, not once for each of its characters.
_FENCE = re.compile(r"^[ \t]*(`{3,}+|~{3,}+)[^\n]*+\n(.*?)(?:^[ \t]*\1[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)
DEFAULT_LIMITS = Limits()


def code_reward(
    completions: Sequence[Completion],
    tests: Sequence[Mapping[str, Any] | str | None],
    *,
    limits: Limits = DEFAULT_LIMITS,
    workers: int | None = None,
    **columns: Any,
) -> list[float | None]:
    """1.0 where the completion's program passes all of `tests` (see `verify_code`), else 0.0; a TRL reward function.

    None where the verifier failed, with a warning, and for rows without tests (mathematics). The order is kept;
    `workers` programs run at a time, by default one per core.
    """
    check_column("tests", tests, completions)
    texts = [completion_text(c) for c in completions]
    mine = [i for i, given in enumerate(tests) if given]
    if mine:
        isolation()  # its warning, once, from the caller's thread

    def judge(i: int) -> Result:
        given = tests[i]
        assert given
        return verify_code(texts[i], given, limits=limits)

    results = dict(zip(mine, in_order(judge, mine, workers), strict=True))
    return rewards("code", [results.get(i) for i in range(len(texts))], columns)


def verify_code(text: str, tests: Mapping[str, Any] | str, *, limits: Limits = DEFAULT_LIMITS) -> Result:
    """Whether the program in `text` (`extract_code`) passes `tests` (`hsd.verify.suites.read_tests`) within `limits`.

    The first test that fails decides. Tests and expected outputs never enter the program's process: its functions are
    called from another one, by value, and a script's stdout is compared here. ``verifier_failed``: the sandbox did
    not start, or the tests are no Python. Raises ValueError for tests of no known form.
    """
    suite = read_tests(tests)
    code = extract_code(text)
    if not code.strip():
        return Result(Status.NO_ANSWER)
    if len(code) > MAX_CODE:
        return Result(Status.TOO_LONG, f"a program of {len(code)} characters")
    if isinstance(suite, Script):
        return _verify_script(code, suite, limits)
    return _result(
        run_tests(suite.program(code), {"setup": suite.setup, "source": suite.source, "names": suite.names}, limits)
    )


def extract_code(text: str) -> str:
    """The last fenced block, also one that is cut off; the whole text where there is none, its indentation kept."""
    blocks = [m[2] for m in _FENCE.finditer(text)]
    return blocks[-1] if blocks else text


def _verify_script(code: str, script: Script, limits: Limits) -> Result:
    for number, (given, expected) in enumerate(zip(script.inputs, script.outputs, strict=True), 1):
        outcome = run_program(code, given, limits)
        if outcome.status != "finished":
            result = _result(outcome)
            return Result(result.status, f"test {number}: {result.detail}")
        got = outcome.stdout.decode(errors="replace")
        if not same_output(expected, got):
            return Result(Status.INCORRECT, f"test {number}: expected {expected[:200]!r}, got {got[:200]!r}")
    return Result(Status.CORRECT)


def _result(outcome: Outcome) -> Result:
    return Result(Status(outcome.status), outcome.detail)
