"""Dr. GRPO (arXiv 2503.20783): A = R - mean; sum over tokens divided by the longest
possible completion.
"""

from hsd.methods.method import Method

METHOD = Method("dr_grpo", defaults={"loss_type": "dr_grpo", "scale_rewards": "none"})
