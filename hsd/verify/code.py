"""Programs: unit tests in a sandbox (`hsd.verify.sandbox`), one fresh process for each script input or test suite."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hsd.verify.answers import final_part
from hsd.verify.sandbox import Limits, Outcome, isolation, run_program, run_tests
from hsd.verify.status import Completion, Result, Status, check_column, completion_text, in_order, rewards
from hsd.verify.suites import Script, Suite, defines, read_tests, same_output

MAX_CODE = 1 << 16  # characters
# A fence starts a line, or ends one that it is glued to ("assistantfinal```python"). Possessive: a line of fences
# alone is read once, not once for each of its characters.
_OPENING = re.compile(r"^(?P<before>[^`~\n]*+)(?P<fence>`{3,}+|~{3,}+)[ \t]*+(?P<info>[^`\n]*+)$", re.MULTILINE)
_PYTHON = re.compile(r"\{?\.?(?:python[\d.]*|py[\d.]*|sage|starlark)\b(?![-+])", re.IGNORECASE)
_READS = re.compile(r"\binput\b|\bstdin\b|\bopen\(\s*0")
DEFAULT_LIMITS = Limits()


def code_reward(
    completions: Sequence[Completion], tests: Sequence[Mapping[str, Any] | str | None], **columns: Any
) -> list[float | None]:
    """1.0 where the completion's program passes all of `tests` (see `verify_code`), else 0.0; a TRL reward function.

    None where the verifier failed, with a warning, and for rows without tests (mathematics). The order is kept.
    """
    return code_reward_with()(completions, tests, **columns)


def code_reward_with(
    *, limits: Limits = DEFAULT_LIMITS, official: bool = False, workers: int | None = None
) -> Callable[..., list[float | None]]:
    """`code_reward` with the options of `verify_code` and the number of programs at a time, by default one per core.

    The keywords of a reward function are the data set's columns, whatever their names are.
    """

    def code_reward(
        completions: Sequence[Completion], tests: Sequence[Mapping[str, Any] | str | None], **columns: Any
    ) -> list[float | None]:
        check_column("tests", tests, completions)
        texts = [completion_text(c) for c in completions]
        mine = [i for i, given in enumerate(tests) if given]
        if mine:
            isolation()  # its warning, once, from the caller's thread

        def judge(i: int) -> Result:
            given = tests[i]
            assert given
            return verify_code(texts[i], given, limits=limits, official=official)

        results = dict(zip(mine, in_order(judge, mine, workers), strict=True))
        return rewards("code", [results.get(i) for i in range(len(texts))], columns)

    return code_reward


def verify_code(
    text: str, tests: Mapping[str, Any] | str, *, limits: Limits = DEFAULT_LIMITS, official: bool = False
) -> Result:
    """Whether the program in `text` (`extract_code`) passes `tests` (`hsd.verify.suites.read_tests`) within `limits`.

    The first test that fails decides. Tests and expected outputs never enter the program's process: its functions are
    called from another one, by value, and a script's stdout is compared here. With `official` the program of a test
    with inputs and outputs finds what LiveCodeBench's harness gives it: imports and a recursion depth of 50,000.
    ``verifier_failed``: the sandbox did not start or was killed from outside, the machine is busy, the tests are no
    Python, ask nothing of the program or pass it what cannot cross. Raises ValueError for tests of no known form.
    """
    suite = read_tests(tests)
    code = extract_code(text, suite)
    if not code.strip():
        return Result(Status.NO_ANSWER)
    if len(code) > MAX_CODE:
        return Result(Status.TOO_LONG, f"a program of {len(code)} characters")
    if isinstance(suite, Script):
        return _verify_script(code, suite, limits, official)
    beside = {"setup": suite.setup, "source": suite.source, "names": list(suite.names), "cases": suite.cases}
    return _result(run_tests(suite.program(code), beside, limits, official=official and suite.cases is not None))


def extract_code(text: str, suite: Script | Suite | None = None) -> str:
    """The program in a completion: of its final part (`hsd.verify.answers.final_part`) the last fenced block that is
    Python, by its tag or without one, and parses; one that is cut off counts, and the whole text where there is none.

    With a suite the last block that defines a name of it; with a script's tests the last that reads stdin.
    """
    text = text.replace("\r\n", "\n")
    part = final_part(text) if "<answer>" not in text.lower() or "</answer>" in text.lower() else text
    if part is None:
        return ""
    blocks = _blocks(part)
    if blocks is None:
        return part
    tagged = [code for info, code in blocks if _PYTHON.match(info)]
    found = tagged or [code for info, code in blocks if not info]
    whole = suite.program if isinstance(suite, Suite) else str
    parsed = [code for code in found if _parses(whole(code))]
    if isinstance(suite, Suite):
        wanted = [code for code in parsed if any(defines(code, name) for name in suite.names)]
    elif isinstance(suite, Script) and any(given.strip() for given in suite.inputs):
        wanted = [code for code in parsed if _READS.search(code)]
    else:
        wanted = []
    return (wanted or parsed or found or [""])[-1]


def _blocks(text: str) -> list[tuple[str, str]] | None:
    """Tag and content of each fenced block; None where there is no fence. A fence in a list takes its indentation
    from the lines. One fence alone closes what the prompt opened, if Python is before and nothing after it."""
    blocks, position = [], 0
    while opening := _OPENING.search(text, position):
        fence, before = opening["fence"], opening["before"]
        if before.strip() and not (opening["info"] == "" or _PYTHON.match(opening["info"])):
            position = opening.end() + 1  # in a sentence or a string
            continue
        closing = re.compile(rf"^[ \t]*{fence}{fence[0]}*+[ \t]*$|(?<=[^\n`~]){fence}[ \t]*$", re.MULTILINE)
        end = closing.search(text, opening.end())
        if end is None and not blocks and not opening["info"].strip() and not text[opening.end() :].strip():
            return [("", text[: opening.start()] + before)]
        content = text[opening.end() + 1 : end.start() if end else len(text)]
        if before and not before.strip():
            content = re.sub(rf"^[ \t]{{1,{len(before)}}}", "", content, flags=re.MULTILINE)
        blocks.append((opening["info"].strip().lower(), content))
        position = end.end() if end else len(text)
    return blocks or None


def _parses(code: str) -> bool:
    try:
        ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # code is the policy's
        return False
    return True


def _verify_script(code: str, script: Script, limits: Limits, official: bool) -> Result:
    seconds = 0.0
    for number, (given, expected) in enumerate(zip(script.inputs, script.outputs, strict=True), 1):
        outcome = run_program(code, given, limits, official=official)
        if outcome.status != "finished":
            result = _result(outcome)
            return Result(result.status, f"test {number}: {result.detail}")
        got = outcome.stdout[: 2 * len(expected.encode("utf-8", "surrogatepass")) + (1 << 16)].decode(errors="replace")
        if not same_output(expected, got):
            return Result(Status.INCORRECT, f"test {number}: expected {expected[:200]!r}, got {got[:200]!r}")
        seconds += outcome.seconds
        if seconds > limits.total:
            return Result(Status.TIMEOUT, f"test {number}: {limits.total:g} s for all tests are over")
    return Result(Status.CORRECT)


def _result(outcome: Outcome) -> Result:
    return Result(Status(outcome.status), outcome.detail)
