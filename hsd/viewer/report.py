"""The report of a run: success before and after, other methods beside it, and where the credit lands."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from hsd.evaluate import Success
from hsd.files import replacing
from hsd.json_files import write_json
from hsd.tasks.task import Evaluation, Task
from hsd.train.alarms import WINDOW, moving_mean
from hsd.train.callbacks import HELD_OUT, load_metrics
from hsd.viewer import replies, summary
from hsd.viewer.plots import CURVES, SUCCESS, plot_curves, plot_methods


@dataclass(frozen=True)
class End:
    """What a method made of the initial policy."""

    rows: list[dict[str, Any]]  # metrics.jsonl
    measured: Evaluation

    @property
    def success(self) -> Success:
        return self.measured.success

    @property
    def steps(self) -> int:
        return self.rows[-1]["step"] if self.rows else 0

    @property
    def seconds(self) -> float:
        """A row has the mean over the steps since the row before."""
        steps = pairwise([0, *(row["step"] for row in self.rows)])
        return sum((b - a) * (row.get("step_time") or 0.0) for (a, b), row in zip(steps, self.rows, strict=True))

    @property
    def alarms(self) -> dict[str, str]:
        return {name: f"step {r['step']}: {text}" for r in self.rows for name, text in r.get("alarms", {}).items()}


def write(
    folder: Path,
    task: Task,
    command: str,
    settings: dict[str, Any],
    before: Evaluation,
    ends: Mapping[str, End],
    credits: Mapping[str, dict[str, Any]],
) -> str:
    """Write report.json, report.md and the pictures; return the text of report.md.

    Args:
        ends: by method, that of the run first.
        credits: `hsd.viewer.summary.summarise` by name, before training and after.
    """
    own = next(iter(ends.values()))
    settings = settings | {"steps": own.steps}
    pictures = summary.write_figures(folder, credits)
    pictures += training_picture(folder, own.rows, load_metrics(folder / HELD_OUT))
    methods = _methods_section(folder, before.success, ends) if len(ends) > 1 else []
    text = "\n".join(
        [
            f"# {task.title}",
            "",
            f"`{command}`, torch {torch.__version__}, {torch.get_num_threads()} threads, "
            f"{own.seconds:.0f} s in training steps.",
            "Settings: " + ", ".join(f"{k} {getattr(v, 'value', v)}" for k, v in settings.items()) + ".",
            "",
            *_success_table(before.success, own.success, task),
            "",
            *_replies_section(before, own.measured, task),
            *_alarm_lines(own.alarms),
            "",
            *methods,
            *_credit_lines(credits),
            "",
            "[Token by token](credit.html), each rollout beside its peer, before training and after.",
            "",
            *(f"![{p.stem}]({p.name})" for p in pictures),
            "",
        ]
    )
    facts = {"settings": settings, "before": asdict(before.success), "after": asdict(own.success), "alarms": own.alarms}
    facts |= {"seconds": own.seconds, "credit": credits}
    if methods:
        facts["methods"] = {name: {"after": asdict(e.success), "seconds": e.seconds} for name, e in ends.items()}
    with replacing(folder / "report.md") as part:
        part.write_text(text, encoding="utf-8")
    write_json(folder / "report.json", facts)
    return text


def _success_table(before: Success, after: Success, task: Task) -> list[str]:
    where = "held-out questions" if task.held_out else "training questions (none is held out)"
    return [
        f"| {before.questions} {where} x {before.samples} | before | after |",
        "|---|---|---|",
        f"| success [95 % interval] | {before} | {after} |",
        f"| truncated | {before.truncated:.3f} | {after.truncated:.3f} |",
        f"| mean length (tokens) | {before.mean_length:.1f} | {after.mean_length:.1f} |",
    ]


def _replies_section(before: Evaluation, after: Evaluation, task: Task) -> list[str]:
    """The first sample of each question; nothing where one of the two kept no replies."""
    if not (before.replies and after.replies):
        return []
    then, now = (measured.replies[:: measured.success.samples] for measured in (before, after))
    return [*replies.table(then, now, task.success_reward), ""]


def _methods_section(folder: Path, before: Success, ends: Mapping[str, End]) -> list[str]:
    """The methods in one table, the run's own first, and methods.png, which is written: curves over means of `WINDOW`
    steps, and success on the held-out questions."""
    curves = {
        name: ([row["step"] for row in end.rows], moving_mean(end.rows, SUCCESS, WINDOW)) for name, end in ends.items()
    }
    after = {name: end.success for name, end in ends.items()}
    title = f"From the same initial policy (curves: means of {WINDOW} steps)"
    plot_methods(folder / "methods.png", curves, before, after, title=title)
    own = next(iter(ends))
    return [
        f"From the same initial policy, with as many rollouts a step. Success before: {before}.",
        "",
        "| method | steps | learning rate | success [95 % interval] | seconds in steps | alarms |",
        "|---|---|---|---|---|---|",
        *(
            f"| {f'**{name}**' if name == own else name} | {e.steps} | {e.rows[0].get('learning_rate', '-')} "
            f"| {e.success} | {e.seconds:.0f} | {', '.join(e.alarms.values()) or 'none'} |"
            for name, e in ends.items()
        ),
        "",
        "![methods](methods.png)",
        "",
    ]


def _credit_lines(credits: Mapping[str, dict[str, Any]]) -> list[str]:
    """The first measurement in full; of the later ones, what changed."""
    lines = []
    for i, (name, credit) in enumerate(credits.items()):
        told = summary.lines(credit)
        rest = told[1:] if i == 0 else told[1:2]
        lines += [f"{name.capitalize()}, {told[0]}", *rest, ""]
    return lines[:-1]


def _alarm_lines(alarms: dict[str, str]) -> list[str]:
    if not alarms:
        return ["No alarm was raised."]
    return [f"ALARM, {text}." for text in alarms.values()]


def training_picture(folder: Path, rows: list[dict], held_out: Sequence[dict] = ()) -> list[Path]:
    """Write training.png, unless there is nothing to show. ``rows`` are those of metrics.jsonl, ``held_out`` of the
    evaluations during training, whose success stands beside that of the rollouts."""
    curves = {title: {"rollouts": line} for key, title in CURVES.items() if (line := _line(rows, key))}
    if line := _line(held_out, f"eval_{SUCCESS}"):
        curves = {CURVES[SUCCESS]: {**curves.pop(CURVES[SUCCESS], {}), "held-out questions": line}} | curves
    if not curves:
        return []
    plot_curves(folder / "training.png", curves, xlabel="training step")
    return [folder / "training.png"]


def _line(rows: Sequence[dict], key: str) -> tuple[list[int], list[float]] | None:
    """(steps, values), with NaN where a step did not measure ``key``; None where no step did."""
    values = [math.nan if row.get(key) is None else row[key] for row in rows]
    return None if all(map(math.isnan, values)) else ([row["step"] for row in rows], values)
