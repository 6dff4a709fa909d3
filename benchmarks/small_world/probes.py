"""Does the teacher's own distribution move along with the student's? On fixed rollouts, in plain torch, during a run.

The probes are failing rollouts of the warm start with a successful peer. Every few steps the run's weights read them
twice: behind the question (the student), and behind the question and the context (what a live teacher would be). Kept
are probabilities over the vocabulary, s_k and t_k at measurement k:

    follow   <t_k - t_(k-1), s_k - s_(k-1)> / |s_k - s_(k-1)|^2        # 1: the teacher goes where the student goes
    common   cosine of the two movements                               # share of the student's that both make
    gap      KL(t_k || s_k), what a live run minimises
    closed   KL(t_(k-1) || s_(k-1)) - KL(t_(k-1) || s_k), by the student's movement
    evaded   KL(t_k || s_k) - KL(t_(k-1) || s_k), by the teacher's
    drift    KL(t_0 || t_k), what the teacher has lost of itself
    left     KL(t_0 || s_k), what is left to learn from the first teacher

all means over the probes' tokens, in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from hsd.hindsight.context import build_context, tokenize_prompt
from hsd.hindsight.groups import Group
from hsd.padding import padded
from hsd.policy.frozen import in_eval_mode
from hsd.tasks import small_world
from hsd.viewer.measure import Peers, Place, draw_peers, failing_with_peer

MOST = 64  # probes


class Probes(TrainerCallback):
    """Measures every ``every`` steps, and before the first."""

    def __init__(self, model: Any, tokenizer: Any, groups: Sequence[Group], seed: int, every: int):
        peers = draw_peers(tokenizer, groups, seed)
        plain, shown, rollouts = rows(tokenizer, groups, peers, failing_with_peer(groups, peers)[:MOST])
        self.model, self.every = model, every
        self.read = [Read(prompts, rollouts) for prompts in (plain, shown)]
        self.rows: list[dict[str, float]] = []
        self.first = self.last = self.both()

    @torch.no_grad()
    def both(self) -> list[Tensor]:
        with in_eval_mode(self.model):
            return [read(self.model) for read in self.read]

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            now = self.both()
            self.rows.append({"step": state.global_step, **movement(self.first, self.last, now)})
            self.last = now


def rows(
    tokenizer: Any, groups: Sequence[Group], peers: Peers, places: Sequence[Place]
) -> tuple[list[Sequence[int]], list[Sequence[int]], list[Sequence[int]]]:
    """Token ids of the rollouts at ``places``: the questions, the questions with the context, the rollouts."""
    plain, shown, rollouts = [], [], []
    for g, i in places:
        group, peer = groups[g], peers[g][i]
        assert peer is not None
        ids = group.rollouts[peer].token_ids
        plain.append(tokenize_prompt(tokenizer, group.prompt))
        shown.append(build_context(tokenizer, group.prompt, group.answer, ids, small_world.TEMPLATE).prompt_ids)
        rollouts.append(group.rollouts[i].token_ids)
    return plain, shown, rollouts


class Read:
    """Log-probs (N, V) of the tokens of ``rollouts`` behind ``prompts``."""

    def __init__(self, prompts: Sequence[Sequence[int]], rollouts: Sequence[Sequence[int]]):
        whole = [[*p, *r] for p, r in zip(prompts, rollouts, strict=True)]
        self.ids, self.mask = padded(whole, small_world.VOCABULARY.index(small_world.PAD))
        self.at = torch.zeros_like(self.mask, dtype=torch.bool)
        for row, p, r in zip(self.at, prompts, rollouts, strict=True):
            row[len(p) - 1 : len(p) + len(r) - 1] = True

    def __call__(self, model: Any) -> Tensor:
        logits = model(input_ids=self.ids, attention_mask=self.mask).logits
        return logits[self.at].double().log_softmax(-1)


def movement(first: Sequence[Tensor], last: Sequence[Tensor], now: Sequence[Tensor]) -> dict[str, float]:
    """The page's numbers, of (student, teacher) log-probs (N, V) at the start, at the last measurement and now."""
    (_, t0), (s1, t1), (s2, t2) = first, last, now
    ds, dt = s2.exp() - s1.exp(), t2.exp() - t1.exp()
    inner, own, its = (ds * dt).sum(), ds.square().sum(), dt.square().sum()
    found = {
        "follow": inner / own,
        "common": inner / (own * its).sqrt(),
        "gap": kl(t2, s2).mean(),
        "closed": (kl(t1, s1) - kl(t1, s2)).mean(),
        "evaded": (kl(t2, s2) - kl(t1, s2)).mean(),
        "drift": kl(t0, t2).mean(),
        "left": kl(t0, s2).mean(),
    }
    return {name: float(f"{value.item():.4g}") for name, value in found.items()}


def kl(a: Tensor, b: Tensor) -> Tensor:
    """KL(a || b) of log-probs (..., V)."""
    return (a.exp() * (a - b)).sum(-1)
