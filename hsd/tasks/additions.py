"""SmolLM2-135M-Instruct on additions that it knows but answers badly: "What is 17 + 8?", to be answered by a number."""

from __future__ import annotations

from typing import Any

from hsd.evaluate import Sampling
from hsd.tasks.smollm2 import CACHE, NAME, REPLY_TEMPLATE, SHORT_REPLIES, ensure_smollm2
from hsd.tasks.task import Task
from hsd.tasks.times_table import split_pairs
from hsd.verify import number_reward

HELD_OUT = 40
SYSTEM = "Reply with a number only."
SUMS = [(a, b) for a in range(2, 21) for b in range(2, 10)]


def task(seed: int) -> Task:
    """A pretrained model on additions, scored by the last number of its reply."""
    questions, held_out = split(seed)
    return Task(
        title=f"{NAME} on additions",
        model=lambda: str(ensure_smollm2(CACHE)),
        questions=questions,
        held_out=held_out,
        rewards=[number_reward],
        template=REPLY_TEMPLATE,
        sampling=Sampling(max_new_tokens=12, temperature=0.6, batch_size=60),
        eval_samples=3,
        credit_questions=12,
        train={
            **SHORT_REPLIES,
            "max_steps": 16,
            "save_steps": 4,
            "num_generations": 6,
            "per_device_train_batch_size": 24,  # 4 questions x 6 rollouts
            # HSD alone takes over its context's words; the reward must have the last word (docs/real_model.md).
            "policy_coef": 1.0,
            "divergence_coef": [1.0, 0.0, 8],
            "divergence": "jsd",  # bounds what those words cost
            "teacher_success_every": 5,
        },
        threads=1,
    )


def split(seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and held-out questions, a partition of `SUMS` that depends on `seed` alone.

    `3 + 4` and `4 + 3` stay on the same side, so the held-out side has `HELD_OUT` questions or one more.
    """
    return split_pairs(SUMS, f"additions-{seed}", HELD_OUT, _question)


def _question(a: int, b: int) -> dict[str, Any]:
    asked = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"What is {a} + {b}?"}]
    return {"prompt": asked, "answer": str(a + b)}
