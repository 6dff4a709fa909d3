"""`hsd plan CONFIG.yaml --gpus 8 --memory 80`: what a run would hold and send on each GPU, counted before anything is
loaded. The model's configuration is read, not its weights."""

from __future__ import annotations

import argparse
from pathlib import Path

from hsd.progress import counted

HELP = "count the memory and the traffic of a configuration on each GPU"
TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs of the whole launch")
    parser.add_argument("--memory", type=float, default=80.0, help="of each GPU, GB of 10^9 bytes")
    parser.add_argument("--engine", help="ddp, zero1, zero2, zero3 or fsdp2; by default as settings and launcher say")
    parser.add_argument("--prompt-tokens", type=int, default=512, help="of a question with its privileged context")


def run(args: argparse.Namespace) -> int:
    """0, or 1 where it does not fit."""
    from hsd.cli.prepare import prepare
    from hsd.cli.settings import load
    from hsd.policy.pretrained import load_config
    from hsd.train.limits import check_engine, launched
    from hsd.train.plan import GB, engine_named, plan, shape_of

    if args.gpus < 1 or args.memory <= 0 or args.prompt_tokens < 1:
        given = f"{args.gpus}, {args.memory:g} and {args.prompt_tokens}"
        raise ValueError(f"--gpus, --memory, --prompt-tokens: expected numbers above 0, got {given}")
    job = prepare(load(args.config, args.overrides), args.config.stem, source=str(args.config), check=True)
    model, config = job.settings.model, job.config
    if model.path is None:
        raise ValueError("model.path: expected a folder or a hub id, got none")
    engine = launched(config) if args.engine is None else engine_named(args.engine)
    check_engine(config, engine, peft=model.lora is not None)
    shape = shape_of(load_config(model.path), None if model.lora is None else model.lora.r)
    prompt = min(args.prompt_tokens, config.max_teacher_prompt_length or args.prompt_tokens)
    bytes_of_weight = 4 if model.dtype == "float32" else 2
    room = args.memory * GB
    found = plan(config, shape, engine, args.gpus, room=room, weight_bytes=bytes_of_weight, prompt=prompt)
    print(f"{model.path}: {shape.parameters:,} parameters, {shape.trained:,} trained")
    print(f"{counted(args.gpus, 'GPU')} of {args.memory:g} GB, {engine}; counted, not measured\n")
    for title, items in (("GB on each GPU", found.memory), ("GB that each GPU sends in a step", found.traffic)):
        if items:
            print(title)
        for item in items:
            when = "" if item.phase == "always" else f", in the {item.phase}"
            print(f"  {item.bytes / GB:9.2f}  {item.what}{when}")
    totals = {phase: found.total(phase) for phase in ("update", "rollouts")}
    print("\n" + ", ".join(f"{total / GB:.1f} GB in the {phase}" for phase, total in totals.items()))
    over = found.first_too_much(room)
    if over is None:
        print(f"fits in {args.memory:g} GB")
        return 0
    print(f"does not fit in {args.memory:g} GB; the first that does not: {over.what}, {over.bytes / GB:.1f} GB")
    return 1
