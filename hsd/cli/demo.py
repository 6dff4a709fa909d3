"""`hsd demo small|additions|smollm2 [--against METHOD ...] [--key value ...]`: watch a language model get better at
reasoning.

Evaluates a registered task's initial policy, measures its credit, trains it, measures both again and reports, all in
runs/NAME-seedN. ``--against`` trains other methods from the same initial policy, with as many rollouts a step, each in
a folder of the run. before.jsonl and after-STEPS.jsonl have every held-out reply. Ctrl-C stops after the current step
and leaves a checkpoint; the same command goes on.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hsd.progress import counted, counter, say

if TYPE_CHECKING:
    from hsd.cli.prepare import Run
    from hsd.tasks.task import Evaluation, Policy, Task
    from hsd.viewer.report import End

HELP = "train a small model here and report: success before and after, and where the credit lands"
TAKES_OVERRIDES = True
TASKS = {"small": "small_world", "additions": "additions", "smollm2": "smollm2"}
AGAINST = {"small": ["grpo", "opsd"]}
# OPSD as published, but at a lower rate: at the task's it lowers success more (benchmarks/small_world, the pilot).
OWN = {("small", "opsd"): {"learning_rate": 1e-4, "divergence": "forward_kl"}}
BEFORE_TRAINING = "before training"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=tuple(TASKS))
    told = "train these too, from the same initial policy (small: grpo opsd; none without a METHOD)"
    parser.add_argument("--against", nargs="*", metavar="METHOD", help=told)
    parser.epilog = "Keys as in `hsd train`: --max_steps 30, --seed 1, --model.path ID, --data.path FILE.jsonl."


def run(args: argparse.Namespace) -> int:
    """Returns 0, or the exit code of a training that a signal stopped."""
    from hsd.cli.folder import FREE, claim
    from hsd.cli.run import train
    from hsd.viewer import report

    job, others = runs(args)
    demo = Demo(job, job.task(), command(args))
    say(demo.task.title)
    claim(job, demo.task)
    before, credits = demo.initial()
    ends: dict[str, End] = {}
    for trained in (job, *others):
        if code := train(trained):
            return code
        ends[trained.config.method] = demo.end(trained, before, credits)
    given = {key: getattr(job.config, key) for key in {**demo.task.config, **job.settings.train} if key not in FREE}
    print(report.write(job.folder, demo.task, demo.command, given, before, ends, credits))
    print(whats_next(job.folder))
    return 0


def runs(args: argparse.Namespace) -> tuple[Run, list[Run]]:
    """The run, and those of the other methods, in folders of it."""
    from hsd.cli.prepare import prepare
    from hsd.cli.settings import parse

    settings = parse({"task": TASKS[args.name], "train": {"seed": 0}}, args.overrides)
    job = prepare(settings, f"{args.name}-seed{settings.train['seed']}")

    def beside(method: str) -> Run:
        train = OWN.get((args.name, method), {}) | settings.train
        train |= {"method": method, "output_dir": str(job.folder / method)}
        return prepare(replace(settings, train=train), "", source="--against")

    methods = AGAINST.get(args.name, []) if args.against is None else args.against
    if args.against and job.config.method in args.against:
        say(f"--against: {job.config.method} is the run's own method, and is trained once")
    return job, [beside(method) for method in dict.fromkeys(methods) if method != job.config.method]


def command(args: argparse.Namespace) -> str:
    against = [] if args.against is None else ["--against", *args.against]
    return shlex.join(["hsd", "demo", args.name, *against, *args.overrides])


@dataclass(frozen=True)
class Demo:
    """What is measured in the folder of a run. Each number is measured once: a resumed run loads it."""

    job: Run
    task: Task
    command: str

    def initial(self) -> tuple[Evaluation, dict[str, Any]]:
        """The initial policy on the task's questions, and its credit by name."""
        from hsd.cli.folder import BEFORE

        policy = self.job.initial_policy(self.task)
        before = self.evaluation(policy, self.job.folder / BEFORE)
        say(f"success before: {before.success}")
        return before, {BEFORE_TRAINING: self.credit(policy, BEFORE_TRAINING, "credit.json")}

    def end(self, trained: Run, before: Evaluation, credits: dict[str, Any]) -> End:
        """What ``trained`` made of the initial policy. The run's own credit is added to ``credits``."""
        from hsd.cli.folder import newest_model, steps_of
        from hsd.tasks.task import load_policy
        from hsd.train.callbacks import load_metrics
        from hsd.train.card import write_success
        from hsd.viewer import held_out
        from hsd.viewer.report import End

        own, model = trained is self.job, newest_model(trained.folder)
        steps, policy = steps_of(model), load_policy(str(model), trained.settings.model.dtype)
        measured = self.evaluation(policy, held_out.after(trained.folder, steps))
        after = measured.success
        say(f"success after{'' if own else f' {trained.config.method}'}: {after}")
        kind = "held-out" if self.task.held_out else "training"
        questions = f"{counted(after.questions, f'{kind} question')} x {after.samples}"
        write_success(trained.folder / "model", f"Of {questions}: {before.success} before training, {after} after it.")
        if own:
            name, shown = f"after {counted(steps, 'step')}", credits[BEFORE_TRAINING]["shown"]
            credits[name] = self.credit(policy, name, f"credit-after-{steps}.json", shown)
        return End(load_metrics(trained.folder / "metrics.jsonl"), measured)

    def evaluation(self, policy: Policy, path: Path) -> Evaluation:
        """The success in the file ``path``, and the replies in the JSONL file beside it."""
        from hsd.evaluate import Success
        from hsd.json_files import read_json, read_jsonl, write_json, write_jsonl
        from hsd.tasks.task import Evaluation, evaluate

        beside = path.with_suffix(".jsonl")
        if not (path.exists() and beside.exists()):
            measured = evaluate(self.task, policy.on_accelerator(), self.job.config.seed, counter("sampled"))
            write_jsonl(beside, measured.replies)
            write_json(path, asdict(measured.success))
        return Evaluation(Success(**read_json(path)), list(read_jsonl(beside)))

    def credit(self, policy: Policy, name: str, numbers: str, shown: int | list[int] = 6) -> dict[str, Any]:
        """The numbers of the file ``numbers``. Their tokens join the page's under ``name``."""
        from hsd.json_files import read_json
        from hsd.viewer.make import measure_credit, write_credit

        out = self.job.folder
        if not (out / numbers).exists():
            say(f"measuring credit {name}, on the failing rollouts of held-out groups")
            questions = self.task.evaluated[: self.task.credit_questions]
            seed = self.job.config.seed
            measured = measure_credit(self.task, policy.on_accelerator(), questions, seed=seed, shown=shown)
            note = f"{self.command}. Rollouts of held-out questions; the teacher has the same weights."
            write_credit(out, self.task, measured, note=note, name=name, numbers=numbers)
        return read_json(out / numbers)


def whats_next(out: Path) -> str:
    """Where the results are, and commands that go on from them."""
    hsd = "hsd" if shutil.which("hsd") else os.path.relpath(Path(sys.executable).with_name("hsd"))
    return "\n".join(
        [
            f"report  {out / 'report.md'}",
            f"page    {out / 'credit.html'}  (every token, before and after; open it in a browser)",
            f"model   {out / 'model'}",
            f"next    {hsd} eval {out}",
            f"        {hsd} credit {out}",
            f"        {hsd} train {out / 'config.yaml'} --method sdpo --output_dir runs/sdpo",
        ]
    )
