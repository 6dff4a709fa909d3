"""`hsd train CONFIG.yaml [--key value ...]`: train; the same command goes on with a run that was stopped.

The run's folder (``train.output_dir``, else runs/NAME-OF-THE-CONFIG) gets the resolved configuration, metrics.jsonl,
checkpoints and, at the end, ``model/``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import warnings
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml

from hsd.cli.settings import Settings, read
from hsd.data.rows import read_json

HELP = "train a model as a YAML file says; the same command resumes"
TAKES_OVERRIDES = True

# What may differ between the parts of one run: none of these changes a step.
FREE = ("output_dir", "max_steps", "save_steps", "save_total_limit", "save_strategy", "logging_steps", "report_to")
FREE += ("run_name", "disable_tqdm", "log_completions", "num_completions_to_print", "use_cpu")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument("--check", action="store_true", help="print the resolved configuration and stop")
    parser.epilog = (
        "Any key can be set from here: --train.learning_rate 1e-5, or --learning_rate 1e-5 where it is unique."
    )


def run(args: argparse.Namespace) -> int:
    # TRL 1.16 still uses names that transformers 5.23 deprecates.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    settings, origin = read(args.config, args.overrides)
    config = make_config(settings, origin, args.config.stem, check=args.check)
    if args.check:
        print(as_yaml(settings, config), end="")
        return 0
    return train(settings, config)


def make_config(settings: Settings, origin: dict[str, str], name: str, *, check: bool = False) -> Any:
    """`HSDConfig` of the train section; what it refuses is named with the line that asked for it.

    With ``check`` a machine without a GPU does for a configuration that needs one.
    """
    import torch

    from hsd.train.config import HSDConfig

    given: dict[str, Any] = {"output_dir": str(Path("runs") / name)} | settings.train
    if check and not torch.cuda.is_available():
        given["use_cpu"] = True
    try:
        return HSDConfig(**given)
    except ValueError as error:
        key = str(error).partition(":")[0]
        raise ValueError(f"{origin[key]}train.{error}" if key in origin else f"train: {error}") from error


def train(settings: Settings, config: Any) -> int:
    from datasets import Dataset
    from transformers.trainer_callback import ProgressCallback
    from transformers.utils import logging as transformers_logging

    from hsd.cli.pieces import load_model, load_rewards, load_rows, peft_config
    from hsd.train.callbacks import StepLine, StopOnSignal, last_checkpoint
    from hsd.train.limits import check_launch
    from hsd.train.trainer import HSDTrainer

    check_launch(config, peft=settings.model.lora is not None)
    transformers_logging.disable_progress_bar()  # a bar for saving a shard would break the step's line
    out = Path(config.output_dir)
    rewards = load_rewards(settings.reward)
    needed = config.generation_batch_size // config.num_generations
    with config.main_process_first(desc="the run's folder and the model"):
        model, tokenizer = load_model(settings.model, config.seed, Path(".cache"))
        chat = bool(tokenizer.chat_template) if settings.data.chat is None else settings.data.chat
        rows = load_rows(settings.data, config.seed, chat)
        if len(rows) < needed:
            raise ValueError(f"data: expected at least {needed} questions, one step's worth, got {len(rows)}")
        claim(out, settings, config, rows)
    stop = StopOnSignal()
    trainer = HSDTrainer(
        model=model,
        reward_funcs=rewards,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft_config(settings.model.lora),
        callbacks=[stop],
    )
    if not config.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(StepLine())
    checkpoint = last_checkpoint(out)
    done = 0 if checkpoint is None else int(checkpoint.name.removeprefix("checkpoint-"))
    if 0 < config.max_steps <= done:  # Trainer would take one step more on a run that has them all
        say(f"{out}: this run already has {done} steps; --max_steps asks for more")
        return 0
    say(f"{out}: {len(rows)} questions, " + (f"resuming after step {done}" if done else "from the start"))
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except (ValueError, TypeError, OSError) as error:
        if trainer.state.global_step == 0:  # as a rule bad input
            if not config.disable_tqdm:
                print(file=sys.stderr)  # the bar's line has no end yet
            raise
        # Hours into a run, where it happened is worth a traceback.
        raise RuntimeError(f"training stopped at step {trainer.state.global_step}") from error
    if stop.signal is not None:
        say(f"{out}: stopped at step {trainer.state.global_step}; the same command resumes")
        return 128 + stop.signal
    trainer.save_model(str(out / "model"))
    say(f"{out}: {trainer.state.global_step} steps; the model is in {out / 'model'}")
    return 0


def resolved(settings: Settings, config: Any) -> dict[str, Any]:
    """All sections; of HSDConfig what was given, and HSD's own fields with their values."""
    from trl.trainer.grpo_config import GRPOConfig

    inherited = {f.name: f.default for f in fields(GRPOConfig)}
    # Also those of GRPO's whose default is another one here.
    own = {f.name for f in fields(config) if f.name not in inherited or f.default != inherited[f.name]}
    keys = sorted({*settings.train, *own, "output_dir", "seed"})
    return asdict(settings) | {"train": {key: getattr(config, key) for key in keys}}


def as_yaml(settings: Settings, config: Any) -> str:
    return yaml.safe_dump(json.loads(json.dumps(resolved(settings, config), default=str)), sort_keys=False)


def claim(out: Path, settings: Settings, config: Any, rows: list[dict[str, Any]]) -> None:
    """Write config.yaml and run.json, or raise ValueError where ``out`` holds another run, which would be resumed.

    A run that has neither taken a step nor left a model is none yet: it may be corrected.
    """
    path, asked = out / "run.json", identity(settings, config, rows)
    metrics = out / "metrics.jsonl"
    steps = any(out.glob("checkpoint-*")) or (metrics.exists() and metrics.stat().st_size > 0)
    if path.exists() and (steps or (out / "model").exists()):
        began = read_json(path)
        free = {f"train.{key}" for key in FREE}
        if config.lr_scheduler_type not in ("constant", "constant_with_warmup"):
            free.discard("train.max_steps")  # the schedule ends with it
        for key in sorted((began.keys() & asked.keys()) - free):
            if began[key] != asked[key]:
                raise ValueError(
                    f"{key}: {out} holds a run with {began[key]!r}, got {asked[key]!r}; choose another --output_dir"
                )
    elif steps:
        raise ValueError(
            f"output_dir: expected a new folder or a run of `hsd train`, got {out}, which holds another run"
        )
    out.mkdir(parents=True, exist_ok=True)
    for target, text in ((out / "config.yaml", as_yaml(settings, config)), (path, json.dumps(asked, indent=1))):
        part = target.with_name(f"{target.name}.{os.getpid()}.part")
        part.write_text(text)
        part.replace(target)


def identity(settings: Settings, config: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """All that makes a run what it is, by key: also what was left to its default, and the questions themselves."""
    parts = {"model": settings.model, "data": settings.data}
    found: dict[str, Any] = {f"{name}.{key}": v for name, part in parts.items() for key, v in asdict(part).items()}
    found |= {"reward": settings.reward} | {f"train.{f.name}": getattr(config, f.name) for f in fields(config)}
    text = json.dumps(rows, sort_keys=True, default=str)
    found["data.questions"] = f"{len(rows)} questions, sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"
    return json.loads(json.dumps(found, default=str))


def say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)
