"""What a verifier says about one completion, and what a reward function makes of it."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

from hsd.process import settle

Item = TypeVar("Item")
Completion = str | Sequence[Mapping[str, Any]]


class Status(StrEnum):
    CORRECT = "correct"
    INCORRECT = "incorrect"
    NO_ANSWER = "no_answer"  # nothing to judge: no boxed answer and no number, no code
    TOO_LONG = "too_long"  # the answer, the program or its output is over the cap
    TIMEOUT = "timeout"
    CRASHED = "crashed"  # the program raised, exited or was killed
    VERIFIER_FAILED = "verifier_failed"  # says nothing about the completion


@dataclass(frozen=True)
class Result:
    status: Status
    detail: str = ""  # for people, and for teachers that read feedback: the error's last lines

    @property
    def reward(self) -> float | None:
        """1.0 if correct, None if the verifier failed (TRL leaves such a rollout out of the baseline), else 0.0."""
        if self.status is Status.VERIFIER_FAILED:
            return None
        return float(self.status is Status.CORRECT)


def default_workers() -> int:
    """The cores that this process may use, at most 16."""
    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def in_order(judge: Callable[[Item], Result], items: Iterable[Item], workers: int | None) -> list[Result]:
    """`judge` over `items` in `workers` threads (it waits for a child process). What it raises is a failure."""

    def guarded(item: Item) -> Result:
        try:
            return judge(item)
        except Exception as error:  # one bad row must not end a training run
            return Result(Status.VERIFIER_FAILED, f"{type(error).__name__}: {error}"[:500])

    settle()
    with ThreadPoolExecutor(workers or default_workers()) as pool:
        return list(pool.map(guarded, items))


def rewards(name: str, results: Sequence[Result | None], columns: Mapping[str, Any]) -> list[float | None]:
    """One reward per result, None for None (not this verifier's row). Reports through TRL's hooks if they are there:
    a column ``{name}_status`` in the completions table and the metric ``{name}_verifier_failed``, a share."""
    judged = [r for r in results if r is not None]
    failed = [r for r in judged if r.status is Status.VERIFIER_FAILED]
    if failed:
        reasons = Counter(r.detail for r in failed).most_common(1)[0][0]
        warnings.warn(f"{name}: {len(failed)} of {len(judged)} could not be verified, first: {reasons}", stacklevel=3)
    if log_extra := columns.get("log_extra"):
        log_extra(f"{name}_status", [None if r is None else str(r.status) for r in results])
    if (log_metric := columns.get("log_metric")) and judged:
        log_metric(f"{name}_verifier_failed", len(failed) / len(judged))
    return [None if r is None else r.reward for r in results]


def completion_text(completion: Completion) -> str:
    """The text of a completion: itself, or the content of the last message of a chat."""
    text: Any = completion
    if isinstance(completion, Sequence) and not isinstance(completion, str) and completion:
        text = completion[-1].get("content") if isinstance(completion[-1], Mapping) else None
    if not isinstance(text, str):
        raise TypeError(
            "completions: expected strings or lists of messages whose last one has a string as content, "
            f"got {completion!r}"
        )
    return text


def check_column(name: str, column: Sequence[Any], completions: Sequence[Any]) -> None:
    if len(column) != len(completions):
        raise ValueError(f"{name}: expected {len(completions)} entries, got {len(column)}")
