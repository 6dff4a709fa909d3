"""SDPG (arXiv 2606.04036): GRPO, and a dense divergence where the advantage is positive.

    L = S + b 1[A > 0, R_t <= 20] R_t + a K        # R_t = KL(student || teacher), K = KL(student || initial policy)

a = b = 1e-3, both rising over 50 steps and falling to 0 over the last 350 of 400. The teacher's prompt is OPSD's, its
weights are the student's. Means over rollouts.

Confidence: high (paper and code). A token whose R_t is capped has no gradient in the source; here it adds 0 to the
loss too, there 20 b. With another number of steps give both schedules anew.
"""

from torch import Tensor

from hsd.methods import opsd
from hsd.methods.method import Method
from hsd.methods.term import Stats, Term

RISE_AND_FALL = [[0, 0.0], [50, 1e-3], [400, 0.0]]


def weight(s: Stats) -> Tensor:
    return (s.advantages > 0) & (s.kl <= s.settings["cap"])


METHOD = Method(
    "sdpg",
    opsd.contexts,
    terms=(Term("divergence", weight), Term("advantage")),
    settings={"cap": 20.0},
    defaults={
        "divergence": "reverse_kl",
        "divergence_coef": RISE_AND_FALL,
        "policy_coef": 1.0,
        "reference_coef": RISE_AND_FALL,
    },
)
