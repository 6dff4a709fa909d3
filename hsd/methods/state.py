"""What methods remember between steps, in plain numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor

from hsd.files import replacing

STATE, GATE = "method_state.json", "teacher_gate.json"  # in a checkpoint: the method's, and a `RefreshGate`


class Saved:
    """A dataclass of plain numbers and lists as a `hsd.methods.method.State`."""

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)  # type: ignore[call-overload]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def save_states(states: Mapping[str, Any], folder: Path) -> None:
    """Each state to the file of its name."""
    for name, state in states.items():
        with replacing(folder / name) as part:
            part.write_text(json.dumps(state.state_dict()))


def load_states(states: Mapping[str, Any], folder: Path, run: str) -> None:
    """Raises ValueError for a missing file; ``run`` says what kind of run saves it."""
    for name, state in states.items():
        path = folder / name
        if not path.exists():
            raise ValueError(f"resume_from_checkpoint: expected {path}, which a run with {run} saves")
        state.load_state_dict(json.loads(path.read_text()))


@dataclass
class RunningMoments(Saved):
    """Mean and standard deviation of all values so far."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared distances from the mean

    def update(self, values: Tensor) -> None:
        """``values`` (N,): Chan's update by a batch; none change nothing."""
        if not len(values):
            return
        n, mean = float(len(values)), values.double().mean().item()
        total, gap = self.count + n, mean - self.mean
        self.squares += (values.double() - mean).square().sum().item() + gap * gap * self.count * n / total
        self.mean += gap * n / total
        self.count = total

    @property
    def std(self) -> float:
        return math.sqrt(self.squares / self.count) if self.count else 0.0


@dataclass
class Hysteresis(Saved):
    """A gate that measures its level in a warm-up: closed until then, afterwards open from that level on, closed below
    a share ``down`` of it, and as it was in between."""

    warmup: int = 5
    down: float = 0.93
    level: float = 0.0  # the median of the warm-up
    is_open: bool = True
    seen: list[float] = field(default_factory=list)

    def step(self, value: float) -> float:
        """1 or 0, after ``value``."""
        if len(self.seen) < self.warmup:
            self.seen.append(value)
            self.level = median(self.seen)
            return 0.0
        if value >= self.level:
            self.is_open = True
        elif value < self.down * self.level:
            self.is_open = False
        return float(self.is_open)


@dataclass
class Playbook(Saved):
    """Lessons in a line each, the newest last: one enters when its question, failed before, is solved."""

    lines: list[str] = field(default_factory=list)
    lessons: dict[str, str] = field(default_factory=dict)  # by question, not yet proven
    successes: dict[str, list[int]] = field(default_factory=dict)  # the last one's tokens, by question

    def prove(self, question: str, most: int) -> None:
        lesson = self.lessons.pop(question, "")
        if lesson:
            lines = [*(line for line in self.lines if line != lesson), lesson]
            self.lines = lines[max(0, len(lines) - most) :]


@dataclass
class RefreshGate(Saved):
    """When a gated teacher becomes the student: the mean success over ``window`` generations is ``gain`` above that of
    the last refresh (at first of the first window), and the share of truncated rollouts is at most ``tail``."""

    window: int
    gain: float
    tail: float
    level: float | None = None
    success: list[float] = field(default_factory=list)
    truncated: list[float] = field(default_factory=list)

    def step(self, success: float, truncated: float) -> bool:
        """Whether to refresh, after a generation. One without a verdict (NaN) does not count."""
        if math.isnan(success):
            return False
        self.success = [*self.success, success][-self.window :]
        self.truncated = [*self.truncated, truncated][-self.window :]
        if len(self.success) < self.window:
            return False
        mean = sum(self.success) / self.window
        if self.level is None:
            self.level = mean
        if mean < self.level + self.gain or sum(self.truncated) / self.window > self.tail:
            return False
        self.level, self.success, self.truncated = mean, [], []
        return True
