"""Tasks: a model, its questions and their verifier, and the settings that a run of it begins with."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from hsd.named import nearest

if TYPE_CHECKING:
    from hsd.tasks.task import Task

TASKS = (
    "small_world",
    "smollm2",
    "additions",
    "chain_sum",
)  # a module hsd/tasks/NAME.py with a function `task(seed) -> Task`


def registered(name: str, seed: int) -> Task:
    """The task of that name; its questions depend on ``seed``. Raises ValueError for an unknown name."""
    if name not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}{nearest(name, TASKS)}, got {name!r}")
    return importlib.import_module(f"hsd.tasks.{name}").task(seed)
