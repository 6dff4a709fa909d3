"""The times table: "What is a * b?"."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

HELD_OUT = 24
PRODUCTS = [(a, b) for a in range(2, 13) for b in range(2, 10)]
Questions = list[dict[str, Any]]


def make_questions() -> Questions:
    """The 88 products with a in 2..12 and b in 2..9, in order.

    Each is `{"prompt": [{"role": "user", "content": "What is 3 * 4?"}], "answer": "12"}`.
    """
    return [_question(a, b) for a, b in PRODUCTS]


def split(seed: int) -> tuple[Questions, Questions]:
    """Training and held-out questions, a partition of `make_questions()` that depends on `seed` alone.

    `3 * 4` and `4 * 3` stay on the same side, so the held-out side has `HELD_OUT` questions or one more.
    """
    return split_pairs(PRODUCTS, f"times-table-{seed}", HELD_OUT, _question)


def split_pairs(
    pairs: Sequence[tuple[int, int]], seed: str, held_out: int, question: Callable[[int, int], dict[str, Any]]
) -> tuple[Questions, Questions]:
    """Questions of two numbers, to train on and ``held_out`` or one more; (3, 4) and (4, 3) stay on the same side."""
    unordered = sorted({(min(p), max(p)) for p in pairs})
    random.Random(seed).shuffle(unordered)
    sides: tuple[Questions, Questions] = ([], [])
    for low, high in unordered:
        side = sides[len(sides[1]) < held_out]
        side += [question(a, b) for a, b in sorted({(low, high), (high, low)}) if (a, b) in pairs]
    return sides


def _question(a: int, b: int) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": f"What is {a} * {b}?"}], "answer": str(a * b)}
