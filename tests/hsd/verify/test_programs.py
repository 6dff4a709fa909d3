"""Kinds of programs and of tests for them, right and wrong sides. A kind that is added gets both."""

import json
import sys
import time

import pytest

from hsd.verify.code import extract_code, verify_code
from hsd.verify.sandbox import Limits
from hsd.verify.status import Status
from hsd.verify.suites import read_tests, same_output

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the sandbox's layers are Linux's"),
    pytest.mark.usefixtures("no_leftovers"),
]
LIMITS = Limits(timeout=20.0)
FUNCTION = "def f(x):\n    return x + 1\n"
SCRIPT = "print(int(input()) + 1)\n"
ASSERTS = read_tests({"asserts": ["assert f(1) == 2"]})
STDIN = read_tests({"inputs": ["1\n"], "outputs": ["2\n"]})


@pytest.mark.parametrize(
    ("text", "suite", "code"),
    [
        (f"```python\n{FUNCTION}```\nOutput:\n```\n2\n```", ASSERTS, FUNCTION),
        (f"```python\n{FUNCTION}```\nRun:\n```bash\npython a.py\n```", ASSERTS, FUNCTION),
        (f"```python\n{FUNCTION}```\nUsage:\n```python\nprint(f(1))\n```", ASSERTS, FUNCTION),
        (f"```python\ndef f(x): return 0\n```\nBetter:\n```python\n{FUNCTION}```", ASSERTS, FUNCTION),
        (f"```python\n{SCRIPT}```\nOutput:\n```\n2\n```", STDIN, SCRIPT),
        (f"```python\n{SCRIPT}```\n```output\n2\n```", STDIN, SCRIPT),
        (f"```\n{SCRIPT}```\nThis prints\n```\n2\n```", STDIN, SCRIPT),
        (f"```python\n{SCRIPT}```\n```python\ndef broken(:\n```", STDIN, SCRIPT),
        (f"assistantfinal```python\n{SCRIPT}```", STDIN, SCRIPT),
        (f"Here it is: ```python\n{SCRIPT}```", STDIN, SCRIPT),
        ("1. First:\n   ```python\n   def f(x):\n       return x + 1\n   ```\n", ASSERTS, FUNCTION),
        (f"{SCRIPT}```", STDIN, SCRIPT),  # the prompt opened it
        (f"```python\r\n{SCRIPT.strip()}\r\n```\r\n", STDIN, SCRIPT),
        (f"```python\n{FUNCTION}", ASSERTS, FUNCTION),  # cut off
        (f"<think>\n```python\ndef f(x): return 3\n```\n</think>\n```python\n{FUNCTION}```", ASSERTS, FUNCTION),
        (f"<think>\n```python\n{FUNCTION}```\n so", ASSERTS, ""),
        ("```cpp\nint main(){}\n```", STDIN, ""),
        (f"```Python3\n{SCRIPT}```", STDIN, SCRIPT),
        (f"~~~py\n{SCRIPT}~~~", STDIN, SCRIPT),
        (f'```python title="a"\n{SCRIPT}```', STDIN, SCRIPT),
        ("x = '```'", STDIN, "x = '```'"),
    ],
)
def test_which_block_is_the_program(text, suite, code):
    assert extract_code(text, suite) == code


def judged(program, tests, limits=LIMITS, official=False):
    return verify_code(program, tests, limits=limits, official=official).status


ZEROS = "0" * 4999
ALWAYS = "class Yes:\n    def __contains__(self, x): return True\n    def __bool__(self): return True\n"
LEAKS = [
    # compiled without the harness's own `from __future__ import annotations`
    ("def f(x: int): return f.__annotations__['x'] is int", {"asserts": ["assert f(1) is True"]}, True),
    ("def f(x: Missing): return True", {"asserts": ["assert f(1)"]}, False),
    # the program's objects answer no question about themselves
    (f"{ALWAYS}def f(): return Yes()", {"asserts": ["assert 3 in f()"]}, False),
    (f"{ALWAYS}def f(): return Yes()", {"asserts": ["assert f()"]}, False),
    ("def f(): return iter([1, 3])", {"asserts": ["assert 3 in f()"]}, True),
    ("def f(): return [1, 2]", {"asserts": ["assert 3 in f()"]}, False),
    # functions that are called like a built-in one or a standard module
    ("def sum(x): return 7", {"asserts": ["assert sum([1]) == 7", "assert sum([2]) == 7"]}, True),
    ("def sum(x): return 8", {"asserts": ["assert sum([1]) == 7"]}, False),
    ("def bisect(x, y): return 7", {"asserts": ["assert bisect([1], 2) == 7"]}, True),
    ("def bisect(x, y): return 8", {"asserts": ["assert bisect([1], 2) == 7"]}, False),
    ("def max(x): return 7", {"asserts": ["assert len(str(max([1]))) == 1", "assert str(max([2])) == '7'"]}, True),
    ("def len(x): return 1\ndef max(x): return 77", {"asserts": ["assert len(str(max([1]))) == 1"]}, False),
    ("def same(x): return x", {"fn_name": "same", "inputs": ["1"], "outputs": ["1"]}, True),
    ("def number(x): return x", {"fn_name": "number", "inputs": ["1", "2"], "outputs": ["1", "2"]}, True),
    ("def got(x): return 0", {"fn_name": "got", "inputs": ["1"], "outputs": ["1"]}, False),
    # LeetCode's tolerance, where a float is expected
    ("def f(x): return x / 3", {"fn_name": "f", "inputs": ["1"], "outputs": ["0.33333"]}, True),
    ("def f(x): return x / 3 + 1e-4", {"fn_name": "f", "inputs": ["1"], "outputs": ["0.33333"]}, False),
    ("def f(x): return [x + 1e-7]", {"fn_name": "f", "inputs": ["1"], "outputs": ["[1]"]}, False),
    ("def f(x): return 1e-9", {"fn_name": "f", "inputs": ["1"], "outputs": ["1e-12"]}, False),
    # arguments
    ("def f(x): return len(x)", {"fn_name": "f", "inputs": ['"a\u2028b"'], "outputs": ["3"]}, True),
    ("def f(x): return x + 1", {"fn_name": "f", "inputs": [f"1{ZEROS}0"], "outputs": [f"1{ZEROS}1"]}, True),
    ("def f(x): return x + 2", {"fn_name": "f", "inputs": [f"1{ZEROS}0"], "outputs": [f"1{ZEROS}1"]}, False),
    ("print(10 ** 5000)", {"inputs": [""], "outputs": [f"1{ZEROS}0"]}, True),
]  # fmt: skip


@pytest.mark.parametrize(("program", "tests", "right"), LEAKS)
def test_what_a_test_asks(program, tests, right):
    status = judged(program, tests)
    assert status is Status.CORRECT if right else status in (Status.INCORRECT, Status.CRASHED)


@pytest.mark.parametrize(
    "tests",
    [
        {"asserts": ["assert f(lambda x: x) == 1"]},  # cannot cross
        {"asserts": ["try:\n    f(print)\nexcept Exception:\n    pass"]},
        {"asserts": ["f", "assert 1 == 1"]},  # asks nothing
        {"test": "def check(candidate):\n    assert True", "entry_point": "f"},
    ],
)
def test_what_cannot_be_judged_is_not_scored(tests):
    for program in ("def f(x): return 1", "def f(x): return 0"):
        assert judged(program, tests) is Status.VERIFIER_FAILED


def test_asserts_without_a_name_of_the_program_are_no_tests():
    for asserts in (
        ["assert 1 == 1"],
        ["assert len([1]) == 1", "assert sum([1]) == 1"],
        ["import math\nassert math.pi"],
    ):
        with pytest.raises(ValueError, match="asserts that use a name"):
            read_tests({"asserts": asserts})


@pytest.mark.parametrize(
    ("expected", "got", "same"),
    [
        ("1000000.25", "1000000.75", False),
        ("1000000.25", "1000000.2500000001", True),
        ("1000000000000.25", "1000000000000.75", False),
        ("00e5", "0", False),
        ("0.0", "00e5", False),
        ("7.5", "007.5", False),
        ("0.5", ".5", True),
        ("1e5", "100000", False),
        ("10.5", "1_0.5", False),
        ("10.5", "10.50", True),
        ("0.1", "0.1000000001", True),
        ("1e-09", "2e-09", False),
        ("1e-09", "0.000000001", True),
        ("0.0", "-0.0", True),
        ("0.0", "0.1", False),
        ("inf", "Infinity", False),
        ("a\u2028b", "a\nb", False),
        ("a\r\nb", "a\nb", True),
        ("a\n\nb", "a\nb", False),
        ("1\n2", "1\n2\n3", False),
        ("1\n2\n3", "1\n2", False),
    ],
)
def test_stdout(expected, got, same):
    assert same_output(expected, got) is same


def test_much_output_is_compared_line_by_line():
    import tracemalloc

    lines = "1\n" * (7 << 20)
    tracemalloc.start()
    start = time.process_time()
    assert not same_output("1\n2\n", lines) and not same_output("2", lines)
    assert tracemalloc.get_traced_memory()[1] < 16 << 20 and time.process_time() - start < 2
    tracemalloc.stop()


def test_lists_cross_fast():
    tests = {"asserts": ["assert sum(f(list(range(1_000_000)))) == 500000500000"]}
    start = time.process_time()
    assert judged("def f(x): return [i + 1 for i in x]", tests) is Status.CORRECT
    assert judged("def f(x): return [i + 2 for i in x]", tests) is Status.INCORRECT
    assert time.process_time() - start < 2
    mixed = {
        "asserts": ["assert f([1, 2 ** 80, 1.5, None, True, 'a', [1]]) == [1, 2 ** 80, 1.5, None, True, 'a', [1]]"]
    }
    assert judged("def f(x): return x", mixed) is Status.CORRECT
    assert judged("def f(x): return x[:-1] + [1]", mixed) is Status.INCORRECT


def test_all_tests_of_a_script_have_one_limit():
    tests = {"inputs": ["1"] * 1000, "outputs": ["1"] * 1000}
    start = time.monotonic()
    status = judged("import time\ntime.sleep(1)\nprint(1)", tests, limits=Limits(timeout=20.0, total=2.0))
    assert status is Status.TIMEOUT and time.monotonic() - start < 60
    assert judged("print(1)", {"inputs": ["1"], "outputs": ["1"]}, limits=Limits(timeout=20.0)) is Status.CORRECT


STDIN_NAMES = [
    ("print(sum(int(x) for x in open('/dev/stdin').read().split()))", {"inputs": ["1 2\n"], "outputs": ["3"]}),
    ("print(sum(map(int, open(0).read().split())))", {"inputs": ["1 2\n"], "outputs": ["3"]}),
    ("print(repr(input()))", {"inputs": ["a\r\n"], "outputs": [repr("a\r")]}),  # as it comes
]


@pytest.mark.parametrize(("program", "tests"), STDIN_NAMES)
def test_stdin_by_its_other_names(program, tests):
    if "/dev/stdin" in program and not _strong():
        pytest.skip("a copy of stdin needs bubblewrap")
    assert judged(program, tests) is Status.CORRECT


def _strong() -> bool:
    from hsd.verify import isolation

    return isolation().level == "strong"


def test_as_the_official_harness():
    """Imports and recursion depth; without the option a program brings its own."""
    deep = "def g(n): return 0 if n == 0 else 1 + g(n - 1)\nprint(g(20000))"
    imports = "class Solution:\n    def f(self, x: List[int]) -> int:\n        return gcd(*x)"
    leet = {"fn_name": "f", "inputs": ["[4, 6]"], "outputs": ["2"]}
    for program, tests in (
        (deep, {"inputs": ["1"], "outputs": ["20000"]}),
        (imports, leet),
    ):
        assert judged(program, tests, official=True) is Status.CORRECT, program
        assert judged(program, tests) is not Status.CORRECT, program
    assert judged(imports.replace("gcd", "lcm"), leet, official=True) is Status.INCORRECT
    assert judged("def f(x): return gcd(x, 6)", {"asserts": ["assert f(4) == 2"]}, official=True) is Status.CRASHED


def test_tests_as_json_with_long_integers():
    tests = json.dumps({"fn_name": "f", "inputs": [[1]], "outputs": [[0]]}).replace("[0]", "[1" + "0" * 5000 + "]")
    assert judged("def f(x): return 10 ** 5000", tests) is Status.CORRECT
    assert judged("def f(x): return 10 ** 5001", tests) is Status.INCORRECT
