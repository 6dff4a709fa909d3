"""MSD (arXiv 2605.02971): a question in another language, and a teacher that is also shown it in English.

    L = 1/|tokens| sum_{i,t} w_t KL(p || q),  w_t = confidence x risk
    confidence = clip(1 - H_q / h, 0, 1),  risk = 1 - p(o_t)

The teacher is the student, shown the column ``translation`` and asked to think in English.

Confidence: medium to low (second-hand). The paper takes the confidence from the teacher's top-K entropy in a form that
is not published: this one is ours, and h (nats, ``no_confidence``) has no default. The off-policy version is not here.
"""

from torch import Tensor

from hsd.hindsight.context import Context
from hsd.hindsight.teacher_prompts import RolloutView, parts
from hsd.methods.method import REQUIRED, Method
from hsd.methods.term import Stats, Term


def contexts(view: RolloutView) -> list[Context]:
    shown = parts(translation=view.row["translation"])
    return [Context(shown)] if shown else []


def weight(s: Stats) -> Tensor:
    confidence = (1.0 - s.table.teacher_entropy / s.settings["no_confidence"]).clamp(0.0, 1.0)
    return confidence * -s.student_logps.expm1()


METHOD = Method(
    "msd",
    contexts,
    terms=(Term("divergence", weight),),
    needs=("translation",),
    settings={"no_confidence": REQUIRED},
    defaults={"divergence": "reverse_kl", "loss_mean": "token", "reference_coef": 0.0},
)
