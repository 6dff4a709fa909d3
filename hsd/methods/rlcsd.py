"""RLCSD: RLSD without what a wrong hint also says.

    D_t = log q+(o_t) - log q-(o_t)        # q+ is shown a successful peer, q- a failed one, in the same words
    A_t = A ((1 - l) + l clip(exp(sign(A) D_t), 0.8, 1.2))        # l from 0.5 to 0 over 50 steps
    L   = the clipped surrogate with A_t

Confidence: low. Our sources are second-hand: they say that the gap of a wrong context is subtracted, not which text it
has. A failed peer in the words of a success is our choice. A rollout keeps A without both kinds of
peers, and where one of the two drawn is blank.
"""

import torch
from torch import Tensor

from hsd.hindsight.context import Context
from hsd.hindsight.teacher_prompts import RolloutView, parts
from hsd.methods.method import Method, other_successes
from hsd.methods.rlsd import CLIP
from hsd.methods.term import Stats, Term, d_of


def contexts(view: RolloutView) -> list[Context]:
    right = other_successes(view)
    wrong = [j for j in view.group.failures if j != view.i]
    shown = [view.rollout(view.rng.choice(some)) for some in (right, wrong) if some]
    return [Context(parts(demonstration=one)) for one in shown] if len(shown) == 2 and all(shown) else []


def advantages(s: Stats) -> Tensor:
    right, wrong = (d_of(rows) for rows in s.contexts)
    weight = (s.advantages.sign() * (right - wrong)).exp().clamp(1.0 - CLIP, 1.0 + CLIP)
    return s.advantages * torch.where(s["has_context"].bool(), (1.0 - s.mix) + s.mix * weight, 1.0)


METHOD = Method(
    "rlcsd",
    contexts,
    terms=(Term("advantage", advantages),),
    max_contexts=2,
    defaults={
        "strip_thinking": True,
        "divergence_coef": 0.0,
        "policy_coef": 1.0,
        "advantage_mix": [0.5, 0.0, 50],
        "reference_coef": 0.0,
    },
)
