"""Cures of the live teacher's run-away that keep no second copy of the weights, in plain torch over full logits.

Each changes the gradient of HSD's loss L = sum(w KL(t || s)), in which t, the teacher, is a constant:

    residual R    L + R sum(w KL(t || s)) with s a constant: a share R of the residual gradient, through the teacher
    uncommon      g - max(0, <g, c>) / |c|^2 c, with g the gradient of L and c what the same dL/dz would do to the
                  teacher's logits: an update that, to first order, does not move the teacher along with the student
    held C        L + C mean(KL(t_0 || t)) on fixed rows of the teacher's contexts, whose log-probs t_0 at the start
                  are kept: a few thousand numbers, no weights
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.small_world.probes import LogProbs, kl
from hsd.policy.body_and_head import body_and_head
from hsd.train.batch import RolloutBatch, unpack
from hsd.train.trainer import HSDTrainer

HELD_ROWS = 16  # of the held rollouts a step


@dataclass(frozen=True)
class Cure:
    """``kind`` and strength of one; ``held`` are the rows of "held", with their log-probs (N, V) at the start."""

    kind: str  # "residual", "uncommon" or "held"
    strength: float = 1.0
    held: LogProbs | None = None
    first: Tensor | None = None

    def __call__(self, policy: Any, batch: RolloutBatch, loss: Tensor, weights: Tensor, step: int) -> Tensor:
        """A loss with the cured gradient; ``weights`` (B, T) sum the tokens' divergences to L."""
        if self.held is not None and self.first is not None:
            rows = (torch.arange(HELD_ROWS) + step * HELD_ROWS) % len(self.held.ids)
            return loss + self.strength * kl(self.first[self.held.number(rows)], self.held(policy, rows))
        student, teacher = (logps(policy, batch, who) for who in ("student", "teacher"))
        if self.kind == "residual":
            return loss + self.strength * divergence(teacher, student.detach(), weights)
        trained = [p for p in policy.parameters() if p.requires_grad]
        g = uncommon(trained, loss, divergence(teacher.detach(), student, weights), student, teacher)
        # A function of value `loss` and gradient g.
        along = sum((a * p).sum() for a, p in zip(g, trained, strict=True))
        return loss.detach() + along - torch.as_tensor(along).detach()


class CuredTrainer(HSDTrainer):
    """HSD with a cure. A step is one micro-batch."""

    cure: Cure

    def _hsd_loss(self, policy: Any, inputs: dict[str, Any]) -> Tensor:
        loss = super()._hsd_loss(policy, inputs)
        batch = unpack(inputs, self.args.skip_tokens)
        weights = batch.targets(self.args.loss_mean).divergence_weights
        return self.cure(policy, batch, loss, weights, self.state.global_step)


def logps(policy: Any, batch: RolloutBatch, who: str) -> Tensor:
    """(B, T, V), with gradient."""
    parts = body_and_head(policy)
    return parts.logits(batch.inputs.forward(parts, who)).log_softmax(-1)


def divergence(teacher: Tensor, student: Tensor, weights: Tensor) -> Tensor:
    """sum(w KL(t || s)) of log-probs (B, T, V) and weights (B, T)."""
    return (weights * (teacher.exp() * (teacher - student)).sum(-1)).sum()


def uncommon(trained: Sequence[Tensor], loss: Tensor, own: Tensor, student: Tensor, teacher: Tensor) -> list[Tensor]:
    """The gradient of ``loss`` by ``trained`` without what moves the teacher along.

    ``own`` is the loss's divergence, of the log-probs ``student`` and ``teacher`` (B, T, V).
    """
    dz = torch.autograd.grad(own, student, retain_graph=True)[0]
    dz = dz - student.detach().exp() * dz.sum(-1, keepdim=True)  # of the logits; sums to 0, as do those of softmax
    g = torch.autograd.grad(loss, trained, retain_graph=True)
    c = torch.autograd.grad((teacher * dz).sum(), trained)  # by log-probs as by logits: dz sums to 0
    inner, size = (sum((a * b).sum() for a, b in zip(other, c, strict=True)) for other in (g, c))
    share = torch.as_tensor(inner / size).clamp_min(0.0)
    return [a - share * b for a, b in zip(g, c, strict=True)]
