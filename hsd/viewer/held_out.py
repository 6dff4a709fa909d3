"""A run's success on held-out questions, wherever its folder has it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hsd.evaluate import Success
from hsd.evaluate.interval import with_interval
from hsd.json_files import read_json
from hsd.train.callbacks import HELD_OUT, load_metrics
from hsd.viewer.plots import SUCCESS

QUESTIONS = "held-out questions"  # the name that `hsd eval` gives to a run's


def after(folder: Path, steps: int) -> Path:
    """The file of the success after ``steps`` steps, as `hsd demo` measures it."""
    return folder / f"after-{steps}.json"


def latest(folder: Path) -> tuple[int, str] | None:
    """(steps, success with its 95 % interval) of the latest model in a run's folder that was measured.

    After equal steps `hsd demo`'s measurement comes before `hsd eval`'s, and both before that of training, which has no
    interval. Raises ValueError for a broken file, with its name.
    """
    return max(_measured(folder), key=lambda found: found[0], default=None)


def _measured(folder: Path) -> Iterator[tuple[int, str]]:
    for path in folder.glob("after-*.json"):
        if (steps := path.stem.removeprefix("after-")).isdecimal():
            yield int(steps), _told(path, read_json(path))
    if (path := folder / "report.json").exists() and (report := read_json(path)).get("after"):
        steps = (report.get("settings") or {}).get("steps", 0)
        yield steps, _told(path, report["after"], "after: ")
    for path in folder.glob(f"eval-*/{QUESTIONS.replace(' ', '-')}/result.json"):
        found, steps = read_json(path), path.parts[-3].removeprefix("eval-")
        if steps.isdecimal() and found.get("interval") and found.get("rows") == found.get("rows_of_the_subset"):
            yield int(steps), _rate(path, found)
    rows = [row for row in load_metrics(folder / HELD_OUT) if row.get(f"eval_{SUCCESS}") is not None]
    if rows:
        yield rows[-1]["step"], f"{rows[-1][f'eval_{SUCCESS}']:.3f}"


def _rate(path: Path, found: dict[str, Any]) -> str:
    try:
        low, high = found["interval"]
        return with_interval(found["pass@1"], low, high)
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: expected pass@1 with its interval, got {found!r:.200}") from None


def _told(path: Path, found: Any, key: str = "") -> str:
    try:
        return str(Success(**found))
    except (TypeError, ValueError):
        raise ValueError(f"{path}: {key}expected a success with its interval, got {found!r:.200}") from None
