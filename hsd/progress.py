"""What a long job prints: whole lines, flushed, by the first process of a launch."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

Progress = Callable[[int, int], None]  # (done, total)
EVERY = 2.0  # seconds between two lines of a counter


def say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


def counter(label: str) -> Progress:
    """Prints ``label: done of total, seconds``: every two seconds at most, and at the end."""
    started = last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done < total and now - last < EVERY:
            return
        last = now
        say(f"  {label}: {done} of {total}, {now - started:.0f} s")

    return show
