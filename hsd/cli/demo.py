"""`hsd demo small|additions|smollm2 [--against METHOD ...] [--key value ...]`: watch a language model get better at
reasoning.

Evaluates a registered task's initial policy, measures its credit, trains it, measures both again and reports, all in
runs/NAME-seedN. ``--against`` trains other methods from the same initial policy, with as many rollouts a step, each in
a folder of the run. Ctrl-C stops after the current step and leaves a checkpoint; the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

HELP = "train a small model here and report: success before and after, and where the credit lands"
TAKES_OVERRIDES = True
TASKS = {"small": "small_world", "additions": "additions", "smollm2": "smollm2"}
AGAINST = {"small": ["grpo", "opsd"]}
# Beside others a method has the rate that suits it: at 3e-4 OPSD lowers success (benchmarks/small_world, the pilot).
OWN_RATE = {("small", "opsd"): {"learning_rate": 1e-4}}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=tuple(TASKS))
    told = "train these too, from the same initial policy (small: grpo opsd; none without a METHOD)"
    parser.add_argument("--against", nargs="*", metavar="METHOD", help=told)
    parser.epilog = "Keys as in `hsd train`: --max_steps 30, --seed 1, --model.path ID, --data.path FILE.jsonl."


def run(args: argparse.Namespace) -> int:
    from hsd.cli.run import BEFORE, FREE, Run, claim, newest_model, prepare, steps_of, train
    from hsd.cli.settings import parse
    from hsd.data.rows import read_json
    from hsd.evaluate import Success
    from hsd.files import replacing
    from hsd.progress import counter, say
    from hsd.tasks.task import Policy, evaluate, load_policy
    from hsd.train.callbacks import load_metrics
    from hsd.train.card import write_success
    from hsd.viewer import report
    from hsd.viewer.make import measure_credit, write_credit

    settings = parse({"task": TASKS[args.name], "train": {"seed": 0}}, args.overrides)
    seed = settings.train["seed"]
    job = prepare(settings, f"{args.name}-seed{seed}")
    out, task = job.folder, job.task()

    def beside(method: str) -> Run:
        train = OWN_RATE.get((args.name, method), {}) | settings.train
        train |= {"method": method, "output_dir": str(out / method)}
        return prepare(replace(settings, train=train), "", source="--against")

    asked = AGAINST.get(args.name, []) if args.against is None else args.against
    others = {method: beside(method) for method in asked if method != job.config.method}
    against = [] if args.against is None else ["--against", *args.against]
    command = shlex.join(["hsd", "demo", args.name, *against, *args.overrides])
    say(task.title)
    claim(job, task)

    def success(path: Path, policy: Policy) -> Success:
        """Measured once: a resumed run loads it."""
        if not path.exists():
            measured = evaluate(task, policy.on_accelerator(), seed, counter("sampled"))
            with replacing(path) as part:
                part.write_text(json.dumps(asdict(measured), indent=1))
        return Success(**read_json(path))

    def credit(numbers: str, policy: Policy, name: str, shown: int | list[int] = 6) -> dict[str, Any]:
        """Likewise; the page gets it beside what it has."""
        if not (out / numbers).exists():
            say(f"measuring credit {name}, on the failing rollouts of held-out groups")
            questions = task.evaluated[: task.credit_questions]
            measured = measure_credit(task, policy.on_accelerator(), questions, seed=seed, shown=shown)
            note = f"{command}. Rollouts of held-out questions; the teacher has the same weights."
            write_credit(out, task, measured, note=note, name=name, numbers=numbers)
        return read_json(out / numbers)

    policy = job.initial_policy(task)
    before = success(out / BEFORE, policy)
    say(f"success before: {before}")
    first = "before training"
    credits = {first: credit("credit.json", policy, first)}
    del policy
    if code := train(job):
        return code
    model = newest_model(out)
    steps = steps_of(model)
    policy = load_policy(str(model), settings.model.dtype)
    after = success(out / f"after-{steps}.json", policy)
    say(f"success after: {after}")
    held_out = f"{after.questions} {'held-out' if task.held_out else 'training'} questions x {after.samples}"
    write_success(out / "model", f"Of {held_out}: {before} before training, {after} after it.")
    last = f"after {steps} steps"
    credits[last] = credit(f"credit-after-{steps}.json", policy, last, credits[first]["shown"])
    del policy
    ends = {job.config.method: report.End(load_metrics(out / "metrics.jsonl"), after)}
    for method, other in others.items():
        if code := train(other):
            return code
        model = newest_model(other.folder)
        end = success(other.folder / f"after-{steps_of(model)}.json", load_policy(str(model), settings.model.dtype))
        say(f"success after {method}: {end}")
        write_success(other.folder / "model", f"Of {held_out}: {before} before training, {end} after it.")
        ends[method] = report.End(load_metrics(other.folder / "metrics.jsonl"), end)
    chosen = {key: getattr(job.config, key) for key in {**task.config, **settings.train} if key not in FREE}
    print(report.write(out, task, command, chosen, before, ends, credits))
    print(whats_next(out))
    return 0


def whats_next(out: Path) -> str:
    """Where the results are, and commands that go on from them."""
    hsd = "hsd" if shutil.which("hsd") else os.path.relpath(Path(sys.executable).with_name("hsd"))
    lines = {
        "report": out / "report.md",
        "page": f"{out / 'credit.html'}  (every token, before and after; open it in a browser)",
        "model": out / "model",
        "next": f"{hsd} eval {out}",
        "": f"{hsd} credit {out}",
        " ": f"{hsd} train {out / 'config.yaml'} --method sdpo --output_dir runs/sdpo",
    }
    return "\n".join(f"{name:<8}{what}" for name, what in lines.items())
