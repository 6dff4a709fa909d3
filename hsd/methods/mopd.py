"""MOPD (arXiv 2605.12652): SDPO's loss under a context of two successes and a failure.

The teacher is shown the group's first other success, the second one, a random failed peer that is marked as failing,
and, where there is no success, the environment's feedback; a rollout with none of these is left out::

    L = 1/|tokens| sum_{i,t} min(pi / pi_old, 2) KL(p || q)        # RKL for mathematics, JSD_0.5 otherwise in the paper

An EMA of the student (0.05) teaches. The paper's top 100 and tail is ``kl_top_k=100``.

Confidence: high (paper and code). Conflict: the run script always shows the failure, the code's default only where
there is no success; ``failure`` is "always" or "fallback". Unlike SDPO's, the peers keep their thinking.
"""

from hsd.hindsight.context import Context
from hsd.hindsight.teacher_prompts import RolloutView, parts
from hsd.methods.method import Method, other_successes


def contexts(view: RolloutView) -> list[Context]:
    if view.settings["failure"] not in ("always", "fallback"):
        raise ValueError(f"method_args.failure: expected 'always' or 'fallback', got {view.settings['failure']!r}")
    right = [shown for j in other_successes(view)[:2] if (shown := view.rollout(j))]
    wrong = [j for j in view.group.failures if j != view.i]
    shows_failure = wrong and (not right or view.settings["failure"] == "always")
    shown = parts(
        answer=view.answer,
        demonstration=right[0] if right else None,
        second=right[1] if len(right) > 1 else None,
        failure=view.rollout(view.rng.choice(wrong)) if shows_failure else None,
        feedback=None if right else view.feedback,
    )
    return [Context(shown, cut=("failure", "second", "feedback", "demonstration"))] if shown else []


METHOD = Method(
    "mopd",
    contexts,
    uses_feedback=True,
    settings={"failure": "always"},
    defaults={
        "teacher": "ema",
        "teacher_ema_rate": 0.05,
        "show_answer": False,
        "divergence": "reverse_kl",
        "loss_mean": "token",
        "importance_cap": 2.0,
        "reference_coef": 0.0,
    },
)
