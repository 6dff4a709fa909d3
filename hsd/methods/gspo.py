"""GSPO (arXiv 2507.18071): GRPO with one importance ratio a rollout.

    r = exp(mean_t (log p(o_t) - log p_old(o_t))),  clipped at 1 - 3e-4 and 1 + 4e-4
    S = mean over rollouts of -min(r A, clip(r) A)

Confidence: high (TRL's code, whose steps these are). With one update per generated batch every ratio is 1, and this is
GRPO.
"""

from hsd.methods.method import Method

METHOD = Method(
    "gspo",
    defaults={
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "epsilon": 3e-4,
        "epsilon_high": 4e-4,
    },
)
