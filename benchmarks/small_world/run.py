"""One training run: from a seed's warm start to the facts in the report."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from transformers import Qwen3ForCausalLM, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import logging as transformers_logging

from benchmarks.small_world.cures import HOLD, CuredTrainer, Held
from benchmarks.small_world.plan import GROUP_SIZE, Run, Scale
from benchmarks.small_world.probes import Probes
from hsd.evaluate import Sampling, Success, end_token_ids, sample, score, success
from hsd.hindsight.groups import Group
from hsd.tasks import small_world
from hsd.tasks.task import Policy
from hsd.train.callbacks import load_metrics
from hsd.train.config import HSDConfig
from hsd.train.trainer import HSDTrainer
from hsd.viewer.make import sample_groups
from hsd.viewer.measure import draw_peers, failing_with_peer

TEMPLATE = small_world.TEMPLATE
SAMPLING = Sampling(max_new_tokens=small_world.MAX_COMPLETION, batch_size=128)
PASS_AT = 8  # samples of each of the first quarter of the final questions
# Of each step's metrics, those in the report.
KEPT = (
    "hsd/success_rate",
    "hsd/coverage",
    "hsd/kl",
    "hsd/student_entropy",
    "hsd/reference_kl",
    "hsd/credit_mass_8",
    "completions/mean_length",
    "completions/clipped_ratio",
    "hsd/cure",
)


def quiet() -> None:
    """Before anything runs; TRL 1.16 still uses names that transformers 5.23 deprecates."""
    warnings.filterwarnings("ignore")
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    disable_progress_bar()


def train(run: Run, scale: Scale, warm: Path, scratch: Path) -> dict[str, Any]:
    """Train one run and measure it: curve on the validation questions, success on the final ones, a row per step."""
    torch.set_num_threads(1)
    started, wall = time.process_time(), time.time()
    tokenizer = small_world.build_tokenizer()
    model = Qwen3ForCausalLM.from_pretrained(warm, dtype=torch.float32)
    sampling = sampling_of(run.terms)
    validation, final = questions(run.seed, scale, run.terms)
    curve = _Curve(model, tokenizer, validation, run.seed, scale.eval_every, sampling)
    training = small_world.make_questions(2048, seed=run.seed, terms=run.terms)

    def groups(asked: Sequence[dict]) -> list[Group]:
        task = replace(small_world.task(run.seed), sampling=sampling)
        return sample_groups(task, Policy(model, tokenizer), asked[: scale.credit_questions], run.seed, GROUP_SIZE)

    probes = None
    if run.part in ("long", "cures"):
        sampled = groups(validation)
        if failing_with_peer(sampled, draw_peers(tokenizer, sampled, run.seed)):  # else a short warm start: no probe
            probes = Probes(model, tokenizer, sampled, run.seed, scale.probe_every)
    make: Any = HSDTrainer
    if run.cure is not None:
        held = Held(model, tokenizer, groups(training), run.seed) if run.cure[0] == HOLD else None
        make = partial(CuredTrainer, run.cure, held)
    if scratch.exists():
        shutil.rmtree(scratch)  # a killed run's
    trainer = make(
        model=model,
        reward_funcs=small_world.reward,
        args=config(run, scale, scratch),
        train_dataset=Dataset.from_list(training),
        processing_class=tokenizer,
        context_template=TEMPLATE,
        callbacks=[curve, *([probes] if probes else [])],
    )
    for printing in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(printing)
    began = time.process_time()
    trainer.train()
    spent = time.process_time() - began - curve.cpu_seconds
    rows = load_metrics(scratch / "metrics.jsonl")
    result = {
        "curve": curve.points,
        "final": asdict(evaluate(model, tokenizer, final if run.part != "pilot" else validation, run.seed, sampling)),
        "pass_at_8": spread(model, tokenizer, final[: scale.final // 4], run.seed, sampling),
        "probes": probes.rows if probes else [],
        "steps": {k: [rounded(row.get(k)) for row in rows] for k in KEPT if any(k in row for row in rows)},
        "alarms": {k: f"step {row['step']}: {v}" for row in rows for k, v in row.get("alarms", {}).items()},
        "settings": {name: getattr(trainer.args, name) for name in SETTINGS} | {"peer_rule": trainer.peer_rule},
        "train_cpu_seconds": spent,
        "cpu_seconds": time.process_time() - started,
        "wall_seconds": time.time() - wall,
    }
    shutil.rmtree(scratch)
    return result


SETTINGS = (
    "learning_rate",
    "teacher",
    "teacher_ema_rate",
    "show_answer",
    "fallback",
    "divergence",
    "kl_clip",
    "loss_mean",
    "divergence_coef",
    "policy_coef",
    "reference_coef",
    "loss_type",
    "scale_rewards",
    "max_grad_norm",
)


def config(run: Run, scale: Scale, folder: Path) -> HSDConfig:
    return HSDConfig(
        output_dir=str(folder),
        method=run.method,
        max_steps=run.steps,
        save_strategy="no",
        seed=run.seed,
        num_generations=run.group_size,
        per_device_train_batch_size=scale.rollouts,
        max_completion_length=sampling_of(run.terms).max_new_tokens,
        temperature=SAMPLING.temperature,
        top_p=SAMPLING.top_p,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        dataloader_pin_memory=False,
        disable_tqdm=True,
        **run.options,
    )


def sampling_of(terms: int) -> Sampling:
    """Four summands have 37 tokens at most; each further one has 13 more."""
    return replace(SAMPLING, max_new_tokens=SAMPLING.max_new_tokens + 13 * (terms - small_world.TERMS))


def questions(seed: int, scale: Scale, terms: int = small_world.TERMS) -> tuple[list[dict], list[dict]]:
    """Held-out questions: those of the curves and the pilot, and, apart from them, those of the final success."""
    both = small_world.make_questions(scale.final + scale.validation, seed=seed, held_out=True, terms=terms)
    return both[scale.final :], both[: scale.final]


def evaluate(model: Any, tokenizer: Any, asked: Sequence[dict], seed: int, sampling: Sampling = SAMPLING) -> Success:
    rollouts = sample(model, tokenizer, [q["prompt"] for q in asked], sampling, seed=seed)
    rewards = score(tokenizer, asked, rollouts, small_world.reward)
    return success(rewards, rollouts, 1, end_token_ids(model, tokenizer))


def spread(model: Any, tokenizer: Any, asked: Sequence[dict], seed: int, sampling: Sampling) -> dict[str, float]:
    """pass@8, and how many different successful rollouts a question has among its 8, where it has any."""
    several = [q for q in asked for _ in range(PASS_AT)]
    rollouts = sample(model, tokenizer, [q["prompt"] for q in several], sampling, seed=seed + 1)
    rewards = score(tokenizer, several, rollouts, small_world.reward)
    right = [
        {tuple(r) for r, x in zip(rollouts[at : at + PASS_AT], rewards[at : at + PASS_AT], strict=True) if x == 1.0}
        for at in range(0, len(several), PASS_AT)
    ]
    solved = [len(found) for found in right if found]
    return {"pass": len(solved) / len(right), "distinct": sum(solved) / len(solved) if solved else 0.0}


class _Curve(TrainerCallback):
    """Success on the validation questions every so many steps; the time it takes is not the method's."""

    def __init__(self, model: Any, tokenizer: Any, asked: Sequence[dict], seed: int, every: int, sampling: Sampling):
        self.ask = lambda: evaluate(model, tokenizer, asked, seed, sampling).mean
        self.every = every
        self.points: list[tuple[int, float]] = []
        self.cpu_seconds = 0.0

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            started = time.process_time()
            self.points.append((state.global_step, self.ask()))
            self.cpu_seconds += time.process_time() - started


def rounded(value: Any) -> Any:
    """Four significant digits: the file is committed. NaN, where there was nothing to measure, is null."""
    if not isinstance(value, float):
        return value
    return None if value != value else float(f"{value:.4g}")
