"""SmolLM2-135M-Instruct on additions that it knows but answers badly: "What is 17 + 8?", to be answered by a number."""

from __future__ import annotations

import random
from typing import Any

import torch

from hsd.evaluate import Sampling
from hsd.hindsight.context import ContextTemplate
from hsd.tasks.smollm2 import CACHE, NAME, ensure_smollm2
from hsd.tasks.task import Task
from hsd.verify import number_reward

HELD_OUT = 40
SYSTEM = "Reply with a number only."
SUMS = [(a, b) for a in range(2, 21) for b in range(2, 10)]
# A context that asks for the reply itself: a small model that is asked for its own words rambles.
CLOSING = "\n\nGive the correct reply."
TEMPLATE = ContextTemplate(
    with_peer="\n\nAnswer: {answer}\n\nCorrect reply: {demonstration}" + CLOSING,
    answer_only="\n\nAnswer: {answer}" + CLOSING,
    demonstration_only="\n\nCorrect reply: {demonstration}" + CLOSING,
    closing=CLOSING,
)


def task(seed: int) -> Task:
    """A pretrained model on additions, scored by the last number of its reply."""
    questions, held_out = split(seed)
    return Task(
        title=f"{NAME} on additions",
        model=lambda: str(ensure_smollm2(CACHE)),
        questions=questions,
        held_out=held_out,
        rewards=[number_reward],
        template=TEMPLATE,
        sampling=Sampling(max_new_tokens=12, temperature=0.6, batch_size=60),
        eval_samples=3,
        credit_questions=12,
        train={
            "max_steps": 16,
            "save_steps": 4,
            "learning_rate": 2e-5,
            "lr_scheduler_type": "constant_with_warmup",
            "warmup_steps": 5,
            "num_generations": 6,
            "per_device_train_batch_size": 24,  # 4 questions x 6 rollouts
            "kl_temperature": 0.6,
            "teacher": "fixed",
            "reference_coef": 0.0,
            # HSD alone takes over its context's words; the reward must have the last word (docs/real_model.md).
            "policy_coef": 1.0,
            "divergence_coef": [1.0, 0.0, 8],
            "teacher_success_every": 5,
            "bf16": True,
            "use_cpu": not torch.cuda.is_available(),
            "gradient_checkpointing": False,
            "dataloader_pin_memory": False,
            "report_to": "none",
        },
        threads=1,
    )


def split(seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and held-out questions, a partition of `SUMS` that depends on `seed` alone.

    `3 + 4` and `4 + 3` stay on the same side, so the held-out side has `HELD_OUT` questions or one more.
    """
    pairs = sorted({(min(s), max(s)) for s in SUMS})
    random.Random(f"additions-{seed}").shuffle(pairs)
    sides: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for low, high in pairs:
        side = sides[len(sides[1]) < HELD_OUT]
        side += [_question(a, b) for a, b in sorted({(low, high), (high, low)}) if (a, b) in SUMS]
    return sides


def _question(a: int, b: int) -> dict[str, Any]:
    asked = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"What is {a} + {b}?"}]
    return {"prompt": asked, "answer": str(a + b)}
