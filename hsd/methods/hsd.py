"""Hindsight Self-Distillation (arXiv 2606.15576).

The teacher's prompt is ``[q ; c_i]``, with ``c_i = (a*, o_i+)``, the answer and a successful peer of the same group,
else ``c_i = a*``::

    J = 1/G sum_i 1/|o_i| sum_t KL(pi(. | q, c_i, o_<t) || pi(. | q, o_<t))  +  beta KL(pi || pi_0)

With ``policy_coef`` c the loss is J + c times GRPO's clipped surrogate over the same rollouts.

Confidence: high (paper). It calls this KL "reverse" and draws peers uniformly; ``peer_rule="auto"`` pairs them where
prefixes are shared, with the same expected gradient.
"""

from hsd.hindsight.context import Context
from hsd.hindsight.teacher_prompts import RolloutView
from hsd.methods.method import Method, demonstrate


def contexts(view: RolloutView) -> list[Context]:
    return demonstrate(view, view.peer_ids)


# All options of `HSDConfig` that a method decides where the user does not; the other methods override some.
METHOD = Method(
    "hsd",
    contexts,
    draws_peers=True,
    defaults={
        "teacher": "live",
        "teacher_ema_rate": 0.005,
        "teacher_copy_steps": 10,
        "show_answer": True,
        "fallback": "answer",
        "peer_rule": "auto",
        "divergence": "forward_kl",
        "jsd_beta": 0.5,
        "kl_temperature": 1.0,
        "kl_clip": 0.0,
        "kl_top_k": 0,
        "kl_top_of": "student",
        "kl_rest": "tail",
        "kl_floor": 0.0,
        "loss_mean": "rollout",
        "policy_mean": "rollout",
        "skip_tokens": 0,
        "strip_thinking": False,
        "importance_cap": 0.0,
        "divergence_coef": 1.0,
        "policy_coef": 0.0,
        "advantage_mix": 0.0,
        "reference_coef": 0.001,
        "reference_kl": "exact",
    },
)
