"""Metrics of a batch, by name and without "hsd/". NaN where there is nothing to measure."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hsd.hindsight.credit import credit, credit_at_divergence, credit_mass
from hsd.hindsight.teacher_prompts import TeacherPrompt
from hsd.train.batch import RolloutBatch
from hsd.train.diagnostics import of_stats
from hsd.train.update import LossOutput


def group_metrics(success: Tensor, has_peer: Tensor, unscored: Tensor, size: int) -> dict[str, Tensor]:
    """Shares of the rollouts of all ranks, from (N,) flags, groups of ``size`` one after the other. A rollout without a
    verdict has neither succeeded nor failed."""
    failing = ~success & ~unscored
    solved = success.reshape(-1, size).float().mean(-1)
    return {
        "success_rate": success.sum() / (~unscored).sum(),
        # f(p, G) of hsd.hindsight.credit.coverage is the expectation of this share of all rollouts.
        "coverage": (failing & has_peer).sum() / (~unscored).sum(),
        "failing_with_peer": (failing & has_peer).sum() / failing.sum(),
        "mixed_groups": ((solved > 0) & (solved < 1)).float().mean(),
        "unscored": unscored.float().mean(),
    }


def context_metrics(prompts: Sequence[Sequence[TeacherPrompt]]) -> dict[str, float]:
    """Of the first context of each rollout."""
    return {
        "fallback_share": sum(row[0].context.kind != "peer" for row in prompts) / len(prompts),
        "demonstration_truncated": sum(row[0].context.truncated for row in prompts) / len(prompts),
    }


def loss_metrics(out: LossOutput, batch: RolloutBatch, *, diagnostics: bool = False) -> dict[str, Tensor]:
    """Means over the tokens of a micro-batch, in nats, and credit of its failing rollouts."""
    stats = out.stats
    if stats is None:
        return {}
    assert batch.teacher.divergence_position is not None
    assert stats.student_logps is not None and stats.teacher_logps is not None
    mask = batch.divergence_mask
    a = credit(stats.teacher_logps, stats.student_logps)
    failing = torch.where(batch.teacher.success, -1, batch.teacher.divergence_position)
    diverged = failing[failing >= 0].float()
    tokens = mask.sum()
    found = {
        "kl": (stats.kl * mask).sum() / tokens,
        "student_entropy": (stats.student_entropy * mask).sum() / tokens,
        "teacher_entropy": (stats.teacher_entropy * mask).sum() / tokens,
        "tau": diverged.median() if diverged.numel() else diverged.new_tensor(float("nan")),
        "credit_at_tau": credit_at_divergence(a, mask, failing),
        "credit_mass_8": credit_mass(a, mask, failing, windows=(8,))[0],  # micro-batches count alike
    }
    if diagnostics:
        found |= of_stats(stats, mask) | dict(out.overlap)
    if out.reference is not None:
        found["reference_kl"] = (out.reference.kl * mask).sum() / tokens
    return found
