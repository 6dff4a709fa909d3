"""The report of a run: success before and after, coverage, and where the credit lands. Text, JSON and pictures."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hsd.evaluate import Success
from hsd.files import replacing
from hsd.tasks.task import Task
from hsd.train.callbacks import load_metrics
from hsd.viewer import summary
from hsd.viewer.plots import plot_curves

CURVES = {
    "loss": "loss (nats)",
    "hsd/success_rate": "success of rollouts",
    "hsd/coverage": "coverage: failing with a peer",
    "hsd/credit_at_tau": "|A| at tau (nats)",
    "hsd/student_entropy": "student entropy (nats/token)",
    "completions/mean_length": "rollout length (tokens)",
}


def write(folder: Path, task: Task, command: str, settings: dict[str, Any], before: Success, after: Success) -> str:
    """Write report.json, report.md and the pictures; return the text of report.md."""
    credit = json.loads((folder / "credit.json").read_text())
    rows = load_metrics(folder / "metrics.jsonl")
    alarms = {name: f"step {r['step']}: {text}" for r in rows for name, text in r.get("alarms", {}).items()}
    settings = settings | {"steps": len(rows)}
    seconds = sum(row.get("step_time") or 0.0 for row in rows)
    credit_lines = summary.lines(credit)
    pictures = summary.draw(folder, credit) + training_picture(folder, rows)
    text = "\n".join(
        [
            f"# {task.title}",
            "",
            f"`{command}`, torch {torch.__version__}, {torch.get_num_threads()} threads, "
            f"{seconds:.0f} s in training steps.",
            "Settings: " + ", ".join(f"{k} {v}" for k, v in settings.items()) + ".",
            "",
            *_success_table(before, after, task),
            "",
            *_alarm_lines(alarms),
            "",
            "Before training, " + credit_lines[0],
            *credit_lines[1:],
            "",
            "[Token by token](credit.html), each rollout beside its peer.",
            "",
            *(f"![{p.stem}]({p.name})" for p in pictures),
            "",
        ]
    )
    facts = {"settings": settings, "before": asdict(before), "after": asdict(after), "alarms": alarms}
    facts |= {"seconds": seconds, "credit": credit}
    for name, written in (("report.md", text), ("report.json", json.dumps(facts, indent=1))):
        with replacing(folder / name) as part:
            part.write_text(written, encoding="utf-8")
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


def _alarm_lines(alarms: dict[str, str]) -> list[str]:
    if not alarms:
        return ["No alarm was raised."]
    return [f"ALARM, {text}." for text in alarms.values()]


def training_picture(folder: Path, rows: list[dict]) -> list[Path]:
    """Write training.png, unless there is no step to show."""
    if not rows:
        return []
    steps = [row["step"] for row in rows]
    values = {key: [math.nan if row.get(key) is None else row[key] for row in rows] for key in CURVES}
    curves = {title: {"run": (steps, values[key])} for key, title in CURVES.items()}
    plot_curves(folder / "training.png", curves, xlabel="training step")
    return [folder / "training.png"]
