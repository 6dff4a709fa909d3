"""DAPO (arXiv 2503.14476): mean over all tokens of the batch, upper clip 0.28, no
reference.

Its dynamic sampling is not in TRL's trainer; its overlong punishment is a reward function of TRL's.
"""

from hsd.methods.method import Method

METHOD = Method("dapo", defaults={"loss_type": "dapo", "epsilon_high": 0.28})
