"""On-Policy Self-Distillation (OPSD, arXiv 2601.18734), alone and beside GRPO.

The teacher reads the answer and, where the data set has a ``solution`` column, the reference solution; its weights are
the initial policy's::

    L = 1/|tokens| sum_{i,t} sum_v min(q(v) log(q(v) / p(v)), 0.05)        # KL(teacher || student), clipped pointwise

The paper's first version is ``divergence="jsd", kl_temperature=1.1, kl_clip=0``. ``grpo+opsd`` is the mixture of the
HSD paper's tables, GRPO's surrogate plus 0.5 times the divergence, both as means over rollouts.
"""

from hsd.methods.method import Method

OPSD_DEFAULTS = {"teacher": "fixed", "kl_clip": 0.05, "loss_mean": "token", "reference_coef": 0.0}
OPSD = Method("opsd", demonstration="solution", defaults=OPSD_DEFAULTS)
GRPO_OPSD = Method(
    "grpo+opsd",
    demonstration="solution",
    defaults=OPSD_DEFAULTS | {"loss_mean": "rollout", "policy_coef": 1.0, "divergence_coef": 0.5},
)
