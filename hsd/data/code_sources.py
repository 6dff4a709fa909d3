"""Rows of the programming data sets, each from one row as its hub repository documents it. Pure functions.

``tests`` is a JSON string in one of two forms: ``{"inputs": [...], "outputs": [...]}``, texts for stdin and of stdout,
or ``{"entry_point", "test"}``, where ``test`` is Python that defines ``check(candidate)``.
"""

from __future__ import annotations

import base64
import io
import json
import pickle
import zlib
from typing import Any

from hsd.data.math_sources import Unusable
from hsd.data.prompts import function_prompt, program_prompt
from hsd.data.rows import Row

# Tests of a function, called with JSON values. Results are compared as JSON would hold them: tuples are lists, keys
# are texts. What only APPS needs: integer keys of an argument, and an expected value that is often wrapped into a list
# of one (its own checker takes either; LiveCodeBench never wraps).
_CHECK = """
import json

CASES = json.loads({cases!r})


def plain(value):
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return {{str(k): plain(v) for k, v in value.items()}} if isinstance(value, dict) else value


def integer_keys(value):
    whole = isinstance(value, dict) and all(k.lstrip("-").isdigit() for k in value)
    return {{int(k): v for k, v in value.items()}} if whole else value


def check(candidate):
    for arguments, expected in CASES:
        got = plain({call})
        assert got == expected{wrapped}, f"{name}: expected {{expected!r:.200}}, got {{got!r:.200}}"
"""


def humaneval(raw: dict[str, Any]) -> Row:
    """openai/openai_humaneval and evalplus/humanevalplus: ``task_id``, ``prompt``, ``canonical_solution``,
    ``entry_point``, ``test``."""
    whole = raw["prompt"] + raw["canonical_solution"]
    return _row(
        raw["prompt"],
        function_prompt(raw["prompt"].strip("\n")),
        {"entry_point": raw["entry_point"], "test": raw["test"]},
        answer=f"```python\n{whole.strip()}\n```",
        id=raw["task_id"],
    )


def apps(raw: dict[str, Any]) -> Row:
    """codeparrot/apps: ``problem_id``, ``question``, ``solutions`` and ``input_output`` (JSON as text, either may be
    empty), ``difficulty``, ``starter_code``. ``input_output`` holds ``inputs``, ``outputs`` and, for functions,
    ``fn_name``; a text over several lines may be a list of lines."""
    cases = _json(raw["input_output"]) if raw["input_output"] else {}
    if not cases.get("inputs"):
        raise Unusable("no tests")
    starter = raw.get("starter_code") or ""
    if name := cases.get("fn_name"):
        pairs = [list(pair) for pair in zip(cases["inputs"], cases["outputs"], strict=True)]
        tests = _function_tests(name, pairs, in_class="class Solution" in starter, apps=True)
    else:
        tests = {side: [_lines(text) for text in cases[side]] for side in ("inputs", "outputs")}
    solutions = _json(raw["solutions"]) if raw.get("solutions") else []
    return _row(
        raw["question"],
        program_prompt(raw["question"], starter),
        tests,
        answer=f"```python\n{solutions[0].strip()}\n```" if solutions else "",
        id=str(raw["problem_id"]),
        level=raw["difficulty"],
    )


def livecodebench(raw: dict[str, Any]) -> Row:
    """livecodebench/code_generation_lite: ``question_content``, ``question_id``, ``contest_date``, ``difficulty``,
    ``starter_code``, ``metadata`` (JSON, ``func_name`` for functions), ``public_test_cases`` (JSON) and
    ``private_test_cases`` (JSON, or JSON pickled, zlib-compressed and base64-coded). A test has ``input``, ``output``
    and ``testtype``; a function's input has one JSON value a line. There are no reference solutions.
    """
    cases = _json(raw["public_test_cases"]) + private_tests(raw["private_test_cases"])
    if not cases:
        raise Unusable("no tests")
    starter = raw.get("starter_code") or ""
    if cases[0]["testtype"] == "functional":
        name = _json(raw["metadata"])["func_name"]
        pairs = [[[_json(line) for line in c["input"].split("\n")], _json(c["output"])] for c in cases]
        tests = _function_tests(name, pairs, in_class=True, apps=False)
    else:
        tests = {"inputs": [c["input"] for c in cases], "outputs": [c["output"] for c in cases]}
    return _row(
        raw["question_content"],
        program_prompt(raw["question_content"], starter),
        tests,
        answer="",
        id=raw["question_id"],
        level=raw["difficulty"],
        date=str(raw["contest_date"])[:10],
    )


def private_tests(text: str) -> list[dict[str, str]]:
    """The private tests of LiveCodeBench, plain or packed. Nothing but a string is ever unpickled."""
    if not text:
        return []
    if text.lstrip().startswith("["):
        return _json(text)
    return _json(_StringUnpickler(io.BytesIO(zlib.decompress(base64.b64decode(text)))).load())


class _StringUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"expected a pickled string, got a reference to {module}.{name}")


def _function_tests(name: str, pairs: list[list[Any]], *, in_class: bool, apps: bool) -> dict[str, str]:
    function = f"candidate().{name}" if in_class else "candidate"
    test = _CHECK.format(
        cases=json.dumps(pairs),
        call=f"{function}(*map(integer_keys, arguments))" if apps else f"{function}(*arguments)",
        wrapped=" or (isinstance(expected, list) and [got] == expected[:1])" if apps else "",
        name=name,
    )
    return {"entry_point": "Solution" if in_class else name, "test": test}


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        # Some APPS rows have integers of more than 4,300 digits, which Python does not read.
        raise Unusable("an integer over Python's digit limit" if "digit" in str(error) else "broken JSON") from error


def _lines(text: str | list[str]) -> str:
    return text if isinstance(text, str) else "\n".join(map(str, text))


def _row(question: str, prompt: Any, tests: dict[str, Any], *, answer: str, **rest: str) -> Row:
    return {
        "prompt": prompt,
        "answer": answer,
        "question": question.strip(),
        "tests": json.dumps(tests),
        "kind": "code",
        **rest,
    }
