"""`hsd credit`: the paper's figures of credit, and a page that shows every rollout token by token.

    hsd credit runs/small-seed0
    hsd credit RUN --data questions.jsonl
    hsd credit --model PATH --data questions.jsonl --questions 32 --max-new-tokens 1024

Samples two groups for each question, lets the model itself be the teacher, once with a peer and the answer in context
and once with the answer alone, and writes credit.html, credit.json and the figures into RUN/credit (or ``--out``).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hsd.demo.worlds import World

HELP = "figures of where the credit lands, and a page of rollouts token by token"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="?", type=Path, help="run folder of hsd train or of the demo")
    parser.add_argument("--model", help="hub id or path, instead of the run's newest model")
    parser.add_argument("--data", type=Path, help="JSONL with question and answer; a demo's run brings its own")
    parser.add_argument("--out", type=Path, help="folder to write into (RUN/credit, or ./credit)")
    parser.add_argument("--questions", type=int, default=64, help="use the first N (64)")
    parser.add_argument("--rollouts", type=int, default=8, help="group size G (8)")
    parser.add_argument("--max-new-tokens", type=int, help="of a rollout (512; a demo's run has its own)")
    parser.add_argument("--shown", type=int, default=6, help="groups on the page (6)")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    """Returns 0. Raises ValueError where a model or questions are missing."""
    from hsd.callbacks import read_metrics
    from hsd.demo import report
    from hsd.viewer import summary
    from hsd.viewer.make import make_credit, sample_groups

    for name, least in (("questions", 1), ("rollouts", 2), ("shown", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"{name}: expected at least {least}, got {getattr(args, name)}")
    model = args.model or newest_model(args.run)
    world = load(args, str(model))
    questions = world.held_out[: args.questions]
    out = args.out or (args.run / "credit" if args.run else Path("credit"))
    out.mkdir(parents=True, exist_ok=True)
    print(f"{world.title}: {model}, {len(questions)} questions x {args.rollouts} rollouts, twice", flush=True)
    groups, again = (sample_groups(world, questions, args.seed + n, args.rollouts) for n in (0, 1))
    note = f"Model {model}, seed {args.seed}. The teacher has the same weights."
    credit = make_credit(out, world, groups, again, seed=args.seed, note=note, shown=args.shown)
    pictures = summary.draw(out, credit)
    if args.run and (rows := read_metrics(args.run / "metrics.jsonl")):
        pictures += report.training_picture(out, rows)
    print("\n".join(summary.lines(credit)))
    print("\nWrote " + ", ".join(str(p) for p in (out / "credit.html", out / "credit.json", *pictures)))
    return 0


def newest_model(run: Path | None) -> Path:
    """``RUN/model``, else the checkpoint with the most steps, else RUN itself where that is a saved model."""
    if run is None:
        raise ValueError("run: expected a run folder, or --model with --data, got neither")
    if not run.is_dir():
        raise ValueError(f"run: expected a folder, got {run}")
    checkpoints = [p.parent for p in run.glob("checkpoint-*/trainer_state.json")]
    checkpoints.sort(key=lambda p: int(p.name.removeprefix("checkpoint-")), reverse=True)
    for folder in (run / "model", *checkpoints, run):
        if any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
            return folder
    raise ValueError(f"run: expected a model, a checkpoint or config.json in {run}, got none; give --model")


def load(args: argparse.Namespace, model: str) -> World:
    """Policy, tokenizer, questions, verifier and context template: a demo's own where RUN is one, else of --data."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hsd.context import DEFAULT_CHAT_TEMPLATE, DEFAULT_TEXT_TEMPLATE
    from hsd.demo import worlds
    from hsd.demo.__main__ import parse, say
    from hsd.evaluate import Sampling
    from hsd.verify import number_reward

    if args.data is None and not (args.run and (args.run / "arguments.json").exists()):
        raise ValueError("data: expected a JSONL file of questions (no run folder of the demo is given), got none")
    cuda = torch.cuda.is_available()
    policy: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto" if cuda else torch.float32)
    policy = policy.to("cuda" if cuda else "cpu")
    if args.data is None:
        given = json.loads((args.run / "arguments.json").read_text())
        name = given.pop("world")
        flags = [f"--{key.replace('_', '-')}={value}" for key, value in given.items()]
        world = getattr(worlds, name)(parse([name, *flags, f"--out={args.run}"]), say)
        length = args.max_new_tokens or world.sampling.max_new_tokens
        return replace(world, model=policy, sampling=replace(world.sampling, max_new_tokens=length))
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    questions = worlds.read_questions(args.data, args.questions)
    chat = tokenizer.chat_template is not None
    if not chat:
        questions = [{**q, "prompt": q["prompt"][-1]["content"]} for q in questions]
    return worlds.World(
        title=f"{Path(model).name} on {args.data.name}",
        model=policy,
        tokenizer=tokenizer,
        train=[],
        held_out=questions,
        reward=number_reward,
        template=DEFAULT_CHAT_TEMPLATE if chat else DEFAULT_TEXT_TEMPLATE,
        sampling=Sampling(max_new_tokens=args.max_new_tokens or 512, top_p=0.95, batch_size=64),
        eval_samples=1,
        credit_questions=len(questions),
        steps=0,
        save_steps=0,
    )
