"""Unit tests of a coding problem, in the three forms that the data sets have."""

from __future__ import annotations

import ast
import builtins
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Script:
    """The program is a script: each input on stdin, its output on stdout."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Suite:
    """The program defines `names`; `source` raises where it is wrong. Both it and `setup` run beside the tests only."""

    setup: str
    source: str
    names: tuple[str, ...]
    prompt: str = ""  # code that the completion continues, or defines anew

    def program(self, code: str) -> str:
        if not self.prompt:
            return code
        whole = _defines(code, self.names[0])
        return f"{_closed(self.prompt)}\n\n{code}" if whole else self.prompt + code


def read_tests(tests: Mapping[str, Any] | str) -> Script | Suite:
    """From a mapping or its JSON, by its keys:

        test, entry_point, prompt       HumanEval: `test` defines ``check(candidate)``
        asserts, setup (optional)       MBPP: a list of statements
        inputs, outputs, fn_name        APPS, LiveCodeBench: arguments (a list, or a text with a JSON value a line)
        inputs, outputs                 the same for scripts: texts, or lists of lines

    Raises ValueError for anything else.
    """
    try:
        given = json.loads(tests) if isinstance(tests, str) else tests
        if "test" in given and "entry_point" in given:
            name = given["entry_point"]
            prompt = given.get("prompt") or ""
            return Suite(_closed(prompt), f"{given['test']}\n\ncheck({name})", (name,), prompt)
        if "asserts" in given:
            setup, source = given.get("setup") or "", "\n".join(given["asserts"])
            return Suite(setup, source, _unknown_names(setup, source))
        inputs, outputs = given["inputs"], given["outputs"]
        if len(inputs) != len(outputs) or not inputs:
            raise ValueError(f"as many outputs as inputs, at least one, got {len(inputs)} and {len(outputs)}")
        if given.get("fn_name"):
            return _function_suite(given["fn_name"], inputs, outputs)
        return Script(tuple(map(_lines, inputs)), tuple(map(_lines, outputs)))
    except (KeyError, TypeError, AttributeError, ValueError, SyntaxError) as error:
        raise ValueError(
            "tests: expected (test, entry_point), (asserts) or (inputs, outputs[, fn_name]), "
            f"got {type(tests).__name__}: {type(error).__name__} {error}"
        ) from None


def same_output(expected: str, got: str) -> bool:
    """Equal line by line without the spaces at the ends; where a line differs, word by word, and an expected number
    with a decimal point within 1e-6 of its size (at least 1)."""
    left, right = ([line.strip() for line in text.strip().splitlines()] for text in (expected, got))
    return len(left) == len(right) and all(a == b or _same_words(a, b) for a, b in zip(left, right, strict=True))


def _same_words(expected: str, got: str) -> bool:
    left, right = expected.split(), got.split()
    return len(left) == len(right) and all(a == b or _near(a, b) for a, b in zip(left, right, strict=True))


def _near(expected: str, got: str) -> bool:
    if not any(c in expected for c in ".eE") or len(expected) + len(got) > 1000:
        return False
    try:
        a, b = float(expected), float(got)
    except ValueError:
        return False
    return abs(a - b) <= 1e-6 * max(1.0, abs(a))


def _lines(value: str | list[Any]) -> str:
    return value if isinstance(value, str) else "\n".join(map(str, value))


def _closed(prompt: str) -> str:
    """A prompt that ends in a function without a body, made whole."""
    try:
        ast.parse(prompt)
    except SyntaxError:
        return prompt.rstrip() + "\n    pass\n"
    return prompt


def _defines(code: str, name: str) -> bool:
    try:
        body = ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # code is the policy's
        return re.search(rf"^(def|class) {re.escape(name)}\b", code, re.MULTILINE) is not None
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    assigned = [t for s in body if isinstance(s, ast.Assign) for t in s.targets]
    return any(isinstance(s, kinds) and s.name == name for s in body) or any(
        isinstance(t, ast.Name) and t.id == name for t in assigned
    )


def _unknown_names(setup: str, source: str) -> tuple[str, ...]:
    """Names that the tests use and neither they nor Python define: these are the program's. Never a built-in name or a
    standard module: the program could mean something else by ``len`` or ``math``."""
    nodes = [*ast.walk(ast.parse(setup)), *ast.walk(ast.parse(source))]
    names = [n for n in nodes if isinstance(n, ast.Name)]
    stored = {n.id for n in names if isinstance(n.ctx, ast.Store)}
    aliases = [a for n in nodes if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names]
    imported = {(a.asname or a.name).split(".")[0] for a in aliases}
    defined = {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    defined |= {n.arg for n in nodes if isinstance(n, ast.arg)}
    known = stored | imported | defined | set(vars(builtins))
    return tuple(sorted({n.id for n in names} - known - sys.stdlib_module_names))


_FUNCTION_TESTS = """
import json

def plain(value):
    return [plain(x) for x in value] if isinstance(value, list | tuple) else value

for number, (args, accepted) in enumerate(json.loads(CASES), 1):
    got = plain((Solution().{name} if "Solution" in globals() else {name})(*args))
    assert got in accepted, f"test {{number}}: expected {{accepted[0]!r:.200}}, got {{got!r:.200}}"
"""


def _function_suite(name: str, inputs: list[Any], outputs: list[Any]) -> Suite:
    if not name.isidentifier():
        raise ValueError(f"fn_name: expected an identifier, got {name!r}")
    cases = []
    for given, expected in zip(inputs, outputs, strict=True):
        if isinstance(given, str):  # LiveCodeBench
            args = [json.loads(line) for line in given.splitlines() if line.strip()]
            accepted = [json.loads(expected) if isinstance(expected, str) else expected]
        else:  # APPS, which wraps some outputs in a list of one
            args = given
            accepted = [expected, *(expected if isinstance(expected, list) and len(expected) == 1 else [])]
        cases.append([args, accepted])
    source = f"CASES = {json.dumps(cases)!r}\n{_FUNCTION_TESTS.format(name=name)}"
    return Suite("import sys\nsys.set_int_max_str_digits(0)", source, ("Solution", name))
