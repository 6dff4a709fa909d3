import json

import pytest

from hsd.verify.suites import Script, Suite, read_tests, same_output


def test_the_three_forms():
    given = {"test": "def check(candidate):\n    assert candidate(1) == 2", "entry_point": "f", "prompt": "def f(x):\n"}
    suite = read_tests(given)
    assert isinstance(suite, Suite) and suite.names == ("f",) and suite.source.endswith("check(f)")
    assert suite.setup == "def f(x):\n    pass\n"  # the prompt alone is not Python
    assert read_tests(json.dumps(given)) == suite
    assert read_tests({"inputs": ["1\n", ["2", "3"]], "outputs": ["1", ["2", 3]]}) == Script(
        ("1\n", "2\n3"), ("1", "2\n3")
    )
    functions = read_tests({"fn_name": "f", "inputs": ["1\n[2]"], "outputs": ["3"]})
    assert isinstance(functions, Suite) and functions.names == ("Solution", "f")


def test_only_names_that_nobody_else_defines_are_the_programs():
    setup = "import re\nfrom os import path as p\nclass Node: pass\ndef near(a, b): return abs(a - b) < 1"
    source = ["x = f(Node())", "assert near(x, len([1])) and math.pi and re and p and g.h"]
    assert read_tests({"setup": setup, "asserts": source}).names == ("f", "g")  # type: ignore[union-attr]


def test_a_program_continues_the_prompt_or_replaces_it():
    suite = read_tests({"test": "", "entry_point": "f", "prompt": "import math\ndef f(x):\n    '''Doc.'''\n"})
    assert isinstance(suite, Suite)
    assert suite.program("    return x\n") == "import math\ndef f(x):\n    '''Doc.'''\n    return x\n"
    for code in ("def f(x):\n    return math.pi", "f = abs", "class f: pass", "def f(x): return ("):
        assert suite.program(code).endswith(f"\n\n{code}"), code
    for code in ("    def f(x): pass", "    g.f = 1"):
        assert not suite.program(code).endswith(f"\n\n{code}"), code


@pytest.mark.parametrize(
    "tests",
    [
        {},
        "",
        "[1]",
        {"inputs": ["1"], "outputs": []},
        {"inputs": [], "outputs": []},
        {"asserts": ["f("]},
        {"fn_name": "f()", "inputs": [[1]], "outputs": [1]},
        {"fn_name": "f", "inputs": ["not JSON"], "outputs": ["1"]},
        3,
    ],
)
def test_other_forms_are_refused(tests):
    with pytest.raises(ValueError, match="tests: expected"):
        read_tests(tests)


@pytest.mark.parametrize(
    ("expected", "got", "same"),
    [
        ("1 2\n3\n", "1 2 \n3", True),
        ("1 2", "1  2", True),
        ("0.5", "0.50000001", True),
        ("0.5", "0.51", False),
        ("1e-9", "1.0e-9", True),
        ("5", "5.0", False),  # an expected integer is text
        ("nan.", "nan", False),
        ("a\nb", "a b", False),
        ("a", "", False),
        ("", "\n", True),
        ("Yes", "YES", False),
    ],
)
def test_same_output(expected, got, same):
    assert same_output(expected, got) is same
