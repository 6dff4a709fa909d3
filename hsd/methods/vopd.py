"""vOPD (arXiv 2605.07865): the policy gradient of the reverse KL, with its exact baseline.

    A_t = rl A + D_t + B_t,  B_t = KL(p || q)        # E[D_t + B_t] = 0 over o_t ~ p, A of the group's rewards
    L   = the clipped surrogate with A_t, mean over tokens

In expectation the gradient is that of the dense KL(student || teacher), with or without B; B lowers its variance.

Confidence: high (code). The paper's teacher is another model; here it is OPSD's, initial weights and the solution in
the prompt. Its baseline over the student's top 100 is not here. ``rl`` is 0 or 1 in the source.
"""

from torch import Tensor

from hsd.methods import opsd
from hsd.methods.method import Method
from hsd.methods.term import Stats, Term


def advantages(s: Stats) -> Tensor:
    return s.settings["rl"] * s.advantages + s.d + s.settings["baseline"] * s.kl


METHOD = Method(
    "vopd",
    opsd.contexts,
    terms=(Term("advantage", advantages),),
    settings={"rl": 0.0, "baseline": 1.0},
    defaults={
        "teacher": "fixed",
        "divergence": "reverse_kl",
        "divergence_coef": 0.0,
        "policy_coef": 1.0,
        "policy_mean": "token",
        "reference_coef": 0.0,
    },
)
