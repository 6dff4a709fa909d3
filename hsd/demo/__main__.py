"""Watch a language model get better at reasoning by Hindsight Self-Distillation.

    python -m hsd.demo small   [--steps 150] [--seed 0]
    python -m hsd.demo smollm2 [--steps 30] [--model ID_OR_PATH] [--data FILE.jsonl]

Evaluate, measure credit, train, evaluate, report; everything lands in ``runs/WORLD-seedN``. Ctrl-C stops after the
current step and leaves a checkpoint; the same command resumes.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers.trainer_callback import ProgressCallback
from transformers.utils import logging as transformers_logging

from hsd.demo import report, worlds
from hsd.evaluate import Success, end_token_ids, sample, score, success
from hsd.train.callbacks import StepLine, StopOnSignal, last_checkpoint
from hsd.train.config import HSDConfig
from hsd.train.trainer import HSDTrainer
from hsd.viewer.make import make_credit, sample_groups

OVERRIDES = {
    "learning_rate": float,
    "teacher": str,
    "teacher_ema_rate": float,
    "reference_coef": float,
    "peer_rule": str,
    "prefix_sharing": str,
    "divergence": str,
}


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    # TRL 1.16 still uses names that transformers 5.23 deprecates; a bar for saving a shard would break the step's line.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers_logging.disable_progress_bar()
    args.out.mkdir(parents=True, exist_ok=True)
    check_same_run(args)
    started = time.time()
    world = getattr(worlds, args.world)(args, say)
    say(world.title)

    before = once(args.out / "before.json", lambda: evaluate(world, world.eval_samples, args.seed))
    say(f"success before: {before}")
    if not (args.out / "credit.json").exists():
        questions = world.held_out[: world.credit_questions]
        groups, again = (sample_groups(world.subject, questions, args.seed + n) for n in (0, 1))
        say("measuring credit on the failing rollouts of held-out groups")
        note = f"Before training, {command(args)}. Rollouts of held-out questions; the teacher has the same weights."
        make_credit(args.out, world.subject, groups, again, seed=args.seed, note=note)

    trainer = make_trainer(world, args)
    checkpoint = last_checkpoint(args.out)
    done = 0 if checkpoint is None else int(checkpoint.name.removeprefix("checkpoint-"))
    if done < trainer.args.max_steps:  # Trainer would take one step more on a run that has them all
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        done = trainer.state.global_step
        if done < trainer.args.max_steps:
            spent(args.out, started)
            say(f"stopped at step {done}; the same command resumes")
            return
        trainer.save_model(str(args.out / "model"))
    else:
        say(f"this run already has {done} steps")
        trainer._load_from_checkpoint(str(checkpoint))
    after = once(args.out / f"after-{done}.json", lambda: evaluate(world, world.eval_samples, args.seed))
    seconds = spent(args.out, started)
    print(report.write(args.out, world, command(args), settings(world, args), before, after, seconds))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m hsd.demo", description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("world", choices=("small", "smollm2"))
    parser.add_argument("--steps", type=int, help="optimizer steps in all; a run that has fewer goes on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="run folder (runs/WORLD-seedN)")
    parser.add_argument("--model", help="hub id or path, instead of the packaged SmolLM2 (smollm2)")
    parser.add_argument("--data", help="JSONL with question and answer, instead of the times table (smollm2)")
    parser.add_argument("--questions", type=int, help="use the first N of --data")
    parser.add_argument("--max-new-tokens", type=int, help="of a rollout (40; smollm2)")
    for name, kind in OVERRIDES.items():
        parser.add_argument("--" + name.replace("_", "-"), type=kind, help="as in HSDConfig")
    args = parser.parse_args(argv)
    args.out = args.out or Path("runs") / f"{args.world}-seed{args.seed}"
    return args


def settings(world: worlds.World, args: argparse.Namespace) -> dict[str, Any]:
    """The world's configuration with what the command line overrides."""
    return world.config | {name: value for name in OVERRIDES if (value := getattr(args, name)) is not None}


def check_same_run(args: argparse.Namespace) -> None:
    """A run folder holds one run: its earlier results are reused, and must not be another run's."""
    asked = {k: str(v) for k, v in vars(args).items() if k not in ("out", "steps") and v is not None}
    path = args.out / "arguments.json"
    if not path.exists():
        path.write_text(json.dumps(asked, indent=1))
    began = json.loads(path.read_text())
    for name in sorted(began.keys() | asked.keys()):
        if began.get(name) != asked.get(name):
            raise ValueError(
                f"{name}: {args.out} holds a run with {began.get(name)}, got {asked.get(name)}; choose another --out"
            )


def make_trainer(world: worlds.World, args: argparse.Namespace) -> HSDTrainer:
    config = HSDConfig(
        output_dir=str(args.out),
        max_steps=world.steps if args.steps is None else args.steps,
        save_steps=world.save_steps,
        save_total_limit=2,
        seed=args.seed,
        num_generations=8,
        max_completion_length=world.sampling.max_new_tokens,
        temperature=world.sampling.temperature,
        top_p=world.sampling.top_p,
        gradient_checkpointing=False,
        report_to="none",
        dataloader_pin_memory=False,
        **settings(world, args),
    )
    needed = config.generation_batch_size // config.num_generations  # type: ignore[operator]
    if len(world.train) < needed:
        raise ValueError(f"questions: expected at least {needed}, one step's worth, got {len(world.train)}")
    trainer = HSDTrainer(
        model=world.model,
        reward_funcs=world.reward,
        args=config,
        train_dataset=Dataset.from_list(world.train),
        processing_class=world.tokenizer,
        context_template=world.template,
        callbacks=[StopOnSignal()],
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(StepLine())
    return trainer


def evaluate(world: worlds.World, samples: int, seed: int) -> Success:
    questions = [q for q in world.held_out for _ in range(samples)]
    rollouts = sample(
        world.model, world.tokenizer, [q["prompt"] for q in questions], world.sampling, seed=seed, progress=counter
    )
    rewards = score(world.tokenizer, questions, rollouts, world.reward)
    return success(rewards, rollouts, samples, end_token_ids(world.model, world.tokenizer))


def once(path: Path, compute: Callable[[], Success]) -> Success:
    """Computed the first time, read back when the run is resumed."""
    if path.exists():
        return Success(**json.loads(path.read_text()))
    result = compute()
    path.write_text(json.dumps(asdict(result), indent=1))
    return result


def spent(folder: Path, started: float) -> float:
    """Seconds of wall time of this run, parts before a resume included."""
    path = folder / "seconds.json"
    total = time.time() - started + (json.loads(path.read_text()) if path.exists() else 0.0)
    path.write_text(json.dumps(total))
    return total


def command(args: argparse.Namespace) -> str:
    """The command line that makes this run."""
    given = {k: v for k, v in vars(args).items() if k not in ("world", "out") and v is not None}
    given = {k: Path(v).name if k == "data" else v for k, v in given.items()}
    return f"python -m hsd.demo {args.world} " + " ".join(f"--{k.replace('_', '-')} {v}" for k, v in given.items())


def counter(done: int, total: int) -> None:
    print(f"  sampled {done}/{total}", flush=True)


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
