"""EGRSD (arXiv 2605.13255): the teacher weighs the advantage, and its doubt takes weight away.

    r   = 1[correct] (1 + length_bonus (1 - |y| / Lmax))
    A   = (r - running mean) / running std
    A_t = A clip(exp(sign(A) D_t), 0.8, 1.2) clip(1 - g H_t / Hmax, 0.1, 1)
    L   = the clipped surrogate with A_t

H_t is the teacher's entropy, Hmax its maximum over the tokens of the whole generation, 1 nat at least. Teacher: the
reference solution (OPSD's prompt), initial weights. g is 0.3 for the paper's 4B and 1.0 for its 8B model.

Confidence: high (paper; no code). Left open by it and chosen here: the running moments count every rollout since the
start, this generation's before they are used; means over rollouts. Unmixed groups keep an advantage. A rollout without
a verdict has none and does not count.
"""

import torch
from torch import Tensor

from hsd.methods import opsd
from hsd.methods.method import Generation, Method
from hsd.methods.state import RunningMoments
from hsd.methods.term import Stats, Term

CLIP, FLOOR = 0.2, 0.1


def on_batch(batch: Generation, moments: RunningMoments) -> dict[str, Tensor]:
    s = batch.stats
    brevity = 1.0 - s["length"] / s.settings["max_completion_length"]
    reward = s["success"] * (1.0 + s.settings["length_bonus"] * brevity)
    scored = s["scored"].to(reward.dtype)
    moments.update(batch.rollouts(reward)[batch.rollouts(scored) > 0])
    advantages = scored * (reward - moments.mean) / max(moments.std, 1e-6)
    entropies = batch.tokens(s.table.teacher_entropy)
    most = entropies.max() if len(entropies) else torch.tensor(1.0)
    return {"advantages": advantages.squeeze(-1), "most_entropy": most.clamp_min(1.0).to(reward.device)}


def weighted(s: Stats, entropy: Tensor) -> Tensor:
    agreement = (s.advantages.sign() * s.d).exp().clamp(1.0 - CLIP, 1.0 + CLIP)
    return s.advantages * agreement * (1.0 - s.settings["g"] * entropy / s["most_entropy"]).clamp(FLOOR, 1.0)


def advantages(s: Stats) -> Tensor:
    return weighted(s, s.table.teacher_entropy)


METHOD = Method(
    "egrsd",
    opsd.contexts,
    terms=(Term("advantage", advantages),),
    on_batch=on_batch,
    scores=True,
    state=RunningMoments,
    settings={"g": 0.3, "length_bonus": 0.5},
    defaults={"teacher": "fixed", "divergence_coef": 0.0, "policy_coef": 1.0, "reference_coef": 0.0},
)
