"""GRPO beside OPSD, the mixture of the HSD paper's tables (arXiv 2606.15576).

    L = S + 0.5 D        # S: GRPO's clipped surrogate, D: OPSD's divergence, both as means over rollouts

The teacher and its prompt are OPSD's.

Confidence: medium (the table has the 0.5). Ours: the means over rollouts.
"""

from hsd.methods import opsd
from hsd.methods.method import Method

METHOD = Method(
    "grpo+opsd",
    opsd.contexts,
    defaults={**opsd.METHOD.defaults, "loss_mean": "rollout", "policy_coef": 1.0, "divergence_coef": 0.5},
)
