"""Cures for a live teacher that runs away, none with a second copy of the weights. In plain torch, full logits.

With s and t the student's and the teacher's distributions of the same weights, L = sum w KL(t || s) and g_S its
gradient through s alone, which is what a live run follows:

    share a     g_S + a g_T, g_T the gradient of L through t (the residual); a = 1 is the whole gradient
    subtract    g_S - max(0, <g_S, g_C>) / |g_C|^2 g_C, g_C = J_t^T w (s - t): what the student's dz would move in the
                teacher's logits. Once a step, over all parameters, before the gradient's clip and AdamW's scaling
    hold c      L + c mean(exp(d) - 1 - d), d = log t_0 - log t of the tokens of fixed rows in the teacher's context; of
                the first weights only these log-probs are kept, a few thousand numbers
    plain       g_S

Each step's "hsd/cure" is what the cure added: a L, <g_S, g_C> / |g_C|^2 where it is positive, or the penalty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.small_world.probes import Read, kl, rows
from hsd.hindsight.groups import Group
from hsd.policy.body_and_head import body_and_head
from hsd.train.batch import unpack
from hsd.train.trainer import HSDTrainer
from hsd.viewer.measure import draw_peers

MOST = 64  # rows that are held
PLAIN, SHARE, SUBTRACT, HOLD = "plain", "share", "subtract", "hold"


class Held:
    """Rollouts with a peer, failing or not, and the log-probs (N,) that the first weights give their tokens behind
    question and context."""

    def __init__(self, model: Any, tokenizer: Any, groups: Sequence[Group], seed: int):
        peers = draw_peers(tokenizer, groups, seed)
        places = [(g, i) for g, drawn in enumerate(peers) for i, peer in enumerate(drawn) if peer is not None]
        if not places:
            raise ValueError(f"groups: expected a rollout with a successful peer, got none in {len(groups)} groups")
        places = places[:: max(1, len(places) // MOST)][:MOST]
        _, shown, rollouts = rows(tokenizer, groups, peers, places)
        self.read = Read(shown, rollouts)
        self.tokens = torch.tensor([token for ids in rollouts for token in ids]).unsqueeze(-1)
        with torch.no_grad():
            self.first = self.logps(model)

    def logps(self, model: Any) -> Tensor:
        return self.read(model).gather(-1, self.tokens).squeeze(-1)

    def penalty(self, model: Any) -> Tensor:
        d = self.first - self.logps(model)
        return (torch.expm1(d) - d).mean()


class CuredTrainer(HSDTrainer):
    """HSD with a live teacher and a cure. ``held`` is what "hold" holds."""

    def __init__(self, cure: tuple[str, float], held: Held | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        a = self.args
        expected = {
            "teacher": "live",
            "divergence": "forward_kl",
            "divergence_coef": 1.0,
            "kl_clip": 0.0,
            "kl_temperature": 1.0,
            "policy_coef": 0.0,
            "reference_coef": 0.0,  # its policy would be a copy
            "gradient_accumulation_steps": 1,
        }
        for name, value in expected.items():
            if getattr(a, name) != value:
                raise ValueError(f"{name}: expected {value!r} with a cure, got {getattr(a, name)!r}")
        self.kind, self.amount = cure
        if self.kind not in (PLAIN, SHARE, SUBTRACT, HOLD):
            raise ValueError(f"cure: expected one of {PLAIN}, {SHARE}, {SUBTRACT}, {HOLD}, got {self.kind!r}")
        if (self.kind == HOLD) != (held is not None):
            raise ValueError(f"held: expected rows with the cure {HOLD!r} and with no other, got {held}")
        self.held = held
        self.common: list[Tensor] = []

    def _hsd_loss(self, policy: Any, inputs: dict[str, Any]) -> Tensor:
        loss = super()._hsd_loss(policy, inputs)
        if self.kind == HOLD:
            assert self.held is not None
            return loss + self._added(self.amount * self.held.penalty(policy))
        if self.kind == SHARE:
            student, teacher, weights = self._logits(policy, inputs)
            each = kl(teacher.log_softmax(-1), student.log_softmax(-1))
            return loss + self._added(self.amount * (weights * each).sum())
        if self.kind == SUBTRACT:
            student, teacher, weights = self._logits(policy, inputs)
            dz = weights.unsqueeze(-1) * (student.softmax(-1) - teacher.detach().softmax(-1))
            self.common = list(torch.autograd.grad(teacher, trained(policy), dz))
        return loss

    def training_step(self, model, inputs, num_items_in_batch):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.kind == SUBTRACT:
            mine = [p.grad for p in trained(self.accelerator.unwrap_model(model))]
            self._added(subtract_(mine, self.common))
        return loss

    def _logits(self, policy: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, V) of the student, without gradient, and of the teacher, with it; the weight (B, T) of each token."""
        batch, parts = unpack(inputs, self.args.skip_tokens), body_and_head(policy)
        with torch.no_grad():
            student = parts.linear(batch.inputs.forward(parts, "student"))
        teacher = parts.linear(batch.inputs.forward(parts, "teacher"))
        return student, teacher, batch.targets(self.args.loss_mean, self.args.mean_of_policy).divergence_weights

    def _added(self, value: Tensor) -> Tensor:
        self._record("train", {"cure": value.detach()})
        return value


def trained(policy: Any) -> list[Tensor]:
    return [p for p in policy.parameters() if p.requires_grad]


@torch.no_grad()
def subtract_(gradient: Sequence[Tensor], common: Sequence[Tensor]) -> Tensor:
    """Take from ``gradient``, in place, what it has of ``common``'s direction. Returns how many times ``common``."""
    inner, square = (sum((a * b).sum() for a, b in zip(x, common, strict=True)) for x in (gradient, common))
    times = torch.as_tensor(inner).clamp_min(0.0) / torch.as_tensor(square).clamp_min(1e-30)
    for mine, its in zip(gradient, common, strict=True):
        mine.sub_(times * its)
    return times
