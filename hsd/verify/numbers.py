"""Scoring by the last number of an answer, for the times table and GSM8K-style data."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from typing import Any

from hsd.verify.status import Completion, check_column, completion_text

# A sign counts only where no operand stands before it ("7-5" ends in 5). Thousands groups come before plain
# digits, so that "1,234" is one number; a comma or a period with no digit after it is punctuation.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]}%$])[-\u2212](?=\$?\.?\d)|(?<=\$)[-\u2212](?=\.?\d))?\$?"
    r"(?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?<![\w.])(?=\.\d))"
    r"(?:\.(?P<fraction>\d+))?",
    re.ASCII,
)


def last_number(text: str) -> str | None:
    """The last decimal number in `text`, in its shortest form, or None: `"pay $1,234.50."` gives `"1234.5"`.

    Reads thousands commas, decimals, a leading minus and a leading `$`; 18.0 and 18 give the same string.
    Fractions, exponents and words are not numbers: `3/4` gives `"4"`.
    """
    matches = deque(_NUMBER.finditer(text), maxlen=1)
    if not matches:
        return None
    match = matches[0]
    whole = match["whole"].replace(",", "").lstrip("0") or "0"
    fraction = (match["fraction"] or "").rstrip("0")
    number = f"{whole}.{fraction}" if fraction else whole
    return f"-{number}" if match["sign"] and number != "0" else number


def numbers_equal(a: str | None, b: str | None) -> bool:
    """Whether the last numbers of `a` and `b` are the same, digit by digit; False where either has none."""
    number = None if a is None else last_number(a)
    return number is not None and b is not None and number == last_number(b)


def final_answer(text: str) -> str:
    """The final answer of a worked solution: what stands after the last `####` (GSM8K), else the last number.

    Raises ValueError where that holds no number.
    """
    _, mark, tail = text.rpartition("####")
    answer = tail.strip() if mark else last_number(text)
    if answer is None or last_number(answer) is None:
        raise ValueError(f"text: expected an answer that holds a number, got {text[-80:]!r}")
    return answer


def number_reward(
    completions: Sequence[Completion],
    answer: Sequence[str | int | float],
    **kwargs: Any,
) -> list[float]:
    """1.0 where the last number of the completion equals the final answer, else 0.0. A TRL reward function.

    A completion is a string, or a chat of which the last message counts; an answer is a number or a text for
    `final_answer`.
    """
    check_column("answer", answer, completions)
    return [
        float(numbers_equal(completion_text(completion), final_answer(str(target))))
        for completion, target in zip(completions, answer, strict=True)
    ]
