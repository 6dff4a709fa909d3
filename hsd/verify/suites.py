"""Unit tests of a coding problem, in the three forms that the data sets have."""

from __future__ import annotations

import ast
import builtins
import itertools
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from hsd.verify.child import wire


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
    cases: list[Any] | None = None  # CASES of `source`, as `child/wire.py` encodes them

    def program(self, code: str) -> str:
        if not self.prompt:
            return code
        whole = defines(code, self.names[0])
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
        given = _loads(tests) if isinstance(tests, str) else tests
        if "test" in given and "entry_point" in given:
            name = given["entry_point"]
            prompt = given.get("prompt") or ""
            return Suite(_closed(prompt), f"{given['test']}\n\ncheck({name})", (name,), prompt)
        if "asserts" in given:
            setup, source = given.get("setup") or "", "\n".join(given["asserts"])
            names = _names_of_the_program(setup, source)
            if not names:
                raise ValueError("asserts that use a name of the program's")
            return Suite(setup, source, names)
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
    """Equal line by line without the spaces at the ends; where a line differs, word by word, and a number that is
    expected with a decimal point within 1e-6, or 1e-6 of its size if that is under 1."""
    if expected == got:
        return True
    left, right = _stripped_lines(expected), _stripped_lines(got)
    return all(
        a is not None and b is not None and (a == b or _same_words(a, b)) for a, b in itertools.zip_longest(left, right)
    )


def _stripped_lines(text: str) -> Iterator[str]:
    """The lines one by one: a list of all of them is many times the text. A line ends at \\n; U+2028 ends none."""
    start, end = 0, len(text.rstrip())
    start = len(text) - len(text.lstrip()) if end else 0
    while start < end:
        stop = text.find("\n", start, end)
        stop = end if stop < 0 else stop
        yield text[start:stop].strip()
        start = stop + 1


def _same_words(expected: str, got: str) -> bool:
    left, right = expected.split(), got.split()
    return len(left) == len(right) and all(a == b or _near(a, b) for a, b in zip(left, right, strict=True))


# As programs print them: 0.5, 1e-09; not 00e5 or 12 or 1_0.5, which are text.
_PRINTED = re.compile(r"[-+]?(?:0|[1-9]\d*)(?:\.\d+(?:[eE][-+]?\d+)?|[eE][-+]\d+)", re.ASCII)
_READ = re.compile(r"[-+]?(?:(?:0|[1-9]\d*)(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?", re.ASCII)


def _near(expected: str, got: str) -> bool:
    if len(expected) + len(got) > 1000 or not (_PRINTED.fullmatch(expected) and _READ.fullmatch(got)):
        return False
    a, b = float(expected), float(got)
    return a == b or abs(a - b) <= max(1e-6 * min(1.0, abs(a)), 8 * math.ulp(a))


def _lines(value: str | list[Any]) -> str:
    return value if isinstance(value, str) else "\n".join(map(str, value))


def _closed(prompt: str) -> str:
    """A prompt that ends in a function without a body, made whole."""
    try:
        ast.parse(prompt)
    except SyntaxError:
        return prompt.rstrip() + "\n    pass\n"
    return prompt


def defines(code: str, name: str) -> bool:
    try:
        body = ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # code is the policy's
        return re.search(rf"^(def|class) {re.escape(name)}\b", code, re.MULTILINE) is not None
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    assigned = [t for s in body if isinstance(s, ast.Assign) for t in s.targets]
    return any(isinstance(s, kinds) and s.name == name for s in body) or any(
        isinstance(t, ast.Name) and t.id == name for t in assigned
    )


def _names_of_the_program(setup: str, source: str) -> tuple[str, ...]:
    """Names that the tests use and neither they nor Python define. Where there are none, the one built-in name (sum)
    or standard module (bisect) that each assert calls, innermost: a program that defines ``len`` beside its function
    is not asked for it."""
    trees = ast.parse(setup), ast.parse(source)
    nodes = [n for tree in trees for n in ast.walk(tree)]
    names = [n for n in nodes if isinstance(n, ast.Name)]
    stored = {n.id for n in names if isinstance(n.ctx, ast.Store)}
    aliases = [a for n in nodes if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names]
    imported = {(a.asname or a.name).split(".")[0] for a in aliases}
    defined = {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    defined |= {n.arg for n in nodes if isinstance(n, ast.arg)}
    known = stored | imported | defined
    found = {n.id for n in names} - known - set(vars(builtins)) - sys.stdlib_module_names
    if found:
        return tuple(sorted(found))
    called = [_calls(statement) for statement in trees[1].body if isinstance(statement, ast.Assert)]
    common = [name for name in (called[0] if called else []) if name not in known and all(name in c for c in called)]
    return tuple(common[:1])


def _calls(statement: ast.AST) -> list[str]:
    """The names that a statement calls, from the inside out."""
    calls = [n for n in ast.walk(statement) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    return [n.func.id for n in reversed(calls)]  # type: ignore[union-attr]


# In names of its own: the program's function may be called `same` or `got`.
_FUNCTION_TESTS = """
import math as _hsd_math

def _hsd_plain(value):
    return [_hsd_plain(x) for x in value] if isinstance(value, list | tuple) else value

def _hsd_same(expected, got):  # LeetCode's tolerance where a float is expected
    if isinstance(expected, list) and isinstance(got, list):
        return len(expected) == len(got) and all(map(_hsd_same, expected, got))
    if isinstance(expected, float) and isinstance(got, int | float) and not isinstance(got, bool):
        allowed = max(1e-5 * min(1.0, 10 * abs(expected)), 8 * _hsd_math.ulp(expected))
        return expected == got or abs(expected - got) <= allowed
    return expected == got

def _hsd_judge(_hsd_function):
    for number, (args, accepted) in enumerate(CASES, 1):
        got = _hsd_plain(_hsd_function(number)(*args))
        known = f"expected {{accepted[0]!r:.200}}, got {{got!r:.200}}"
        assert any(_hsd_same(x, got) for x in accepted), f"test {{number}}: {{known}}"

_hsd_judge(lambda _: Solution().{name} if "Solution" in globals() else {name})
"""


def _function_suite(name: str, inputs: list[Any], outputs: list[Any]) -> Suite:
    if not name.isidentifier():
        raise ValueError(f"fn_name: expected an identifier, got {name!r}")
    cases = []
    for given, expected in zip(inputs, outputs, strict=True):
        if isinstance(given, str):  # LiveCodeBench
            args = [_loads(line) for line in given.split("\n") if line.strip()]
            accepted = [_loads(expected) if isinstance(expected, str) else expected]
        else:  # APPS, which wraps some outputs in a list of one
            args = given
            accepted = [expected, *(expected if isinstance(expected, list) and len(expected) == 1 else [])]
        cases.append([args, accepted])
    encoded = wire.encode(cases, _no_reference)
    return Suite("", _FUNCTION_TESTS.format(name=name), ("Solution", name), cases=encoded)


def _no_reference(value: Any) -> int:
    raise TypeError(f"plain data in inputs and outputs, got {type(value).__name__}")


def _loads(text: str) -> Any:
    """JSON with integers of any length; `int` refuses more than 4,300 digits."""
    return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 4000 else int(Decimal(digits)))
