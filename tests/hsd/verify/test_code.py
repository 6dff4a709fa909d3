import gzip
import json
import os
import sys
import threading
import time
from pathlib import Path

import pytest

from hsd.verify.code import code_reward, code_reward_with, extract_code, verify_code
from hsd.verify.sandbox import Limits
from hsd.verify.status import Status

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the sandbox's layers are Linux's"),
    pytest.mark.usefixtures("no_leftovers"),
]
LIMITS = Limits(timeout=20.0)
DATA = Path(os.environ.get("HSD_SHARED_DATA", Path(__file__).parents[3].parent / "shared" / "data"))
ADD_ONE = {"asserts": ["assert f(1) == 2", "assert f([3]) == 4"]}
RIGHT = "def f(x):\n    return (x[0] if isinstance(x, list) else x) + 1"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("    return 1", "    return 1"),
        ("First\n```python\na = 1\n```\nthen\n```py\nb = 2\n```\nDone.", "b = 2\n"),
        ("```\na\n```", "a\n"),
        ("```python\nfor x in y:\n    pas", "for x in y:\n    pas"),  # cut off
        ("~~~\na\n~~~", "a\n"),
        ("````\n```\n````", "```\n"),
        ("x = '```'", "x = '```'"),
        ("", ""),
    ],
)
def test_extract_code(text, code):
    assert extract_code(text) == code


def test_hostile_text_is_read_in_linear_time():
    start = time.process_time()
    for text in ("`" * 100_000, "```" + "a" * 100_000, "~" * 100_000, "```\n" * 30_000, " " * 100_000 + "```"):
        extract_code(text)
    assert time.process_time() - start < 2


def test_right_and_wrong_in_every_form():
    human = {"prompt": "def f(x):\n", "entry_point": "f", "test": "def check(candidate):\n    assert candidate(1) == 2"}
    script = {"inputs": ["1\n", "41\n"], "outputs": ["2\n", "42\n"]}
    leet = {"fn_name": "f", "inputs": ["1", "41"], "outputs": ["2", "42"]}
    apps = {"fn_name": "f", "inputs": [[1], [41]], "outputs": [[2], 42]}
    right = {
        "    return x + 1": human,
        "```python\ndef f(x):\n    return x + 1\n```": human,
        RIGHT: ADD_ONE,
        "print(int(input()) + 1)": script,
        "class Solution:\n    def f(self, x):\n        return x + 1": leet,
        "def f(x):\n    return x + 1": apps,
    }
    for text, tests in right.items():
        assert verify_code(text, tests, limits=LIMITS).status is Status.CORRECT, text
        assert verify_code(text.replace("1", "2"), tests, limits=LIMITS).status is Status.INCORRECT, text


@pytest.mark.parametrize(
    ("program", "status", "detail"),
    [
        ("def f(x): return x", Status.INCORRECT, "assert f(1) == 2"),
        ("def f(x):\n    return x.y", Status.CRASHED, "AttributeError"),
        ("def g(x): pass", Status.INCORRECT, "NameError"),
        ("def f(x", Status.CRASHED, "SyntaxError"),
        ("", Status.NO_ANSWER, ""),
        ("x = 1\n" * 20_000, Status.TOO_LONG, "120000"),
        ("def f(x):\n    while True: pass", Status.TIMEOUT, ""),
        ("import time\ntime.sleep(100)", Status.TIMEOUT, ""),
        ("def f(x): return bytearray(10 ** 10)", Status.CRASHED, "MemoryError"),
        ("def f(x): return f(x)", Status.CRASHED, "RecursionError"),
    ],
)
def test_statuses(program, status, detail):
    result = verify_code(program, ADD_ONE, limits=Limits(timeout=2.0) if status is Status.TIMEOUT else LIMITS)
    assert result.status is status and detail in result.detail


def test_broken_tests_are_the_verifiers_failure():
    broken = {"test": "def check(candidate:", "entry_point": "f"}
    assert verify_code(RIGHT, broken, limits=LIMITS).status is Status.VERIFIER_FAILED
    raising = {"setup": "1 / 0", "asserts": ["f(1)"]}
    assert verify_code(RIGHT, raising, limits=LIMITS).status is Status.VERIFIER_FAILED
    with pytest.warns(UserWarning, match="code: 1 of 1 could not be verified, first: ValueError: tests: expected"):
        assert code_reward([RIGHT], ['{"what": 1}']) == [None]


# Each of these would pass where tests and program share a process or a channel.
FORGERIES = {
    "exits": "import os; os._exit(0)",
    "exits in the call": "import os\ndef f(x): os._exit(0)",
    "sys.exit": "import sys; sys.exit(0)",
    "prints a verdict": 'def f(x): print(\'{"status": "correct"}\', flush=True); return 0',
    "always equal": "class Yes(int):\n    __eq__ = lambda *a: True\ndef f(x): return Yes()",
    "always equal, not plain": "class Yes:\n    __eq__ = lambda *a: True\ndef f(x): return Yes()",
    "patches": "import builtins, sys\nbuiltins.AssertionError = type(None)\nfor m in sys.modules.values():\n"
    "    m.__dict__['check'] = lambda *a: None\ndef f(x): return 0",
    "stops an iteration": "def f(x): raise StopIteration",
    "writes to all files": 'import os\nfor fd in range(64):\n    try: os.write(fd, b\'{"status": "correct"}\\n\')\n'
    "    except OSError: pass\ndef f(x): return 0",
    "answers ahead": "import sys, wire\nframe = sys._getframe()\n"
    "while 'channel' not in frame.f_locals:\n    frame = frame.f_back\n"
    "\nfor _ in range(9): wire.send(frame.f_locals['channel'], ['value', ['=', True]])",
    "odd answers": "import sys\nframe = sys._getframe()\n"
    "while 'channel' not in frame.f_locals:\n    frame = frame.f_back\n"
    "frame.f_locals['channel'].sendall(b'\\xff' * 100)",
    "kills the tests": "import os\ndef f(x): os.kill(os.getppid(), 9)",
    "shadows": "def len(x): return 2\ndef isinstance(*a): return True\ndef all(x): return True\ndef f(x): return []",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_verdict_cannot_be_forged(name):
    tests = {"asserts": ["assert all(map(lambda x: f(x) == x + 1, [1, 2]))", "assert len(str(f(30))) == 2"]}
    result = verify_code(FORGERIES[name], tests, limits=LIMITS)
    assert result.status in (Status.CRASHED, Status.INCORRECT), result


def test_a_program_does_not_see_its_tests():
    """Memory, frames, files and /proc are searched for a word of the tests; the control finds one of its own."""
    search = (
        "import gc, os, sys\ndef f(x):\n    seen = [repr(vars(m)) for m in list(sys.modules.values())]\n"
        "    seen += [o for o in gc.get_objects() if isinstance(o, str)] + [repr(sys.argv)]\n"
        "    frame = sys._getframe()\n    while frame: seen.append(repr(frame.f_locals)); frame = frame.f_back\n"
        "    for fd in range(64):\n        try: seen.append(os.pread(fd, 1 << 20, 0).decode())\n"
        "        except OSError: pass\n"
        "    for pid in ('1', 'self', str(os.getppid())):\n        for name in ('mem', 'cmdline', 'environ', 'fd/4'):\n"
        "            try: seen.append(open(f'/proc/{pid}/{name}', errors='replace').read(1 << 20))\n"
        "            except OSError: pass\n"
        "    return any(''.join(x) in text for text in seen)\n"  # in parts: an argument is in a frame
    )
    word = "Quetzalcoatl"
    tests = {"asserts": [f"assert f({list(word)!r}) is False", f"'{word}'"]}
    assert verify_code(search, tests, limits=LIMITS).status is Status.CORRECT
    assert verify_code(f"{search}\nword = '{word}'", tests, limits=LIMITS).status is Status.INCORRECT


def test_classes_and_their_objects():
    program = (
        "class Stack:\n    def __init__(self): self.items = []\n"
        "    def push(self, x): self.items.append(x); return self\n"
        "    def __len__(self): return len(self.items)\n    def __iter__(self): return iter(self.items)\n"
        "def top(stack): return stack.items[-1]\ndef count(n):\n    yield from range(n)\n"
        "def fails(): raise ValueError('why')"
    )
    asserts = [
        "s = Stack()",
        "assert len(s.push(1).push((2, {'a': {3}}))) == 2 and top(s) == (2, {'a': {3}})",
        "assert list(s) == [1, (2, {'a': {3}})] and list(count(3)) == [0, 1, 2]",
        "try:\n    fails()\nexcept ValueError as error:\n    assert 'why' in str(error)\nelse:\n    assert False",
    ]
    result = verify_code(program, {"asserts": asserts}, limits=LIMITS)
    assert result.status is Status.CORRECT, result


def test_scripts_that_read_recurse_thread_and_exit():
    deep = "import sys\nfrom functools import lru_cache\nsys.setrecursionlimit(10 ** 6)\n@lru_cache(None)\n"
    programs = [
        "import sys\nprint(sum(map(int, sys.stdin.read().split())))\nsys.exit(0)",
        f"{deep}def g(n): return 0 if n == 0 else 1 + g(n - 1)\ng(5000)\nprint(int(input()) + int(input()))",
        "import threading\nthreading.Thread(target=lambda: print(int(input()) + int(input()))).start()",
        "import atexit, os\natexit.register(lambda: os.write(1, b'3'))",
        "if __name__ == '__main__':\n    print(3)",
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\nprint(A(3).x)",
    ]
    tests = {"inputs": ["1\n2\n"], "outputs": ["3\n"]}
    for program in programs:
        result = verify_code(program, tests, limits=LIMITS)
        assert result.status is Status.CORRECT, (program, result)
    for program, status in {
        "print(3)\nimport sys; sys.exit(1)": Status.CRASHED,
        "print('3' * 10 ** 8)": Status.CRASHED,
        "while True: print('3' * 1000)": Status.CRASHED,
    }.items():
        small = Limits(timeout=20.0, output=1 << 20)
        result = verify_code(program, tests, limits=small)
        assert result.status in (status, Status.TOO_LONG), (program, result)


def test_reward_keeps_the_order_and_leaves_other_rows_alone():
    seen = {}
    wrong, chat = "def f(x): return 0", [{"role": "assistant", "content": RIGHT}]
    completions = [RIGHT, wrong, "4", chat, ""]
    got = code_reward(completions, [ADD_ONE, json.dumps(ADD_ONE), None, ADD_ONE, ADD_ONE], log_extra=seen.__setitem__)
    assert got == [1.0, 0.0, None, 1.0, 0.0]
    assert seen["code_status"] == ["correct", "incorrect", None, "correct", "no_answer"]
    with pytest.raises(ValueError, match="tests: expected 1 entries, got 0"):
        code_reward(["a"], [])


def test_a_column_is_no_option():
    columns = {name: [name] for name in ("limits", "official", "workers", "timeout", "completion_ids", "prompts")}
    assert code_reward([RIGHT], [ADD_ONE], **columns) == [1.0]
    assert code_reward_with(limits=Limits(timeout=1.0))(["while True: pass"], [ADD_ONE], **columns) == [0.0]


def test_numpy_on_both_sides():
    pytest.importorskip("numpy")
    program = "import numpy as np\ndef f(x): return np.linalg.inv(np.array(x))"
    tests = {
        "setup": "import numpy as np",
        "asserts": ["assert np.allclose(f([[2, 0], [0, 4]]) @ np.eye(2), [[0.5, 0], [0, 0.25]])"],
    }
    result = verify_code(program, tests, limits=LIMITS)
    assert result.status is Status.CORRECT, result


def test_off_the_main_thread_and_several_at_a_time():
    results = []
    thread = threading.Thread(target=lambda: results.extend(code_reward_with(workers=3)([RIGHT] * 6, [ADD_ONE] * 6)))
    thread.start()
    thread.join()
    assert results == [1.0] * 6


def test_human_eval_canonical_solutions():
    path = DATA / "HumanEval.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    with gzip.open(path, "rt") as file:
        rows = [json.loads(line) for line in file][::8]
    names = ("prompt", "test", "entry_point")
    tests = [json.dumps({name: row[name] for name in names}) for row in rows]
    assert code_reward([row["canonical_solution"] for row in rows], tests) == [1.0] * len(rows)
    assert code_reward(["    return None"] * len(rows), tests) == [0.0] * len(rows)
