"""One run: from the pretrained model to the facts in the report; on the GPU where there is one."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from benchmarks.real_model.plan import BEST, MEASURE_TEACHER, Row
from benchmarks.small_world.run import rounded
from hsd.evaluate import end_token_ids, sample, score, success
from hsd.tasks import registered
from hsd.tasks.task import Policy, Task, load_policy
from hsd.train.callbacks import load_metrics
from hsd.train.config import HSDConfig
from hsd.train.trainer import HSDTrainer

KEPT = (
    "hsd/success_rate",
    "hsd/teacher_success",
    "hsd/coverage",
    "hsd/fallback_share",
    "hsd/kl",
    "hsd/student_entropy",
    "hsd/teacher_entropy",
    "hsd/tau",
    "hsd/credit_at_tau",
    "hsd/credit_mass_8",
    "completions/mean_length",
    "completions/clipped_ratio",
    "time/sampling_s",
    "time/teacher_success_s",
    "time/rewards_s",
    "time/update_s",
    "time/optimizer_s",
    "time/sampled_tokens_per_s",
)


def start(task_name: str, seed: int) -> dict[str, Any]:
    """The initial policy on the held-out questions."""
    torch.set_num_threads(1)
    task = registered(task_name, seed)
    return measured(task, load_policy(task.model()).on_accelerator(), seed)


def train(row: Row, task_name: str, seed: int, steps: int, scratch: Path) -> dict[str, Any]:
    """A metrics row per step with its seconds, and the held-out replies at the end."""
    torch.set_num_threads(1)
    task = registered(task_name, seed)
    policy = load_policy(task.model())
    if scratch.exists():
        shutil.rmtree(scratch)  # a killed run's
    args = config(row, task, seed, steps, scratch)
    clock = _Clock()
    trainer = HSDTrainer(
        model=policy.model,
        reward_funcs=list(task.rewards),
        args=args,
        train_dataset=Dataset.from_list(list(task.questions)),
        processing_class=policy.tokenizer,
        context_template=args.context_template(task.template),
        callbacks=[clock],
    )
    for printing in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(printing)
    trainer.train()
    rows = load_metrics(scratch / "metrics.jsonl")
    found = {k: [rounded(r.get(k)) for r in rows] for k in KEPT if any(r.get(k) is not None for r in rows)}
    shutil.rmtree(scratch)
    return {
        "steps": found,
        clock.name: [round(s, 2) for s in clock.seconds],  # of each step, the teacher's replies included
        "alarms": {k: f"step {r['step']}: {v}" for r in rows for k, v in r.get("alarms", {}).items()},
        **measured(task, policy, seed),
    }


def config(row: Row, task: Task, seed: int, steps: int, folder: Path) -> HSDConfig:
    own = {"save_strategy": "no", "disable_tqdm": True, "max_steps": steps, "seed": seed, "method": row.method}
    if row.method != "grpo":
        own["teacher_success_every"] = MEASURE_TEACHER
    # The task begins with the best of these rows; a row begins with HSD as it is.
    base = {k: v for k, v in task.config.items() if k not in (*BEST, "teacher_success_every")}
    return HSDConfig(output_dir=str(folder), **{**base, **own, **row.options})


def measured(task: Task, policy: Policy, seed: int) -> dict[str, Any]:
    """Success on the held-out questions with its interval, and every reply: text, tokens, whether it ended, reward."""
    asked = [q for q in task.held_out for _ in range(task.eval_samples)]
    with torch.autocast(policy.model.device.type, torch.bfloat16):  # as in training
        rollouts = sample(*policy, [q["prompt"] for q in asked], task.sampling, seed=seed)
    rewards = score(policy.tokenizer, asked, rollouts, task.reward)
    ends = end_token_ids(*policy)
    texts = policy.tokenizer.batch_decode(rollouts, skip_special_tokens=True)
    replies = [
        {
            "question": q["prompt"][-1]["content"],
            "reply": text,
            "tokens": len(ids),
            "ended": ids[-1] in ends,
            "reward": r,
        }
        for q, text, ids, r in zip(asked, texts, rollouts, rewards, strict=True)
    ]
    return {"held_out": asdict(success(rewards, rollouts, task.eval_samples, ends)), "replies": replies}


class _Clock(TrainerCallback):
    """CPU seconds of each step; on a GPU, which other runs may share, wall seconds."""

    def __init__(self):
        self.seconds: list[float] = []
        gpu = torch.cuda.is_available()
        self.name = "wall_seconds" if gpu else "cpu_seconds"
        self.now = time.perf_counter if gpu else time.process_time

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = self.now()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(self.now() - self.began)
