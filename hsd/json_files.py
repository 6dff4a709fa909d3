"""JSON and JSON Lines files: read with errors that name file and line, written whole or not at all."""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hsd.files import replacing

MOST_DIGITS = 4_300  # of an integer, to Python


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
