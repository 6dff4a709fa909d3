"""Rows of the programming data sets, each from one row as its hub repository documents it. Pure functions.

``tests`` is a JSON string in a form that `hsd.verify` runs: ``inputs`` and ``outputs`` (texts for stdin and of stdout;
with ``fn_name`` a function's arguments and results), or ``test``, ``entry_point`` and ``prompt`` as HumanEval has them.
"""

from __future__ import annotations

import base64
import io
import json
import pickle
import zlib
from typing import Any

from hsd.data.prompts import function_prompt, program_prompt
from hsd.data.rows import Row, Unusable


def humaneval(raw: dict[str, Any]) -> Row:
    """openai/openai_humaneval and evalplus/humanevalplus: ``task_id``, ``prompt``, ``canonical_solution``,
    ``entry_point``, ``test``."""
    whole = raw["prompt"] + raw["canonical_solution"]
    return _row(
        raw["prompt"],
        function_prompt(raw["prompt"].strip("\n")),
        json.dumps({key: raw[key] for key in ("test", "entry_point", "prompt")}),
        answer=f"```python\n{whole.strip()}\n```",
        id=raw["task_id"],
    )


def apps(raw: dict[str, Any]) -> Row:
    """codeparrot/apps: ``problem_id``, ``question``, ``solutions`` and ``input_output`` (JSON as text, either may be
    empty), ``difficulty``, ``starter_code``. ``input_output`` holds ``inputs``, ``outputs`` and, for functions,
    ``fn_name``."""
    # Some tests have integers of more than 4,300 digits, which Python reads only on request; their value is not needed.
    cases = json.loads(raw["input_output"], parse_int=len) if raw["input_output"] else {}
    if not cases.get("inputs"):
        raise Unusable("no tests")
    solutions = json.loads(raw["solutions"]) if raw.get("solutions") else []
    return _row(
        raw["question"],
        program_prompt(raw["question"], raw.get("starter_code") or "", cases.get("fn_name")),
        raw["input_output"],
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
    cases = json.loads(raw["public_test_cases"]) + private_tests(raw["private_test_cases"])
    if not cases:
        raise Unusable("no tests")
    tests: dict[str, Any] = {"inputs": [c["input"] for c in cases], "outputs": [c["output"] for c in cases]}
    if cases[0]["testtype"] == "functional":
        tests["fn_name"] = json.loads(raw["metadata"])["func_name"]
    return _row(
        raw["question_content"],
        program_prompt(raw["question_content"], raw.get("starter_code") or "", tests.get("fn_name")),
        json.dumps(tests),
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
        return json.loads(text)
    return json.loads(_StringUnpickler(io.BytesIO(zlib.decompress(base64.b64decode(text)))).load())


class _StringUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"expected a pickled string, got a reference to {module}.{name}")


def _row(question: str, prompt: Any, tests: str, *, answer: str, **rest: str) -> Row:
    return {
        "prompt": prompt,
        "answer": answer,
        "question": question.strip(),
        "tests": tests,
        "kind": "code",
        **rest,
    }
