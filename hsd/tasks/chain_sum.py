"""SmolLM2-135M-Instruct on reasoning-gym's chains of three numbers, one step a line after three worked examples."""

from __future__ import annotations

from typing import Any

from hsd.data import load
from hsd.evaluate import Sampling
from hsd.tasks.smollm2 import CACHE, NAME, REPLY_TEMPLATE, SHORT_REPLIES, ensure_smollm2
from hsd.tasks.task import Task
from hsd.verify import reasoning_gym_success

HELD_OUT = 100
ASKED = "State the final answer to the following arithmetic problem: {} ="
WORKED = (
    ("3 + 9 - 4", "3 + 9 = 12\n12 - 4 = 8\nAnswer: 8"),
    ("7 - 5 + 6", "7 - 5 = 2\n2 + 6 = 8\nAnswer: 8"),
    ("8 + 8 + 1", "8 + 8 = 16\n16 + 1 = 17\nAnswer: 17"),
)


def task(seed: int) -> Task:
    """A pretrained model on chains of three numbers of one digit; a success is the generator's score of 1."""
    rows = questions(seed)
    return Task(
        title=f"{NAME} on chains of three numbers",
        model=lambda: str(ensure_smollm2(CACHE)),
        questions=rows[HELD_OUT:],
        held_out=rows[:HELD_OUT],
        rewards=[reasoning_gym_success],
        template=REPLY_TEMPLATE,
        sampling=Sampling(max_new_tokens=32, temperature=0.6, batch_size=100),
        eval_samples=2,
        credit_questions=12,
        train={
            **SHORT_REPLIES,
            "max_steps": 60,
            "save_steps": 20,
            "num_generations": 8,
            "per_device_train_batch_size": 64,  # 8 questions x 8 rollouts
        },
        threads=1,
    )


def questions(seed: int) -> list[dict[str, Any]]:
    """Different questions in chat form, none of them a worked example."""
    name = f"reasoning_gym:chain_sum,min_terms=3,max_terms=3,min_digits=1,max_digits=1,size=1000,seed={seed}"
    turns = [
        {"role": role, "content": text}
        for chain, steps in WORKED
        for role, text in (("user", ASKED.format(chain)), ("assistant", steps))
    ]
    seen = {ASKED.format(chain) for chain, _ in WORKED}
    rows = {row["question"].strip(): row for row in load(name) if row["question"].strip() not in seen}
    return [row | {"prompt": [*turns, {"role": "user", "content": asked}]} for asked, row in rows.items()]
