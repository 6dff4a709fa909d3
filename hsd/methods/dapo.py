"""DAPO (arXiv 2503.14476): GRPO with a mean over all tokens and a higher upper clip.

    S = mean over all tokens of the step of -min(r_t A, clip(r_t, 0.8, 1.28) A),  no reference

Its dynamic sampling is not here; its overlong punishment is a reward function of TRL's.
"""

from hsd.methods.method import Method

METHOD = Method("dapo", defaults={"loss_type": "dapo", "epsilon_high": 0.28})
