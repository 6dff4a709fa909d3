"""The one row form of questions, the JSONL files that hold it, and JSON files beside them.

A row is a dict with ``prompt`` (a string or chat messages) and ``answer`` (a string), and where the data has them
``question`` (the bare question, without instructions), ``solution``, ``demonstration``, ``tests`` (a JSON string),
``kind`` ("math" or "code"), ``source``, ``id``, ``level`` and ``date``.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

TEXTS = ("answer", "question", "solution", "demonstration", "tests", "kind", "source", "id", "level", "date")


def check_row(row: Row) -> Row:
    """``row`` itself, if it has the form above; else ValueError or TypeError. Further columns are the owner's."""
    for column in ("prompt", "answer"):
        if column not in row:
            raise ValueError(f"row: expected a column {column!r}, got {sorted(row)}")
    prompt = row["prompt"]
    if not isinstance(prompt, str):
        messages = isinstance(prompt, list) and prompt and all(map(_is_message, prompt))
        if not messages or prompt[-1]["role"] != "user":
            raise TypeError(f"prompt: expected a string or messages that end with the user's text, got {prompt!r:.200}")
    for column in TEXTS:
        if not isinstance(row.get(column, ""), str):
            raise TypeError(f"{column}: expected a string, got {row[column]!r:.200}")
    if row.get("kind", "math") not in ("math", "code"):
        raise ValueError(f"kind: expected 'math' or 'code', got {row['kind']!r}")
    return row


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def last_user_text(row: Row) -> str:
    """What the user says last in the prompt."""
    return row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]


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
    shown = repr(text[:80].decode(errors="replace"))
    try:
        value = json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: expected a JSON object, got {shown}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, got {shown}")
    return value


def write_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> int:
    """Writes the file whole or not at all; returns the number of rows."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    count, opened = 0, gzip.open if path.suffix == ".gz" else open
    try:
        with opened(part, "wt", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
    return count


def write_json(path: Path, value: Any) -> None:
    """Writes the file whole or not at all."""
    text = (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()  # raises before there is a file
    part = path.with_name(path.name + ".part")
    part.write_bytes(text)
    part.replace(path)


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
