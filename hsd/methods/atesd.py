"""ATESD (arXiv 2605.11458) with a fixed share: the teacher sees the head of the reference solution and the answer.

    L = 1/|tokens| sum_{i,t} KL(q || p),  q shown the first floor(a m) of the solution's m segments and the answer

a = 0.5 is the plain baseline. The paper draws a from a Beta that a learned controller moves: `atesd_learned`. Segments
are the solution's non-empty lines. Initial weights teach.

Confidence: medium to low (second-hand; a second source agrees on the direction).
"""

import math

from hsd.hindsight.context import Context
from hsd.hindsight.teacher_prompts import RolloutView, parts
from hsd.methods.method import Method


def head(view: RolloutView, share: float) -> list[Context]:
    segments = [line for line in (view.row["solution"] or "").splitlines() if line.strip()]
    shown = parts(answer=view.answer, head="\n".join(segments[: math.floor(share * len(segments))]))
    return [Context(shown)] if shown else []


def contexts(view: RolloutView) -> list[Context]:
    return head(view, view.settings["share"])


METHOD = Method(
    "atesd",
    contexts,
    needs=("solution",),
    settings={"share": 0.5},
    defaults={"teacher": "fixed", "loss_mean": "token", "reference_coef": 0.0},
)
