"""Self-Distillation Fine-Tuning (SDFT, arXiv 2601.19897): the teacher's prompt has the data set's demonstration.

    L = 1/|tokens| sum_{i,t} JSD_0.5(p, q)

Confidence: low (second-hand, a port). Conflict: published descriptions disagree on the teacher's weights (live, EMA)
and on the divergence (KL(p || q)); two descendants skip the first 3 tokens (``skip_tokens=3``). These are the defaults
of TRL 1.16's SDFTTrainer (initial policy, JSD with 0.5) over the full vocabulary. The data set needs a
``demonstration`` column.
"""

from hsd.hindsight.context import Context
from hsd.hindsight.teacher_prompts import RolloutView
from hsd.methods.method import Method, demonstrate


def contexts(view: RolloutView) -> list[Context]:
    return demonstrate(view, view.row.get("demonstration"))


METHOD = Method(
    "sdft",
    contexts,
    needs=("demonstration",),
    defaults={
        "teacher": "fixed",
        "show_answer": False,
        "fallback": "mask",
        "divergence": "jsd",
        "loss_mean": "token",
        "reference_coef": 0.0,
    },
)
