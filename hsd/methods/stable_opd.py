"""StableOPD (arXiv 2604.08527): a policy gradient towards the teacher, held by gold solutions and the initial policy.

    A_t = D_t,  S: the clipped surrogate with A_t, mean over tokens
    L   = S + lambda x mean over questions of -1/|y*| sum_t log p(y*_t | x)  +  beta KL(p || initial) on the rollouts

y* is the column ``solution``, one extra row a question that has it. lambda is ``method_args.gold`` and beta
``reference_coef``, which the source does not publish; 64 questions x 4 rollouts, T 1, lr 1e-6.

Confidence: medium (second-hand, detailed). The source's teacher is another model; here it is OPSD's, initial weights
and the solution in the prompt. Its alarms: ``completions/clipped_ratio``, and ``hsd/compression`` of ``diagnostics``.
"""

from torch import Tensor

from hsd.methods import opsd
from hsd.methods.draw import Drawn, GroupView, Row, Talk
from hsd.methods.method import REQUIRED, Method
from hsd.methods.term import Stats, Term


def draw(view: GroupView) -> Talk:
    yield from ()
    solution = view.row["solution"] or ""
    return Drawn(rows={0: [Row(solution)]} if solution.strip() else {})


def gold(logps: Tensor, s: Stats) -> Tensor:
    return -s.settings["gold"] * logps


METHOD = Method(
    "stable_opd",
    opsd.contexts,
    terms=(Term("advantage", lambda s: s.d), Term("sampled", gold, rows=True, teacher=False)),
    draw=draw,
    max_rows=1,
    needs=("solution",),
    settings={"gold": REQUIRED},
    defaults={
        "teacher": "fixed",
        "divergence_coef": 0.0,
        "policy_coef": 1.0,
        "policy_mean": "token",
        "reference_coef": REQUIRED,
    },
)
