"""Numbers about student, teacher and texts that cost more than a step's own, on demand (``HSDConfig.diagnostics``)."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from hsd.policy.body_and_head import logits
from hsd.policy.forward import FrozenStates
from hsd_kernels import Head, RowStats

# Of a response that reasons aloud: arXiv 2603.24472.
EPISTEMIC = ("wait", "hmm", "perhaps", "maybe", "actually", "alternatively", "seems", "might", "likely", "check")
TAIL = 10_000  # characters
TOP_K = 16
CHUNK = 64  # tokens whose logits are there at a time


def of_texts(texts: Sequence[str]) -> dict[str, float]:
    """Means over rollouts: how often their last 10,000 characters shrink (zlib; above 10 they repeat, arXiv 2604.08527)
    and how many epistemic words they have."""
    tails = [text[-TAIL:].encode() for text in texts if text]
    ratios = [len(tail) / len(zlib.compress(tail)) for tail in tails]
    words = [sum(w in EPISTEMIC for w in re.findall(r"[a-z]+", text.lower())) for text in texts]
    nan = float("nan")
    return {
        "compression": sum(ratios) / len(ratios) if ratios else nan,
        "epistemic_words": sum(words) / len(words) if words else nan,
    }


def of_stats(stats: RowStats, mask: Tensor) -> dict[str, Tensor]:
    """``teacher_sharpening``, the slope of log q(o_t) on log p(o_t) over the tokens (above 1 the teacher is sharper),
    ``entropy_gap``, the mean |H_q - H_p| in nats."""
    at = mask.bool()
    assert stats.student_logps is not None and stats.teacher_logps is not None
    x, y = stats.student_logps[at].double(), stats.teacher_logps[at].double()
    x = x - x.mean()
    return {
        "teacher_sharpening": (x * y).sum() / x.square().sum(),
        "entropy_gap": (stats.teacher_entropy - stats.student_entropy)[at].abs().mean(),
    }


@torch.no_grad()
def overlap(student: Tensor, teacher: FrozenStates, head: Head, mask: Tensor, temperature: float) -> dict[str, Tensor]:
    """Of the k = 16 likeliest tokens of both sides, arXiv 2604.13016, means over the tokens of ``mask``.

    ``top_overlap`` |top(p) n top(q)| / k; ``overlap_advantage`` sum p~ (log q~ - log p~) over the tokens that both
    have, renormalised there: at most 0, and near 0 where the two agree. Nats.

    Args:
        student, teacher: States (B, T, D).
    """
    at = mask.bool()
    mine, theirs = student[at], teacher.hidden[at]
    shares, gains = [], []
    for start in range(0, len(mine), CHUNK):
        x_s, x_t = (
            logits(head, mine[start : start + CHUNK]),
            logits(teacher.head or head, theirs[start : start + CHUNK]),
        )
        log_p, log_q = ((x / temperature).log_softmax(-1) for x in (x_s, x_t))
        k = min(TOP_K, log_p.shape[-1])
        both = _top(log_p, k) & _top(log_q, k)
        shares.append(both.sum(-1) / k)
        p, q = (x.masked_fill(~both, -torch.inf).log_softmax(-1) for x in (log_p, log_q))
        gain = torch.where(both, p.exp() * (q - p), 0.0).sum(-1)
        gains.append(torch.where(both.any(-1), gain, torch.nan))
    if not shares:
        return {}
    return {"top_overlap": torch.cat(shares).mean(), "overlap_advantage": torch.cat(gains).nanmean()}


def _top(x: Tensor, k: int) -> Tensor:
    return torch.zeros_like(x, dtype=torch.bool).scatter(-1, x.topk(k, -1).indices, True)
