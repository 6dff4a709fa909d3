"""Self-Distillation Policy Optimization (SDPO, arXiv 2601.20802), by default with the full vocabulary.

The teacher is shown the group's first other success, without the answer, else the environment's feedback on this very
rollout; a rollout with neither is left out. An EMA of the student teaches::

    L = 1/|tokens| sum_{i,t} min(pi / pi_old, 2) JSD_0.5(p, q)

Confidence: high (code). pi / pi_old is 1 with one update per generated batch. The EMA moves by 0.05 an optimizer step;
the paper's alternative is ``teacher="trust_region"``. Its settings: JSD, ``kl_top_k=100`` (the student's, and one
bucket for the tail); with rich feedback ``divergence="reverse_kl"``, ``kl_top_k=20``. Its correction for a rollout
engine that differs from the model is not here.
"""

from hsd.hindsight.context import Context
from hsd.hindsight.teacher_prompts import RolloutView
from hsd.methods.method import Method, demonstrate


def contexts(view: RolloutView) -> list[Context]:
    return demonstrate(view, view.peer_ids, view.feedback)


METHOD = Method(
    "sdpo",
    contexts,
    draws_peers=True,
    uses_feedback=True,
    defaults={
        "teacher": "ema",
        "teacher_ema_rate": 0.05,
        "show_answer": False,
        "strip_thinking": True,
        "fallback": "mask",
        "peer_rule": "first",
        "divergence": "jsd",
        "loss_mean": "token",
        "importance_cap": 2.0,
        "reference_coef": 0.0,
    },
)
