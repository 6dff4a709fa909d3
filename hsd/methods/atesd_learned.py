"""ATESD (arXiv 2605.11458) with its controller: how much of the solution the teacher sees is learned.

    L     = 1/|tokens| sum_{i,t} KL(q || p),  q shown the first floor(a m) of the solution's m segments and the answer
    a     ~ Beta(exp(u), exp(v)), held for ``window`` generations, ``horizon`` + 1 at least
    (u,v) += rate R d log Beta(a; exp(u), exp(v)) / d(u, v),  R = sum_k discount^k (drop of L at the k-th later one)

R counts the ``horizon`` ones after the window's first. All four constants are unpublished, and so is what the
controller reads: here it is two numbers, u = v = 0 at the start, and the first window has a = 0.5.

Confidence: medium to low (second-hand). The state is `Controller`; a is equal on all ranks.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hsd.hindsight.context import Context
from hsd.hindsight.teacher_prompts import RolloutView
from hsd.methods import atesd
from hsd.methods.method import REQUIRED, Generation, Method
from hsd.methods.state import Saved


@dataclass
class Controller(Saved):
    share: float = 0.5
    u: float = 0.0
    v: float = 0.0
    losses: list[float] = field(default_factory=list)  # since the window began

    def step(self, loss: float, step: int, c: Mapping[str, Any]) -> None:
        self.losses.append(loss)
        if len(self.losses) < max(c["window"], c["horizon"] + 1):
            return
        drops = [a - b for a, b in zip(self.losses, self.losses[1:], strict=False)][: int(c["horizon"])]
        reward = sum(c["discount"] ** k * drop for k, drop in enumerate(drops))
        at = torch.tensor([self.u, self.v], dtype=torch.float64, requires_grad=True)
        share = torch.tensor(min(max(self.share, 1e-3), 1.0 - 1e-3), dtype=torch.float64)
        torch.distributions.Beta(at[0].exp(), at[1].exp()).log_prob(share).backward()
        assert at.grad is not None
        self.u, self.v = (at.detach() + c["rate"] * reward * at.grad).tolist()
        chance = random.Random(f"atesd-{step}")
        self.share = chance.betavariate(*torch.tensor([self.u, self.v], dtype=torch.float64).exp().tolist())
        self.losses = []


def contexts(view: RolloutView) -> list[Context]:
    return atesd.head(view, view.state.share)


def on_batch(batch: Generation, controller: Controller) -> dict[str, Tensor]:
    values = batch.tokens(batch.stats.kl)
    controller.step(values.mean().item() if len(values) else 0.0, batch.stats.step, batch.stats.settings)
    return {}


METHOD = Method(
    "atesd_learned",
    contexts,
    on_batch=on_batch,
    scores=True,
    state=Controller,
    needs=("solution",),
    settings={"window": REQUIRED, "horizon": REQUIRED, "discount": REQUIRED, "rate": REQUIRED},
    defaults=atesd.METHOD.defaults,
)
