"""The one row form of questions.

A row is a dict with ``prompt`` (a string or chat messages) and ``answer`` (a string, or a list of strings of which
each is right), and where the data has them ``question`` (the bare question, without instructions), ``solution``,
``demonstration``, ``tests`` (a JSON string), ``kind`` ("math", "code" or "generated"), ``generator``, ``source``,
``id``, ``level`` and ``date``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from decimal import Decimal
from math import isfinite
from typing import Any

from hsd.named import nearest

Row = dict[str, Any]

TEXTS = ("question", "solution", "demonstration", "tests", "kind", "source", "id", "level", "date")
# What a trainer passes to a reward function beside the columns of the data.
TRAINER_COLUMNS = frozenset(
    "prompts completion completions completion_ids trainer_state log_extra log_metric environments".split()
)
LIKELY = ("question", "problem", "prompt", "query", "instruction", "input", "answer", "solution", "response", "output")
LIKELY += ("target", "label", "completion")
KINDS = ("math", "code", "generated")  # each has a verifier


class Unusable(Exception):
    """The row cannot be verified: a proof, no answer, no tests. The message is the reason, counted by the loader."""


def check_row(row: Row) -> Row:
    """``row`` itself, if it has the form above; else ValueError or TypeError. Further columns are the owner's."""
    for column in ("prompt", "answer"):
        if column not in row:
            raise ValueError(f"row: expected a column {column!r}{nearest(column, row)}, got {sorted(row)}")
    prompt, answer = row["prompt"], row["answer"]
    if not is_prompt(prompt):
        raise TypeError(f"prompt: expected a string or messages that end with the user's text, got {prompt!r:.200}")
    accepted = answer if isinstance(answer, list) else [answer]
    if not accepted or not all(isinstance(one, str) for one in accepted):
        raise TypeError(f"answer: expected a string, or a list of accepted strings, got {answer!r:.200}")
    for column in TEXTS:
        if not isinstance(row.get(column, ""), str):
            raise TypeError(f"{column}: expected a string, got {row[column]!r:.200}")
    if row.get("kind", "math") not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {row['kind']!r}")
    return row


def likely_first(columns: Iterable[str]) -> list[str]:
    """The columns, those first that may be a question or an answer by their names."""
    return sorted(columns, key=lambda column: not any(word in column.lower() for word in LIKELY))


def answer_text(answer: Any) -> str:
    """The answer without space around it. Raises `Unusable` where there is none, TypeError for a list and the like."""
    if answer is not None and (isinstance(answer, bool) or not isinstance(answer, str | int | float | Decimal)):
        raise TypeError(f"answer: expected a string or a number, got {answer!r:.200}")
    if answer is None or answer != answer or not str(answer).strip():  # NaN is a table's None
        raise Unusable("no answer")
    if isinstance(answer, float | Decimal) and not isfinite(answer):
        raise Unusable("no finite answer")
    return str(answer).strip()


def accepted(answer: Any) -> str | list[str]:
    """`answer_text`, also of each of several accepted answers; a list of one is that one."""
    if not isinstance(answer, list | tuple):
        return answer_text(answer)
    texts = list(dict.fromkeys(map(answer_text, answer)))
    if not texts:
        raise Unusable("no answer")
    return texts[0] if len(texts) == 1 else texts


def is_prompt(value: Any) -> bool:
    """Whether ``value`` is a text, or messages of texts that end with the user's."""
    if isinstance(value, str):
        return True
    return isinstance(value, list) and all(map(_is_message, value)) and [m["role"] for m in value][-1:] == ["user"]


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def reward_columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """The columns as a trainer passes them to a reward function, without its own names; ``prompt`` is ``prompts``."""
    columns = {c: [row.get(c) for row in rows] for c in dict.fromkeys(c for row in rows for c in row)}
    return {"prompts": columns.pop("prompt")} | {c: v for c, v in columns.items() if c not in TRAINER_COLUMNS}


def completions_of(rows: Sequence[Row], texts: Sequence[str]) -> list[Any]:
    """Replies as a trainer passes them to a reward function: texts where the prompt is one, else messages."""
    return [
        text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
        for row, text in zip(rows, texts, strict=True)
    ]


def fingerprint(rows: Sequence[Row]) -> str:
    """Twelve hex digits that change with any prompt, answer or test of the rows, or with their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row["prompt"], row["answer"], row.get("tests", "")]).encode())
    return digest.hexdigest()[:12]


def to_dataset(rows: Sequence[Row]) -> Any:
    """A `datasets.Dataset` with the columns that any row has; None where a row lacks one.

    Raises ValueError if string and chat prompts are mixed: a column has one type.
    """
    from datasets import Dataset

    if len({isinstance(row["prompt"], str) for row in rows}) > 1:
        raise ValueError("rows: expected all prompts to be strings or all to be messages, got both")
    columns = dict.fromkeys(column for row in rows for column in row)
    return Dataset.from_dict({c: [row.get(c) for row in rows] for c in columns})
