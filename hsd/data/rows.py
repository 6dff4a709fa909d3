"""The one row form of questions, the JSONL files that hold it, and JSON files beside them.

A row is a dict with ``prompt`` (a string or chat messages) and ``answer`` (a string, or a list of strings of which
each is right), and where the data has them ``question`` (the bare question, without instructions), ``solution``,
``demonstration``, ``tests`` (a JSON string), ``kind`` ("math", "code" or "generated"), ``generator``, ``source``,
``id``, ``level`` and ``date``.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from math import isfinite
from pathlib import Path
from typing import Any

from hsd.files import replacing

Row = dict[str, Any]

TEXTS = ("question", "solution", "demonstration", "tests", "kind", "source", "id", "level", "date")
# What a trainer passes to a reward function beside the columns of the data.
TRAINER_COLUMNS = frozenset(
    "prompts completion completions completion_ids trainer_state log_extra log_metric environments".split()
)
KINDS = ("math", "code", "generated")  # each has a verifier
MOST_DIGITS = 4_300  # of an integer, to Python


class Unusable(Exception):
    """The row cannot be verified: a proof, no answer, no tests. The message is the reason, counted by the loader."""


def check_row(row: Row) -> Row:
    """``row`` itself, if it has the form above; else ValueError or TypeError. Further columns are the owner's."""
    for column in ("prompt", "answer"):
        if column not in row:
            raise ValueError(f"row: expected a column {column!r}, got {sorted(row)}")
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


def read_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file (``.gz`` too), one a line; blank lines are passed over.

    Raises ValueError with the line's number where a line is not a JSON object in UTF-8, or the .gz file is broken.
    """
    path, number = Path(path), 0
    with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _object(line, f"{path}, line {number}")
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}, line {number + 1}: expected a whole gzip file, got {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises ValueError with the file's name where it holds something else."""
    return _object(path.read_bytes(), str(path))


def _object(text: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(decoded(text, where), parse_int=_integer)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where}: expected a JSON object, got {_named(text)}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, got {_named(text)}")
    return value


def decoded(text: bytes, where: str) -> str:
    """UTF-8, with or without a byte order mark. Raises ValueError that names another encoding."""
    if text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in text:
        raise ValueError(f"{where}: expected UTF-8, got what looks like UTF-16, UTF-32 or a binary file")
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = text[error.start]
        raise ValueError(
            f"{where}: expected UTF-8, got the byte 0x{byte:02x} after {text[: error.start][-20:]!r} "
            f"(in Latin-1 it is {chr(byte)!r})"
        ) from error


def _integer(digits: str) -> int | str:
    """An integer that is too long for Python stays text."""
    return int(digits) if len(digits) <= MOST_DIGITS else digits


def _named(text: bytes) -> str:
    kind = "a JSON array" * text.lstrip().startswith(b"[")
    kind = kind or "the first line of a JSON object" * (text.strip() == b"{" and text.endswith(b"\n"))
    return f"{kind} (JSON Lines has one object a line): " * bool(kind) + repr(text[:80].decode(errors="replace"))


def write_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> int:
    """Writes the file whole or not at all; returns the number of rows."""
    path, count = Path(path), 0
    opened = gzip.open if path.suffix == ".gz" else open
    with replacing(path) as part, opened(part, "wt", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def append_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """A line for each row at the end of the file, all in one write."""
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_json(path: Path, value: Any) -> None:
    """Writes the file whole or not at all."""
    with replacing(path) as part:
        part.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


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
