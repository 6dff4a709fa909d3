"""A launcher that ignores SIGCHLD or closes the standard streams does not change a verdict, nor end a run."""

import subprocess
import sys

import pytest

JUDGE = r"""
import os, sys
from hsd.process import settle
settle(); settle()
from hsd.verify import verify_code, verify_math
tests = '{"inputs": ["1"], "outputs": ["2"]}'
found = [verify_math("\\boxed{\\sqrt{8}}", "2\\sqrt{2}").reward, verify_math("\\boxed{\\sqrt{7}}", "2\\sqrt{2}").reward]
found += [verify_code(f"```python\nprint(int(input()) + {n})\n```", tests).reward for n in (1, 2)]
assert sys.stdin is not None and sys.stdout is not None and sys.stderr is not None
with open(sys.argv[1], "w") as file:
    file.write(repr(found))
"""


@pytest.mark.parametrize(
    "shell", ["", "trap '' CHLD;", "exec <&-;", "exec >&- 2>&-;", "trap '' CHLD; exec <&- >&- 2>&-;"]
)
def test_verdicts_whatever_the_launcher(tmp_path, shell):
    script, out = tmp_path / "judge.py", tmp_path / "out"
    script.write_text(JUDGE)
    command = f'{shell} exec "{sys.executable}" "{script}" "{out}"'
    done = subprocess.run(["bash", "-c", command], timeout=120)
    assert done.returncode == 0 and out.read_text() == "[1.0, 0.0, 1.0, 0.0]"
