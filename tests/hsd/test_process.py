"""A launcher that ignores SIGCHLD or closes the standard streams does not change a verdict, nor end a run."""

import logging
import subprocess
import sys

import pytest

from hsd.process import HARMLESS, hush

JUDGE = r"""
import sys
from hsd.verify import code_reward, math_reward
tests = '{"inputs": ["1"], "outputs": ["2"]}'
programs = [f"```python\nprint(int(input()) + {n})\n```" for n in (1, 2)]
found = math_reward(["\\boxed{\\sqrt{8}}", "\\boxed{\\sqrt{7}}"], ["2\\sqrt{2}"] * 2)
found += code_reward(programs, [tests] * 2)
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


@pytest.mark.parametrize("name, start", HARMLESS)
def test_harmless_messages_are_left_out_and_others_of_the_same_library_are_not(name, start, caplog, monkeypatch):
    hush()
    hush()
    logger = logging.getLogger(name)
    assert len(logger.filters) == 1
    monkeypatch.setattr(logging.getLogger(name.partition(".")[0]), "propagate", True)
    logger.warning(start + " And so on.")
    logger.warning("Out of memory.")
    assert set(caplog.messages) == {"Out of memory."}
