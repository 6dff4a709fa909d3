"""GRPO and its variants, by `trl.GRPOTrainer`'s own loss over the same rollouts, data and optimizer.

    grpo      A = (R - mean) / std of the group; clipped surrogate, mean over tokens, then over rollouts
    dr_grpo   A = R - mean; sum over tokens divided by the longest possible completion (arXiv 2503.20783)
    gspo      one importance ratio a rollout, its tokens' geometric mean; clip 3e-4 / 4e-4 (arXiv 2507.18071)
    dapo      mean over all tokens of the batch, upper clip 0.28, no reference (arXiv 2503.14476)

With one update per generated batch every ratio is 1: the clips do nothing, and gspo is grpo. DAPO's dynamic sampling is
not in TRL's trainer; its overlong punishment is a reward function of TRL's.
"""

from hsd.methods.method import Method

GRPO = Method("grpo", trl_loss=True, defaults={"loss_type": "grpo"})
DR_GRPO = Method("dr_grpo", trl_loss=True, defaults={"loss_type": "dr_grpo", "scale_rewards": "none"})
GSPO = Method(
    "gspo",
    trl_loss=True,
    defaults={
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "epsilon": 3e-4,
        "epsilon_high": 4e-4,
    },
)
DAPO = Method("dapo", trl_loss=True, defaults={"loss_type": "dapo", "epsilon_high": 0.28})
