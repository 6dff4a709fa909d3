"""`hsd credit`: the paper's figures of credit, and a page that shows every rollout token by token.

    hsd credit runs/small-seed0
    hsd credit RUN --data questions.jsonl
    hsd credit --model PATH --data questions.jsonl --questions 32 --max-new-tokens 1024

Samples two groups for each question, lets the model itself be the teacher, once with a peer and the answer in context
and once with the answer alone, and writes credit.html, credit.json and the figures into RUN/credit (or ``--out``).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hsd.progress import counted

HELP = "figures of where the credit lands, and a page of rollouts token by token"
LEAST = {"questions": 1, "rollouts": 2, "shown": 1, "max_new_tokens": 1}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="?", type=Path, help="run folder of hsd train or hsd demo, or a model in it")
    parser.add_argument("--model", help="hub id or path, instead of the run's newest model")
    parser.add_argument("--data", help="data set or file with question and answer; a run brings its own")
    parser.add_argument("--out", type=Path, help="folder to write into (RUN/credit, or ./credit)")
    parser.add_argument("--questions", type=int, default=64, help="use the first N (64)")
    parser.add_argument("--rollouts", type=int, default=8, help="group size G (8)")
    parser.add_argument("--max-new-tokens", type=int, help="of a rollout (512; a run has its own)")
    parser.add_argument("--shown", type=int, default=6, help="groups on the page (6)")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    """Returns 0. Raises ValueError where a model or questions are missing."""
    import torch

    from hsd.cli.folder import find_run, run_and_model
    from hsd.files import check_folder
    from hsd.tasks.task import load_policy
    from hsd.train.callbacks import HELD_OUT, load_metrics
    from hsd.viewer import report, summary
    from hsd.viewer.make import PAGE, measure_credit, write_credit

    for name, least in LEAST.items():
        if (value := vars(args)[name]) is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least {least}, got {value}")
    if args.model is None and args.run is None:
        raise ValueError("run: expected a run folder, or --model with --data, got neither")
    folder, newest = run_and_model(args.run) if args.run else (None, None)
    model = args.model or str(newest)
    _, task = find_run(folder, model, args.data, args.max_new_tokens)
    out = args.out or (folder / "credit" if folder else Path("credit"))
    check_folder("--out", out)
    questions = task.evaluated[: args.questions]
    policy = load_policy(model, "auto" if torch.cuda.is_available() else "float32").on_accelerator()
    policy.tokenizer.pad_token = policy.tokenizer.pad_token or policy.tokenizer.eos_token
    out.mkdir(parents=True, exist_ok=True)
    print(
        f"{task.title}: {model}, {counted(len(questions), 'question')} x {counted(args.rollouts, 'rollout')}, twice",
        flush=True,
    )
    note = f"Model {model}, seed {args.seed}. The teacher has the same weights."
    numbers = {"seed": args.seed, "size": args.rollouts, "shown": args.shown}
    credit = measure_credit(task, policy, questions, **numbers)
    write_credit(out, task, credit, note=note)
    pictures = summary.write_figures(out, {"": credit.summary})
    if folder and (rows := load_metrics(folder / "metrics.jsonl")):
        pictures += report.training_picture(out, rows, load_metrics(folder / HELD_OUT))
    print("\n".join(summary.lines(credit.summary)))
    print("\nWrote " + ", ".join(str(p) for p in (out / PAGE, out / "credit.json", *pictures)))
    return 0
