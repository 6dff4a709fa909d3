"""What a training run is told: YAML sections and command-line overrides, checked by name, type and line.

model: {path: Qwen/Qwen3-1.7B, dtype: bfloat16, lora: {r: 16}}
data:  {path: train.jsonl}
reward: math
train: {learning_rate: 1e-6, ...}            # the fields of HSDConfig
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from hsd.cli.convert import WrongType, convert, options


@dataclass(frozen=True)
class Lora:
    """As in `peft.LoraConfig`."""

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"


@dataclass(frozen=True)
class Model:
    """``path``: hub id or folder, or "small_world" for the demo's, which is made here."""

    path: str
    dtype: str = "float32"  # of the weights; train.bf16 computes in bf16
    attention: str | None = None  # transformers' attn_implementation
    lora: Lora | None = None


@dataclass(frozen=True)
class Data:
    """``path``: a JSONL file or a name that `hsd.data.load` knows, or "small_world"."""

    path: str
    split: str | None = None
    limit: int | None = None  # the first so many questions
    instruction: str | None = None  # below every question, instead of hsd.data's; "" is none
    chat: bool | None = None  # messages or plain texts; None: messages where the tokenizer has a chat template


@dataclass(frozen=True)
class Settings:
    model: Model
    data: Data
    reward: str | list[str]  # number, math, code or module:function
    train: dict[str, Any]  # fields of HSDConfig


class Section(dict):
    """A YAML mapping that knows the line, or the option, that each key came from."""

    def __init__(self) -> None:
        self.origin: dict[str, str] = {}


class Loader(yaml.SafeLoader):
    source = ""


def _mapping(loader: Loader, node: yaml.MappingNode) -> Section:
    section = Section()
    for key_node, value_node in node.value:
        key, line = str(loader.construct_object(key_node, deep=True)), key_node.start_mark.line + 1
        if key in section:
            raise ValueError(f"{loader.source}, line {line}: {key}: expected once, got it again")
        try:
            section[key] = loader.construct_object(value_node, deep=True)
        except ValueError as error:
            if not isinstance(value_node, yaml.ScalarNode):
                raise
            got = value_node.value  # reads like a day, 2024-13-01, and is none
            raise ValueError(f"{loader.source}, line {line}: {key}: {error}, got {got!r}") from error
        section.origin[key] = f"{loader.source}, line {line}: " if loader.source else ""
    return section


Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def read(path: Path, overrides: Sequence[str] = ()) -> tuple[Settings, dict[str, str]]:
    """Settings of a file with ``--key value`` pairs on top, and where each of the train section's keys came from."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, got {error}") from error
    try:
        loader = Loader(text)
        loader.source = str(path)
        raw = loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path}{line}: expected YAML, got {getattr(error, 'problem', None) or error}") from error
    if not isinstance(raw, Section):
        raise ValueError(f"{path}: expected sections model, data, reward and train, got {raw!r}")
    for key, text in _pairs(overrides):
        _override(raw, key, text)
    settings = _build(Settings, raw, str(path))
    train = raw.get("train")
    return settings, dict(train.origin) if isinstance(train, Section) else {}


def names() -> list[str]:
    """Every key, in dotted form."""
    return list(_walk(Settings, ""))


def _walk(cls: Any, prefix: str) -> Iterator[str]:
    for name, hint in hints(cls).items():
        yield prefix + name
        if (inner := _inner(cls, name, hint)) is not None:
            yield from _walk(inner, f"{prefix}{name}.")


def hints(cls: type) -> dict[str, Any]:
    known = get_type_hints(cls)
    return {f.name: known[f.name] for f in fields(cls) if f.init}


def _inner(cls: type, name: str, hint: Any) -> type | None:
    """The dataclass behind a section, if the key is one."""
    if cls is Settings and name == "train":
        from hsd.train.config import HSDConfig

        return HSDConfig
    own = [o for o in options(hint) if is_dataclass(o) and o.__module__ == __name__]
    return own[0] if own else None  # type: ignore[return-value]


def _build(cls: Any, raw: Any, source: str, prefix: str = "") -> Any:
    """A section's dataclass (HSDConfig: a dict of its fields) from what the file and the command line say."""
    if not isinstance(raw, Section):
        raise ValueError(f"{source}: {prefix.rstrip('.')}: expected keys of its own, got {raw!r}")
    known = hints(cls)
    values: dict[str, Any] = {}
    for key, value in raw.items():
        at = raw.origin[key]
        if key not in known:
            raise ValueError(f"{at}{prefix}{key}: unknown key{_nearest(key, prefix)}")
        inner = _inner(cls, key, known[key])
        if inner is not None and isinstance(value, Section | None) and (value is not None or _required(cls, key)):
            values[key] = _build(inner, Section() if value is None else value, source, f"{prefix}{key}.")
            continue
        try:
            values[key] = convert(_plain(value), known[key])
        except WrongType as error:
            raise ValueError(f"{at}{prefix}{key}: {error}") from None
    for key in known:
        if key not in values and _required(cls, key):
            if (inner := _inner(cls, key, known[key])) is None:
                raise ValueError(f"{source}: {prefix}{key}: expected a value, got none")
            values[key] = _build(inner, Section(), source, f"{prefix}{key}.")
    return values if cls.__name__ == "HSDConfig" else cls(**values)


def _required(cls: Any, key: str) -> bool:
    if cls.__name__ == "HSDConfig":
        return False
    field = next(f for f in fields(cls) if f.name == key)
    return field.default is MISSING and field.default_factory is MISSING


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list) else value


def _nearest(key: str, prefix: str) -> str:
    """ ", the nearest is ..." or nothing: the same word in another section first, then a similar one in this."""
    every = names()
    found = [n for n in every if n.rpartition(".")[2] == key]
    if not found:
        here = [n for n in every if n.startswith(prefix)]
        last = {n.rpartition(".")[2]: n for n in (*every, *here)}
        found = [last[word] for word in difflib.get_close_matches(key, last, n=1)]
    return f", the nearest is {' or '.join(found)}" if found else ""


def _pairs(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise ValueError(f"arguments: expected --key value after the configuration, got {word!r}")
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not rest or (rest[0].startswith("--") and len(rest[0]) > 2):
                raise ValueError(f"--{key}: expected a value, got none")
            text = rest.pop(0)
        yield key.replace("-", "_"), text


def _override(raw: Section, key: str, text: str) -> None:
    """Set ``key``, dotted or the last word alone where only one key ends so."""
    every = names()
    found = [key] if key in every else [n for n in every if n.rpartition(".")[2] == key]
    if not found:
        raise ValueError(f"--{key}: unknown key{_nearest(key.rpartition('.')[2], '')}")
    if len(found) > 1:
        raise ValueError(f"--{key}: expected one of {', '.join('--' + n for n in found)}, got the short {key!r}")
    *path, last = found[0].split(".")
    cls: Any = Settings
    for name in path:
        cls = _inner(cls, name, hints(cls)[name])
        if not isinstance(raw.get(name), Section):  # absent, or none
            raw[name] = Section()
            raw.origin[name] = f"--{key}: "
        raw = raw[name]
    hint = hints(cls)[last]
    try:
        value = yaml.load(text, Loader)
    except yaml.YAMLError:
        value = text
    if not isinstance(value, str | Section) and not _fits(value, hint) and str in options(hint):
        value = text  # --run_name 12
    raw[last] = value
    raw.origin[last] = f"--{key}: "


def _fits(value: Any, hint: Any) -> bool:
    try:
        convert(_plain(value), hint)
    except WrongType:
        return False
    return True
