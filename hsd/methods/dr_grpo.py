"""Dr. GRPO (arXiv 2503.20783): GRPO without its two divisions.

    A = R - mean over the group
    S = sum over rollouts and tokens of GRPO's summands / (rollouts x max_completion_length)

Confidence: high (TRL's code, whose steps these are). No division by the group's standard deviation, nor by a rollout's
own length.
"""

from hsd.methods.method import Method

METHOD = Method("dr_grpo", defaults={"loss_type": "dr_grpo", "scale_rewards": "none"})
