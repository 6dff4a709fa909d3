"""Data sets by name, by hub name, or from a local file (JSON Lines, CSV, Parquet) with the same columns.

load("gsm8k", "train"); load("openai/gsm8k:train"); load("mine.jsonl")
"""

from __future__ import annotations

import pickle
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hsd.data import code_sources as code
from hsd.data import math_sources as math
from hsd.data.local_files import ENDINGS, read_rows
from hsd.data.ready_rows import ready, verl
from hsd.data.rows import TRAINER_COLUMNS, Row, Unusable, likely_first
from hsd.hub import asking, no_answer
from hsd.json_files import read_jsonl
from hsd.named import nearest
from hsd.progress import counted
from hsd.verify.generators import PREFIX, generator

Convert = Callable[[dict[str, Any]], Row]
# What a converter meets in a row whose values are not those of its form; the last three are a packed test's.
BAD_ROW = (ValueError, TypeError, KeyError, AttributeError, IndexError, zlib.error, pickle.UnpicklingError, EOFError)


@dataclass(frozen=True)
class Source:
    """Where a data set lies on the hub. ``splits[0]`` is the one taken when none is named.

    ``files`` names the JSONL files of a split where the repository is driven by a script, which `datasets` 4 and later
    do not run; they are read directly.
    """

    repo: str
    convert: Convert
    splits: tuple[str, ...]
    configs: tuple[str | None, ...] = (None,)
    files: dict[str, tuple[str, ...]] = field(default_factory=dict)


_LCB = tuple(f"test{i or ''}.jsonl" for i in (0, 2, 3, 4, 5, 6))  # each release adds a file
_MATH_SUBJECTS = (
    *("algebra", "counting_and_probability", "geometry", "intermediate_algebra"),
    *("number_theory", "prealgebra", "precalculus"),
)
SOURCES = {
    "gsm8k": Source("openai/gsm8k", math.gsm8k, ("test", "train"), ("main",)),
    "math": Source("EleutherAI/hendrycks_math", math.math, ("test", "train"), _MATH_SUBJECTS),
    "math-500": Source("HuggingFaceH4/MATH-500", math.math, ("test",)),
    "aime-24": Source("HuggingFaceH4/aime_2024", math.math, ("train",)),
    "aime-25": Source("math-ai/aime25", math.math, ("test",)),
    "svamp": Source("ChilleD/SVAMP", math.svamp, ("test", "train")),
    "numina-math": Source("AI-MO/NuminaMath-1.5", math.numina, ("train",)),
    "numina-math-cot": Source("AI-MO/NuminaMath-CoT", math.numina, ("test", "train")),
    "humaneval": Source("openai/openai_humaneval", code.humaneval, ("test",)),
    "humaneval+": Source("evalplus/humanevalplus", code.humaneval, ("test",)),
    "apps": Source(
        "codeparrot/apps", code.apps, ("test", "train"), files={"train": ("train.jsonl",), "test": ("test.jsonl",)}
    ),
    "livecodebench": Source(
        "livecodebench/code_generation_lite",
        code.livecodebench,
        ("release_v5", "release_v1", "release_v2", "release_v3", "release_v4", "release_v6"),
        files={f"release_v{n}": _LCB[:n] for n in range(1, 7)},
    ),
}

# Columns that tell a local file's form; the first that a row has all of.
_FORMS: tuple[tuple[frozenset[str], Convert], ...] = (
    (frozenset({"question_content", "public_test_cases", "private_test_cases"}), code.livecodebench),
    (frozenset({"question", "input_output", "difficulty"}), code.apps),
    (frozenset({"prompt", "test", "entry_point", "canonical_solution"}), code.humaneval),
    (frozenset({"Body", "Question", "Answer"}), math.svamp),
    (frozenset({"problem", "solution", "source"}), math.numina),
    (frozenset({"problem", "answer"}), math.math),
    (frozenset({"problem", "solution"}), math.math),
    (frozenset({"prompt", "reward_model"}), verl),
    (frozenset({"prompt", "answer"}), ready),
    (frozenset({"question", "answer"}), math.gsm8k),
)


@dataclass(frozen=True)
class Loaded:
    """Rows, what exactly they are, and why rows of the source are not among them."""

    rows: list[Row]
    name: str  # "openai/gsm8k main test", or the file's name
    total: int  # rows of the source, unusable ones included
    unusable: dict[str, int]
    dropped: tuple[str, ...] = ()  # columns with names that a trainer uses itself

    def __str__(self) -> str:
        reasons = "".join(f", {count} left out: {reason}" for reason, count in self.unusable.items())
        dropped = "".join(f", without the column {name!r}: a trainer uses this name itself" for name in self.dropped)
        return f"{self.name}: {len(self.rows)} of {counted(self.total, 'row')}{reasons}{dropped}"


def load(name: str, split: str | None = None, limit: int | None = None) -> list[Row]:
    """The rows of a data set, in the row form; `load_source` says more about them and takes the same arguments."""
    return load_source(name, split, limit).rows


def load_source(name: str, split: str | None = None, limit: int | None = None) -> Loaded:
    """The rows of a data set, its exact name and what was left out.

    Args:
        name: A file, a name of `SOURCES` or its hub repository, or ``reasoning_gym:NAME`` (`hsd.verify.generators`).
        split: Of a named data set; ``name:split`` says the same. By default the first of its splits.
        limit: Only the first ``limit`` usable rows.

    Raises:
        ValueError: An unknown name, an unknown split, or a file whose columns are not known.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected a positive number of rows or None, got {limit}")
    path = Path(name).expanduser()
    if path.is_file():
        if split is not None:
            raise ValueError(f"split: expected None for a file, got {split!r}")
        return _collect(path.name, read_rows(path), None, limit)
    if path.is_dir() or path.name.removesuffix(".gz").endswith(ENDINGS) or name.startswith(("/", "./", "../", "~")):
        raise ValueError(f"data: expected a file, got {name}, which is {'a folder' if path.is_dir() else 'not there'}")
    if name.startswith(PREFIX):
        if split is not None:
            raise ValueError(f"split: expected None for a generator, got {split!r}")
        return _collect(name, _generated(name, limit), ready, limit)
    key, _, named = name.partition(":")
    by_repo = {source.repo.lower(): source for source in SOURCES.values()}
    source = SOURCES.get(key.lower()) or by_repo.get(key.lower())
    if source is None:
        known = f"one of {', '.join(SOURCES)} (or its hub name) or {PREFIX}NAME{nearest(key, (*SOURCES, *by_repo))}"
        raise ValueError(f"data: expected a file, {known}, got {name!r}")
    if split and named and split != named:
        raise ValueError(f"split: expected {named!r}, as in {name!r}, or None, got {split!r}")
    split = split or named or source.splits[0]
    if split not in source.splits:
        known = f"{', '.join(source.splits)}{nearest(split, source.splits)}"
        raise ValueError(f"data: expected a split of {key} among {known}, got {split!r}")
    configs = [c for c in source.configs if c]
    exact = " ".join([source.repo, *(configs if len(configs) == 1 else []), split])
    with asking():
        return _collect(exact, _from_hub(source, split), source.convert, limit)


def convert_row(raw: dict[str, Any]) -> Row:
    """A row of a local file in the row form; its columns tell what it is. Raises `Unusable` or ValueError."""
    for columns, convert in _FORMS:
        if columns <= raw.keys():
            return convert(raw)
    raise ValueError(
        "columns: expected 'question' and 'answer', or 'prompt' and 'answer', or those of a known data set "
        f"(docs/data.md), got {', '.join(map(repr, likely_first(raw))) or 'none'}"
    )


def _collect(name: str, raws: Iterable[dict[str, Any]], convert: Convert | None, limit: int | None) -> Loaded:
    rows: list[Row] = []
    reasons: Counter[str] = Counter()
    dropped: dict[str, None] = {}
    total = 0
    for raw in raws:
        total += 1
        if limit is not None and len(rows) == limit:
            continue  # counted all the same
        try:
            row = {"source": name, "id": str(total - 1)} | (convert or convert_row)(raw)
        except Unusable as reason:
            reasons[str(reason)] += 1
            continue
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name}, row {total}: {error}") from error
        except BAD_ROW as error:
            raise ValueError(f"{name}, row {total}: {type(error).__name__}: {error}") from error
        dropped |= dict.fromkeys(c for c in row if c in TRAINER_COLUMNS)
        rows.append({c: value for c, value in row.items() if c not in TRAINER_COLUMNS})
    if not rows:
        why = f" ({dict(reasons)})" if reasons else ""
        raise ValueError(f"{name}: expected at least one usable row, got none of {total}{why}")
    if any(isinstance(row["answer"], list) for row in rows):  # a column has one type
        for row in rows:
            row["answer"] = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    return Loaded(rows, name, total, dict(reasons), tuple(dropped))


def _generated(name: str, limit: int | None) -> Iterator[dict[str, Any]]:
    """The generator's questions as raw rows. Without ``limit`` its ``size`` says how many."""
    data = generator(name)
    for index in range(min(len(data), limit or len(data))):
        entry = data[index]
        row = {"prompt": entry["question"], "question": entry["question"], "answer": entry["answer"]}
        yield row | {"kind": "generated", "generator": name, "id": str(index)}


def _from_hub(source: Source, split: str) -> Iterator[dict[str, Any]]:
    import datasets  # noqa: F401 - before the hub is asked: what it finds in HF_HUB_OFFLINE stays with it

    why = no_answer(source.repo, "dataset")
    try:
        yield from _downloaded(source, split)
    except OSError as error:
        if why is None:
            raise
        raise ValueError(
            f"data: expected a file, or a data set of the hub, got {source.repo!r}: not in the hub's cache, and no "
            f"answer from the hub ({why}); give a file"
        ) from error


def _downloaded(source: Source, split: str) -> Iterator[dict[str, Any]]:
    if source.files:
        from huggingface_hub import hf_hub_download

        for file in source.files[split]:
            yield from read_jsonl(hf_hub_download(source.repo, file, repo_type="dataset"))
        return
    from datasets import load_dataset

    for config in source.configs:
        yield from load_dataset(source.repo, config, split=split)  # type: ignore[misc]
