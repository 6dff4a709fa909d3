"""GRPO (arXiv 2402.03300): A = (R - mean) / std of the group, clipped surrogate, mean
over a rollout's tokens, then over rollouts.

With one update per generated batch every ratio is 1 and the clip does nothing.
"""

from hsd.methods.method import Method

METHOD = Method("grpo", defaults={"loss_type": "grpo"})
