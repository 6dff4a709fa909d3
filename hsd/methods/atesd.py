"""ATESD (arXiv 2605.11458) with a fixed share: the teacher sees the head of the reference solution and the answer.

    L = 1/|tokens| sum_{i,t} KL(q || p),  q shown the first floor(a m) of the solution's m segments

a = 0.5 is the plain baseline. The paper draws a from a Beta that a learned controller moves; its constants are
unpublished, and it is not here. Segments are the solution's non-empty lines. Initial weights teach.

Confidence: medium to low (second-hand; a second source agrees on the direction).
"""

import math

from hsd.hindsight.context import Context
from hsd.hindsight.teacher_prompts import RolloutView, parts
from hsd.methods.method import Method


def contexts(view: RolloutView) -> list[Context]:
    segments = [line for line in view.row["solution"].splitlines() if line.strip()]
    head = "\n".join(segments[: math.floor(view.settings["share"] * len(segments))])
    shown = parts(answer=view.answer, head=head)
    return [Context(shown)] if shown else []


METHOD = Method(
    "atesd",
    contexts,
    needs=("solution",),
    settings={"share": 0.5},
    defaults={"teacher": "fixed", "loss_mean": "token", "reference_coef": 0.0},
)
