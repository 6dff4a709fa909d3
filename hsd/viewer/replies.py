"""Replies before and after training side by side, in Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from hsd.hindsight.groups import least_success, shown_answer

KINDS = {  # (right before, right after)
    (False, True): "wrong before and right after",
    (True, False): "right before and wrong after",
    (False, False): "wrong both times",
    (True, True): "right both times",
}
OF_A_KIND = 2  # questions
START, END = 100, 60  # characters of a long text


def table(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], least: float) -> list[str]:
    """How many questions each of `KINDS` has, and the first two of each in a table.

    Args:
        before: a row for each question: question, answer, reply, reward. A reply without a verdict counts as wrong.
        after: the same questions in the same order.
        least: the reward from which on a reply is right, as `hsd.HSDConfig.success_reward`.
    """
    kinds: dict[tuple[bool, bool], list[list[str]]] = {kind: [] for kind in KINDS}
    enough = least_success(least)
    for first, second in zip(before, after, strict=True):
        was, now = (row["reward"] is not None and row["reward"] >= enough for row in (first, second))
        old, new = code(first["reply"]), code(second["reply"])
        asked = [code(first["question"]), code(shown_answer(first["answer"]))]
        kinds[was, now].append([*asked, old, "right" if was else "wrong", new, "right" if now else "wrong"])
    counts = ", ".join(f"{len(kinds[kind])} {name}" for kind, name in KINDS.items())
    rows = [row for of_one in kinds.values() for row in of_one[:OF_A_KIND]]
    return [
        f"The first reply to each question: {counts}. The first {OF_A_KIND} of each:",
        "",
        "| question | answer | reply before | | reply after | |",
        "|---|---|---|---|---|---|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def code(text: str) -> str:
    """A text as one line of Markdown code in a table's cell, long ones without their middle."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text.strip())
    if not line:
        return "(empty)"
    if len(line) > START + END:
        line = f"{line[:START]} … {line[-END:]}"
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    space = " " if "`" in (line[0], line[-1]) else ""
    return f"{fence}{space}{line}{space}{fence}".replace("|", "\\|")
