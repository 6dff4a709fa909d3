"""Where the seconds of an optimizer step go: sampling, rewards and contexts, the update's passes, the optimizer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class StepTime:
    """Wall seconds by part, and the sampled tokens, since the last `take`.

    On a GPU a part ends when its work is queued, or read by the host, as sampled tokens and losses are.
    """

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.tokens = 0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds the seconds inside to ``name``; those of a part inside it are that part's alone."""
        began, before = time.perf_counter(), sum(self.seconds.values())
        try:
            yield
        finally:
            inside = sum(self.seconds.values()) - before
            self.add(name, time.perf_counter() - began - inside)

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def take(self) -> dict[str, float]:
        """``NAME_s`` for each part, and tokens a second of sampling where there was some; starts over."""
        found = {f"{name}_s": seconds for name, seconds in self.seconds.items()}
        if self.tokens and self.seconds.get("sampling"):
            found["sampled_tokens_per_s"] = self.tokens / self.seconds["sampling"]
        self.seconds, self.tokens = {}, 0
        return found
