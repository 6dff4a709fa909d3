"""The times table: "What is a * b?"."""

from __future__ import annotations

import random
from typing import Any

HELD_OUT = 24


def make_questions() -> list[dict[str, Any]]:
    """The 88 products with a in 2..12 and b in 2..9, in order.

    Each is `{"prompt": [{"role": "user", "content": "What is 3 * 4?"}], "answer": "12"}`.
    """
    return [_question(a, b) for a in range(2, 13) for b in range(2, 10)]


def split(seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and held-out questions, a partition of `make_questions()` that depends on `seed` alone.

    `3 * 4` and `4 * 3` stay on the same side, so the held-out side has `HELD_OUT` questions or one more.
    """
    products = [(a, b) for a in range(2, 13) for b in range(2, 10)]
    pairs = sorted({(min(p), max(p)) for p in products})
    random.Random(f"times-table-{seed}").shuffle(pairs)
    sides: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for low, high in pairs:
        side = sides[len(sides[1]) < HELD_OUT]
        side += [_question(a, b) for a, b in sorted({(low, high), (high, low)}) if (a, b) in products]
    return sides


def _question(a: int, b: int) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": f"What is {a} * {b}?"}], "answer": str(a * b)}
