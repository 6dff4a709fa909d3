"""`hsd demo small|additions|smollm2 [--key value ...]`: watch a language model get better at reasoning.

Evaluates a registered task's initial policy, measures its credit, trains it, evaluates it again and reports, all in
runs/NAME-seedN. Ctrl-C stops after the current step and leaves a checkpoint; the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import asdict

HELP = "train a small model here and report: success before and after, and where the credit lands"
TAKES_OVERRIDES = True
TASKS = {"small": "small_world", "additions": "additions", "smollm2": "smollm2"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=tuple(TASKS))
    parser.epilog = "Keys as in `hsd train`: --max_steps 30, --seed 1, --model.path ID, --data.path FILE.jsonl."


def run(args: argparse.Namespace) -> int:
    from hsd.cli.run import BEFORE, FREE, claim, newest_model, prepare, steps_of, train
    from hsd.cli.settings import parse
    from hsd.data.rows import read_json
    from hsd.evaluate import Success
    from hsd.files import replacing
    from hsd.progress import counter, say
    from hsd.tasks.task import Policy, evaluate, load_policy
    from hsd.train.card import write_success
    from hsd.viewer import report
    from hsd.viewer.make import make_credit

    settings = parse({"task": TASKS[args.name], "train": {"seed": 0}}, args.overrides)
    seed = settings.train["seed"]
    job = prepare(settings, f"{args.name}-seed{seed}")
    out, task = job.folder, job.task()
    command = shlex.join(["hsd", "demo", args.name, *args.overrides])
    say(task.title)
    claim(job, task)

    def success(name: str, policy: Policy) -> Success:
        """Measured once: a resumed run loads it."""
        if not (out / name).exists():
            measured = evaluate(task, policy.on_accelerator(), seed, counter("sampled"))
            with replacing(out / name) as part:
                part.write_text(json.dumps(asdict(measured), indent=1))
        return Success(**read_json(out / name))

    policy = job.initial_policy(task)
    before = success(BEFORE, policy)
    say(f"success before: {before}")
    if not (out / "credit.json").exists():
        questions = task.evaluated[: task.credit_questions]
        say("measuring credit on the failing rollouts of held-out groups")
        note = f"Before training, {command}. Rollouts of held-out questions; the teacher has the same weights."
        make_credit(out, task, policy, questions, seed=seed, note=note)
    del policy
    if code := train(job):
        return code
    model = newest_model(out)
    after = success(f"after-{steps_of(model)}.json", load_policy(str(model), settings.model.dtype))
    asked = f"{after.questions} {'held-out' if task.held_out else 'training'} questions x {after.samples}"
    write_success(out / "model", f"Of {asked}: {before} before training, {after} after it.")
    chosen = {key: getattr(job.config, key) for key in {**task.config, **settings.train} if key not in FREE}
    print(report.write(out, task, command, chosen, before, after))
    return 0
