"""GSPO (arXiv 2507.18071): one importance ratio a rollout, the geometric mean of its
tokens', clipped at 3e-4 / 4e-4.

With one update per generated batch every ratio is 1, and this is GRPO.
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
