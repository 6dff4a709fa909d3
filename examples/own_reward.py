"""A reward function of one's own on a real model, SmolLM2-135M-Instruct from PyPI:

    hsd train examples/own_reward.yaml      # from the root of the repository
    hsd sample .cache/smollm2-135m-instruct runs/own_reward --prompt "What is 17 + 8?"

Any function `(completions, **columns) -> list[float | None]` is a reward, by `--reward MODULE:FUNCTION`. The module is
imported from the current folder. Columns are those of the questions. `None` is no verdict.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from hsd.verify.numbers import last_number
from hsd.verify.status import Completion, completion_text

EQUATION = re.compile(r"(\d+) ?\+ ?(\d+) ?= ?(\d+)\.?")


def equation_alone(completions: Sequence[Completion], answer: Sequence[str], **columns: Any) -> list[float]:
    """1.0 for a true equation with the right sum, as "17 + 8 = 25", and nothing else; 0.5 for another reply whose last
    number is right; else 0.0.

    A rollout is a success, and may be shown to the teacher, from 1.0 on (`success_reward`).
    """
    return [_judge(completion_text(c).strip(), right) for c, right in zip(completions, answer, strict=True)]


def _judge(reply: str, right: str) -> float:
    if equation := EQUATION.fullmatch(reply):
        a, b, total = map(int, equation.groups())
        if a + b == total == int(right):
            return 1.0
    return 0.5 if last_number(reply) == right else 0.0
