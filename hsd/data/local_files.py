"""Local files of questions as dicts: JSON Lines, CSV and TSV (``.gz`` too), and Parquet, by the end of the name."""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hsd.json_files import decoded, read_jsonl
from hsd.progress import counted

DELIMITERS = {".csv": ",", ".tsv": "\t"}
ENDINGS = (".jsonl", ".json", *DELIMITERS, ".parquet")
LONGEST_CELL = 1 << 30  # characters; Python's default of 131,072 is less than some tests have


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file. Raises ValueError with the file's name, and the line where there are lines."""
    ending = Path(path.stem if path.suffix == ".gz" else path).suffix.lower()
    if ending == ".parquet":
        return _parquet(path)
    return _separated(path, DELIMITERS[ending]) if ending in DELIMITERS else read_jsonl(path)


def _separated(path: Path, delimiter: str) -> Iterator[dict[str, Any]]:
    """Every cell is a text."""
    csv.field_size_limit(LONGEST_CELL)
    try:
        text = decoded(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes(), str(path))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: expected a whole gzip file, got {error}") from error
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(lines, [])]
        if len(set(header)) < len(header) or not all(header):
            raise ValueError(f"{path}: expected a first line with a name for each column, got {header}")
        for cells in lines:
            if len(cells) != len(header) and cells:
                raise ValueError(
                    f"{path}, line {lines.line_num}: expected {counted(len(header), 'cell')}, got {len(cells)}"
                )
            if cells:
                yield dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}, line {lines.line_num}: expected CSV, got {error}") from error


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except ArrowException as error:
        raise ValueError(f"{path}: expected a Parquet file, got {error}") from error
