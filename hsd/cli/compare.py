"""`hsd compare RUN RUN ...`: a table of runs, the settings that differ, and a picture of their learning curves.

Loads each folder's metrics.jsonl and config.yaml. Success is that of the training rollouts, as a mean over ``--window``
steps; success on held-out questions stands beside it where the run has any (`hsd.viewer.held_out`). A setting that a
run's method does not use is "—".
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsd.files import check_file
from hsd.train.alarms import WINDOW, moving_mean
from hsd.viewer.plots import CURVES, SUCCESS

FORMATS = (".png", ".pdf", ".svg")
NOT_USED = "—"
HELP = "compare runs: a table, their settings' differences, learning curves"
COLUMNS = {"KL": "hsd/kl", "entropy": "hsd/student_entropy", "length": "completions/mean_length"}


@dataclass(frozen=True)
class LoggedRun:
    name: str
    rows: list[dict[str, Any]]  # metrics.jsonl
    settings: dict[str, Any]  # dotted keys
    unused: Collection[str]  # those that the run's method does not use
    held_out: str  # success on held-out questions, where it was measured

    @property
    def alarms(self) -> dict[str, int]:
        """The step of each alarm."""
        return {name: row["step"] for row in self.rows for name in row.get("alarms", {})}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("--window", type=int, default=WINDOW, help=f"steps that a mean is over ({WINDOW})")
    parser.add_argument("--png", type=Path, default=Path("compare.png"), help="the picture (compare.png)")


def run(args: argparse.Namespace) -> int:
    from hsd.viewer.plots import plot_curves

    if args.window < 1:
        raise ValueError(f"--window: expected a positive number of steps, got {args.window}")
    if args.png.suffix.lower() not in FORMATS:
        raise ValueError(f"--png: expected a file that ends in {', '.join(FORMATS)}, got {args.png}")
    check_file("--png", args.png)
    runs = [read_run(folder, name) for folder, name in zip(args.runs, short_names(args.runs), strict=True)]
    print("\n".join(table(runs, args.window)))
    if differences := differing(runs):
        print("\n" + "\n".join(differences))
    curves = {title: learning_curves(runs, key, args.window) for key, title in CURVES.items()}
    curves = {title: lines for title, lines in curves.items() if lines}
    if not curves:
        raise ValueError(f"RUN: expected a run that logged one of {', '.join(CURVES)}, got none")
    plot_curves(args.png, curves, xlabel="step" if args.window == 1 else f"step (means of {args.window})")
    print(f"\nlearning curves: {args.png}")
    return 0


def read_run(folder: Path, name: str) -> LoggedRun:
    from hsd.cli.settings import flat, load_yaml
    from hsd.train.callbacks import load_metrics
    from hsd.train.rules import ignored
    from hsd.viewer.held_out import latest

    path = folder / "metrics.jsonl"
    rows = load_metrics(path)
    if not rows:
        evaluation = folder.suffix == ".json" or any((folder / f"{n}.json").exists() for n in ("results", "result"))
        instead = ", which `hsd eval` wrote: its table is results.md" if evaluation else ""
        raise ValueError(
            f"RUN: expected a training run's folder, with a metrics.jsonl that has steps, got {folder}{instead}"
        )
    for row in rows:
        for key in {*CURVES, *COLUMNS.values()}:
            if type(row.get(key)) not in (int, float, type(None)):
                raise ValueError(f"{path}, step {row['step']}: {key}: expected a number, got {row[key]!r}")
        if not isinstance(row.get("alarms", {}), dict):
            raise ValueError(f"{path}, step {row['step']}: alarms: expected an object, got {row['alarms']!r}")
    settings, unused = {}, ()
    if (path := folder / "config.yaml").exists():
        settings = flat(written := load_yaml(path))
        train = written.get("train")
        unused = {f"train.{key}" for key in (ignored(train) if isinstance(train, dict) else ())}
    if settings.get("data.path") and not settings.get("data.held_out"):
        return LoggedRun(name, rows, settings, unused, "")  # measured on the training questions
    steps, success = latest(folder) or (0, "")
    at = "" if not success or steps == rows[-1]["step"] else f" at {steps}"
    return LoggedRun(name, rows, settings, unused, success + at)


def table(runs: Sequence[LoggedRun], window: int) -> list[str]:
    """Markdown, one line a run. "-" is a value that the run did not log."""
    head = ["run", "steps", "success, last", "success, best", "held out [95 %]", *COLUMNS, "s/step", "alarms"]
    lines = [head, ["---"] * len(head)]
    for r in runs:
        means = moving_mean(r.rows, SUCCESS, window)
        full = min(window, len(means)) - 1  # means of fewer steps are noisier, and would win
        finite = [(m, row["step"]) for m, row in list(zip(means, r.rows, strict=True))[full:] if not math.isnan(m)]
        best = max(finite, key=lambda pair: pair[0], default=None)
        alarms = ", ".join(f"{name} at {step}" for name, step in r.alarms.items())
        lines.append(
            [
                r.name,
                str(r.rows[-1]["step"]),
                number(means[-1]),
                "-" if best is None else f"{number(best[0])} at {best[1]}",
                r.held_out or "-",
                *(number(moving_mean(r.rows, key, window)[-1]) for key in COLUMNS.values()),
                number(median_step(r.rows)),
                alarms or "none",
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]


def differing(runs: Sequence[LoggedRun]) -> list[str]:
    """A line for each setting that is not the same in all runs that have settings."""
    known = [r for r in runs if r.settings]
    lines = []
    for key in sorted({key for r in known for key in r.settings} - {"train.output_dir"}, key=str):
        values = [r.settings.get(key, "(not set)") for r in known]
        shown = [NOT_USED if key in r.unused else v for r, v in zip(known, values, strict=True)]
        if all(any(v != of_one[0] for v in of_one) for of_one in (values, shown)):
            lines.append(f"{key}: " + ", ".join(f"{r.name} {v}" for r, v in zip(known, shown, strict=True)))
    return lines


def learning_curves(runs: Sequence[LoggedRun], key: str, window: int) -> dict[str, tuple[list[float], list[float]]]:
    """{run: (steps, means)} of the runs, empty where none has logged ``key``."""
    if not any(row.get(key) is not None for r in runs for row in r.rows):
        return {}
    return {r.name: ([row["step"] for row in r.rows], moving_mean(r.rows, key, window)) for r in runs}


def median_step(rows: Sequence[Mapping[str, Any]]) -> float:
    """Seconds; not the mean, which a stall of the machine decides."""
    seconds = [row["step_time"] for row in rows if row.get("step_time") is not None]
    return statistics.median(seconds) if seconds else math.nan


def short_names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, or as many as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    if len(set(parts)) < len(parts):
        raise ValueError(f"RUN: expected different folders, got {', '.join(map(str, folders))}")
    candidates = (["/".join(p[-n:]) for p in parts] for n in range(1, max(map(len, parts)) + 1))
    return next(names for names in candidates if len(set(names)) == len(names))


def number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}"
