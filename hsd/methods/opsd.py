"""On-Policy Self-Distillation (OPSD, arXiv 2601.18734).

The teacher's prompt has the answer and, where the data set has a ``solution`` column, that solution; its weights
are the initial policy's::

    L = 1/|tokens| sum_{i,t} sum_v min(q(v) log(q(v) / p(v)), 0.05)        # KL(teacher || student), clipped pointwise

Confidence: high (code). The paper's first version is ``divergence="jsd", kl_temperature=1.1, kl_clip=0``. Ours: the
answer beside the solution (``show_answer``), and alone where there is none. Its lr is 5e-6, its gradient norm 0.1.
"""

from hsd.hindsight.context import Context
from hsd.hindsight.teacher_prompts import RolloutView
from hsd.methods.method import Method, demonstrate


def contexts(view: RolloutView) -> list[Context]:
    return demonstrate(view, view.row.get("solution"))


METHOD = Method(
    "opsd",
    contexts,
    defaults={"teacher": "fixed", "kl_clip": 0.05, "loss_mean": "token", "reference_coef": 0.0},
)
