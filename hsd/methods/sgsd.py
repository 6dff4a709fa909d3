"""SGSD (arXiv 2605.28791): several hints, each a teacher of its own that is followed or fled by the reward.

With d_k = log q_k(o_t) - log p(o_t) (gradient through p) for hint k, means over the rollout's tokens::

    s_k = mean clip(d_k, -3, 3)
    sign_k = (+1 if r > 0 else -1) sign(s_k), 0 where |s_k| <= 0.05
    l_k = mean(log 2 - softplus(-d_k^2 / 2))        # at most log 2; its gradient vanishes for large |d_k|
    L   = mean over rollouts of 1/K sum_k sign_k l_k

The column ``hints`` is a list of texts, up to 8 skills and mistakes; the student's weights teach.

Confidence: very high (code). Not here: the bank that grows, its retrieval (a_k is uniform), the mask of special,
thinking and newline tokens. The source's hints are written by another model beforehand.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from hsd.hindsight.context import Context
from hsd.hindsight.teacher_prompts import RolloutView, parts
from hsd.methods.method import Method
from hsd.methods.term import Stats, Term, d_of

HINTS, CLIP, SILENT = 8, 3.0, 0.05


def contexts(view: RolloutView) -> list[Context]:
    hints = view.row["hints"] or []
    if not isinstance(hints, list) or not all(isinstance(text, str) for text in hints):
        raise TypeError(f"hints: expected a list of texts, got {hints!r:.200}")
    return [Context(parts(hint=text)) for text in hints[:HINTS] if text.strip()]


def loss(logps: Tensor, s: Stats) -> Tensor:
    mask, total, shown = s["mask"].to(logps.dtype), torch.zeros_like(logps), torch.zeros_like(logps[:, :1])
    for k, rows in enumerate(s.contexts):
        there = s[f"has_context_{k}"].to(logps.dtype)  # a rollout may have fewer hints
        score = (d_of(rows).clamp(-CLIP, CLIP) * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp_min(1.0)
        sign = score.sign() * (score.abs() > SILENT) * torch.where(s["reward"] > 0, 1.0, -1.0) * s["scored"] * there
        assert rows.teacher_logps is not None
        d = rows.teacher_logps - logps
        total = total + sign * (math.log(2.0) - softplus(-0.5 * d.square()))
        shown = shown + there
    return total / shown.clamp_min(1.0)


METHOD = Method(
    "sgsd",
    contexts,
    terms=(Term("sampled", loss),),
    max_contexts=HINTS,
    needs=("hints",),
    defaults={"divergence_coef": 0.0, "policy_coef": 1.0, "reference_coef": 0.0},
)
