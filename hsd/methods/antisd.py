"""AntiSD (arXiv 2605.11609): GRPO, and an ascent on the divergence from the teacher, gated by the teacher's entropy.

    A_t = A - 0.5 gate (softplus(D_t) - log 2) / 2        # in expectation the gradient of -0.5 JSD_0.5
    L   = the clipped surrogate with A_t, mean over tokens

gate: H is the median of the teacher's entropy over the generation's tokens. 5 steps at gate 0 measure H_warm, their
median; then the gate opens where H >= H_warm, closes where H < 0.93 H_warm, and stays as it is in between, before it is
used. The teacher is the student, shown a verified solution (a correct peer, else the data set's, else the answer) and,
with ``verdict``, whether the rollout that follows is right.

Confidence: very high (paper with its algorithm, a port). That the gate starts open, and that a rollout is not shown
itself, are our reading.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from hsd.hindsight.context import Context
from hsd.hindsight.teacher_prompts import RolloutView, parts
from hsd.methods.method import Generation, Method, other_successes
from hsd.methods.state import Hysteresis
from hsd.methods.term import Stats, Term


def contexts(view: RolloutView) -> list[Context]:
    peers = other_successes(view)
    shown = (view.rollout(view.rng.choice(peers)) if peers else ()) or (view.row.get("solution") or "").strip()
    answer = view.answer if shown else view.group.answer.strip()
    verdict = None
    if view.settings["verdict"] and view.member.rollout.scored:
        verdict = "correct" if view.member.success else "incorrect"
    return [Context(parts(answer=answer, demonstration=shown, verdict=verdict))] if answer or shown else []


def on_batch(batch: Generation, gate: Hysteresis) -> dict[str, Tensor]:
    entropies = batch.tokens(batch.stats.table.teacher_entropy)
    value = gate.step(entropies.median().item()) if len(entropies) else 0.0
    return {"gate": torch.tensor(value, device=batch.stats.advantages.device)}


def advantages(s: Stats) -> Tensor:
    return s.advantages - s.settings["strength"] * s["gate"] * 0.5 * (softplus(s.d) - math.log(2.0))


METHOD = Method(
    "antisd",
    contexts,
    terms=(Term("advantage", advantages),),
    on_batch=on_batch,
    scores=True,
    state=Hysteresis,
    settings={"strength": 0.5, "verdict": True},
    defaults={
        "show_answer": False,
        "divergence_coef": 0.0,
        "policy_coef": 1.0,
        "policy_mean": "token",
        "reference_coef": 0.0,
    },
)
