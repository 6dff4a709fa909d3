"""RLSD (arXiv 2604.03128): the teacher weighs GRPO's advantage, token by token.

With ``D_t = log q(o_t) - log p(o_t)`` (stop-gradient) and the sequence advantage A::

    w_t = exp(sign(A) D_t)
    A_t = A ((1 - l) + l clip(w_t, 0.8, 1.2))        # l from 0.5 to 0 over 50 steps: advantage_mix
    L   = GRPO's clipped surrogate with A_t

The teacher's prompt is OPSD's. Where A = 0 nothing happens.

Confidence: medium to high (second-hand, ports). Conflict: the paper's last equation differs; this is the ports' form.
"""

from torch import Tensor

from hsd.methods import opsd
from hsd.methods.method import Method
from hsd.methods.term import Stats, Term

CLIP = 0.2


def advantages(s: Stats) -> Tensor:
    weight = (s.advantages.sign() * s.d).exp().clamp(1.0 - CLIP, 1.0 + CLIP)
    return s.advantages * ((1.0 - s.mix) + s.mix * weight)


METHOD = Method(
    "rlsd",
    opsd.contexts,
    terms=(Term("advantage", advantages),),
    defaults={
        "divergence_coef": 0.0,
        "policy_coef": 1.0,
        "advantage_mix": [0.5, 0.0, 50],
        "reference_coef": 0.0,
    },
)
