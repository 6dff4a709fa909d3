"""Metrics of a batch, by name and without "hsd/". NaN where there is nothing to measure."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hsd.hindsight.credit import credit, credit_at_divergence, credit_mass
from hsd.hindsight.groups import least_success
from hsd.hindsight.teacher_prompts import TeacherPrompt
from hsd.train.batch import RolloutBatch
from hsd.train.diagnostics import of_stats
from hsd.train.update import LossOutput


def group_metrics(success: Tensor, has_peer: Tensor, unscored: Tensor, size: int) -> dict[str, Tensor]:
    """Shares of the rollouts of all ranks, from (N,) flags, groups of ``size`` one after the other. A rollout without a
    verdict is neither a success nor a failure."""
    failing = ~success & ~unscored
    solved, failed = (flags.reshape(-1, size).any(-1) for flags in (success, failing))
    return {
        "success_rate": success.sum() / (~unscored).sum(),
        # f(p, G) of hsd.hindsight.credit.coverage is the expectation of this share of all rollouts.
        "coverage": (failing & has_peer).sum() / (~unscored).sum(),
        "failing_with_peer": (failing & has_peer).sum() / failing.sum(),
        "mixed_groups": (solved & failed).float().mean(),
        "unscored": unscored.float().mean(),
    }


def teacher_success(rewards: Sequence[float], counts: Tensor, success_reward: float) -> Tensor:
    """Share of successes among the replies to teachers' prompts that count (N,): with a context and a verdict."""
    successes = torch.tensor(rewards, device=counts.device) >= least_success(success_reward)
    return (successes & counts).sum() / counts.sum()


def initial_gap(gaps: Sequence[float], divergence: str) -> str | None:
    """The sentence about "kl" of the micro-batches of step 1; None where none of them measured it."""
    measured = [gap for gap in gaps if not math.isnan(gap)]
    if not measured:
        return None
    gap = sum(measured) / len(measured)
    size = f"{gap:.3g} nats a token" if math.isfinite(gap) else "infinitely far"
    return f"before step 1 student and teacher are {size} apart ({divergence})"


def context_metrics(prompts: Sequence[Sequence[TeacherPrompt]]) -> dict[str, float]:
    """Of the first context of each rollout."""
    return {
        "fallback_share": sum(row[0].context.kind != "peer" for row in prompts) / len(prompts),
        "demonstration_truncated": sum(row[0].context.truncated for row in prompts) / len(prompts),
    }


def loss_metrics(
    out: LossOutput, batch: RolloutBatch, *, temperature: float = 1.0, diagnostics: bool = False
) -> dict[str, Tensor]:
    """Means over the tokens of a micro-batch, in nats, and credit of its failing rollouts. Nothing of a teacher that no
    term reads at this step.

    ``temperature``: of the divergence, at which all but the KL to the reference is measured.
    """
    stats, mask, found = out.stats, batch.divergence_mask, {}
    tokens = mask.sum()
    if out.reference is not None:
        if temperature == 1.0:  # the reference's: an entropy at another one would seem to grow or collapse
            found["student_entropy"] = (out.reference.student_entropy * mask).sum() / tokens
        found["reference_kl"] = (out.reference.kl * mask).sum() / tokens
    if stats is None:
        return found
    assert batch.teacher.divergence_position is not None
    assert stats.student_logps is not None and stats.teacher_logps is not None
    a = credit(stats.teacher_logps, stats.student_logps)
    failing = torch.where(batch.teacher.success, -1, batch.teacher.divergence_position)
    diverged = failing[failing >= 0].float()
    nan = stats.kl.new_tensor(torch.nan)
    found |= {
        "kl": (stats.kl * mask).sum() / tokens,
        "student_entropy": (stats.student_entropy * mask).sum() / tokens,
        "teacher_entropy": (stats.teacher_entropy * mask).sum() / tokens,
        "tau": diverged.median() if diverged.numel() else nan,
        "credit_at_tau": credit_at_divergence(a, mask, failing),
        "credit_mass_8": credit_mass(a, mask, failing, windows=(8,))[0],  # micro-batches count alike
    }
    if diagnostics:
        # Every rank logs the same names: one without a token, or with a batch in chunks, has no overlap.
        unknown = {"top_overlap": nan, "overlap_advantage": nan}
        found |= of_stats(stats, mask) | unknown | dict(out.overlap)
    return found
