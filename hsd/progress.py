"""What a long job prints: whole lines, flushed, by the first process of a launch."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

Progress = Callable[[int, int], None]  # (done, total)
EVERY = 2.0  # seconds between two lines of a counter


def counted(number: int, noun: str, ending: str = "s") -> str:
    """ "1 step", "2 steps"."""
    return f"{number} {noun}{ending * (number != 1)}"


def say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


def counter(label: str) -> Progress:
    """Prints ``label: done of total, seconds, about how many are left``: every two seconds at most, and at the end.

    The rate is that since the first call: a resumed job begins with some of its work done.
    """
    started = last = time.monotonic()
    first: tuple[int, float] | None = None

    def show(done: int, total: int) -> None:
        nonlocal last, first
        now = time.monotonic()
        begun, since = first = first or (done, now)
        if done < total and now - last < EVERY:
            return
        last = now
        left = f", {(total - done) * (now - since) / (done - begun):.0f} s left" if begun < done < total else ""
        say(f"  {label}: {done} of {total}, {now - started:.0f} s{left}")

    return show


def hide_bars() -> None:
    """No bars of transformers for weights that are loaded or saved; the hub's bars of downloads stay."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    hidden = are_progress_bars_disabled()
    logging.disable_progress_bar()  # the hub's as well
    if not hidden:
        enable_progress_bars()
