"""Plan-weighted reference loss, the published part of SORT (arXiv 2605.11505), and not SORT itself.

    L = GRPO + mean over the groups without a success of -1/|y*| sum_t w_t log p(y*_t | x)
    w_t = sqrt(p(y*_t | x) p(y*_t | x, plan)) / its mean over y*        # no gradient

y* is the column ``solution``, and the plan is what the policy writes from it. In groups with a success, and where the
solution is blank, this is GRPO.

Confidence: low to medium (second-hand): exponent and normalisation of the weight are not published, so it bears its own
name; the geometric mean and the division by the mean are ours.
"""

import torch
from torch import Tensor

from hsd.hindsight.context import Context
from hsd.hindsight.teacher_prompts import parts
from hsd.methods.draw import Ask, Drawn, GroupView, Row, Talk
from hsd.methods.method import Method, nothing
from hsd.methods.term import Stats, Term

ASK = "\n\nA reference solution:\n{solution}\n\nWrite a short plan that leads to it, without numbers or results."


def draw(view: GroupView) -> Talk:
    solution = view.row["solution"] or ""
    if view.group.successes or not solution.strip():
        return None
    (reply,) = yield [Ask(view.ask("ask", solution=solution), secret=True)]
    plan = (Context(parts(plan=reply.text)),) if reply.text.strip() else ()
    return Drawn(rows={0: [Row(solution, plan)]})


def loss(logps: Tensor, s: Stats) -> Tensor:
    w = (0.5 * (s.student_logps + s.teacher_logps)).exp() * s["mask"]
    w = w / (w.sum(-1, keepdim=True) / s["length"]).clamp_min(torch.finfo(w.dtype).tiny)
    return -w * logps


METHOD = Method(
    "plan_reference",
    nothing,
    terms=(Term("advantage"), Term("sampled", loss, rows=True)),
    draw=draw,
    max_rows=1,
    needs=("solution",),
    settings={"ask": ASK},
    defaults={"divergence_coef": 0.0, "policy_coef": 1.0, "reference_coef": 0.0},
)
