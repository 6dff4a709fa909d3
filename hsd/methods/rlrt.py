"""RLRT (arXiv 2605.10781): a success earns most where a teacher that has seen a solution would not have said it.

    w_t = exp(-sign(A) D_t)
    A_t = A ((1 - l) + l clip(w_t, 1 - e, 1 + e))  where R = 1, A elsewhere        # l = advantage_mix = 0.5
    L   = DAPO's clipped surrogate with A_t

The teacher is the student, shown a correct rollout: a peer's, else the rollout itself. e is 1.0, 0.5 or 0.2 for the
paper's base, instruct and thinking models. Without the gate R = 1 the source's runs collapse near step 40.

Confidence: high (paper, and a second reading). With l = 0 this is DAPO.
"""

import torch
from torch import Tensor

from hsd.hindsight.context import Context
from hsd.hindsight.teacher_prompts import RolloutView, parts
from hsd.methods.method import Method
from hsd.methods.term import Stats, Term


def contexts(view: RolloutView) -> list[Context]:
    if not view.member.success:
        return []
    shown = view.rollout(view.i) if view.peer_ids is None else view.peer_ids
    return [Context(parts(answer=view.answer, demonstration=shown))]


def advantages(s: Stats) -> Tensor:
    e = s.settings["e"]
    weight = (-s.advantages.sign() * s.d).exp().clamp(1.0 - e, 1.0 + e)
    return s.advantages * torch.where(s["success"].bool(), (1.0 - s.mix) + s.mix * weight, 1.0)


METHOD = Method(
    "rlrt",
    contexts,
    terms=(Term("advantage", advantages),),
    draws_peers=True,
    settings={"e": 1.0},
    defaults={
        "show_answer": False,
        "strip_thinking": True,
        "divergence_coef": 0.0,
        "policy_coef": 1.0,
        "policy_mean": "token",
        "epsilon_high": 0.28,
        "advantage_mix": 0.5,
        "reference_coef": 0.0,
    },
)
