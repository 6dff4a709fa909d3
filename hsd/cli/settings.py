"""A run's settings from a YAML file and ``--key value`` pairs. Errors name the file or the option, and the nearest key.

Sections and their types are in `hsd.tasks.settings`, the keys of ``train`` are the fields of `hsd.HSDConfig`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from typing_extensions import TypedDict, is_typeddict

from hsd.tasks.settings import Settings

SECTIONS = ("model", "data", "train")
OF_A_PATH = ("model", "data")  # a text in their place is their path
# Arguments by whose names errors call a key.
ARGUMENTS = {"split": "data.split", "limit": "data.limit", "max_length": "train.max_teacher_prompt_length"}
EXPONENT = re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$")


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers: 1e-3 is one, which PyYAML takes for a text."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+0123456789"))


def load(path: Path, overrides: Sequence[str] = ()) -> Settings:
    """The settings in a YAML file with ``--key value`` pairs on top."""
    return parse(load_yaml(path), overrides, str(path))


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds. Raises ValueError with the file's name where it holds something else."""
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ValueError(f"{path}: expected a YAML file, got {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: expected YAML in UTF-8, got {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected sections {', '.join(f.name for f in fields(Settings))}, got {found!r:.80}")
    return found


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys in dotted form."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


def parse(raw: Mapping[str, Any], overrides: Sequence[str] = (), source: str = "settings") -> Settings:
    """``raw`` as checked settings, with ``--key value`` pairs on top. ``source`` names ``raw`` in errors."""
    merged: dict[str, Any] = {key: _section(key, v) for key, v in raw.items()}
    came_from: dict[str, str] = {}
    for key, value, option in _options(overrides):
        _put(merged, key.split("."), value)
        came_from[key] = option
    for section in SECTIONS:
        merged[section] = _section(section, merged.get(section))
    try:
        merged["train"] = _adapter(_train()).validate_python(merged["train"])
        return _adapter(Settings).validate_python(merged)
    except ValidationError as error:
        prefix = "" if error.title == "Settings" else "train."
        raise ValueError(_explain(error, prefix, came_from, source)) from None


def _section(name: str, value: Any) -> Any:
    """``value`` as keys: a text alone is the path of a section that has one, and nothing is no key."""
    if name in OF_A_PATH and isinstance(value, str):
        return {"path": value}
    return dict(value or {}) if isinstance(value, Mapping) or (value is None and name in SECTIONS) else value


def as_typed(message: str, config: Path | None, overrides: Sequence[str]) -> str:
    """An error that begins with a key, or with several, behind the option or the file that gave the key."""
    place = f"{config or 'settings'}: "
    names, colon, rest = message.removeprefix(place).partition(": ")
    keys = {name: _key_of(name) for name in names.split(", ")}
    if not colon or not keys.keys() <= {name for name, key in keys.items() if key}:
        return message
    given = {key: option for key, _, option in _options(overrides)}
    if typed := {name: option for name, key in keys.items() if (option := _around(key, given))}:
        return f"{', '.join(typed.get(name, name) for name in keys)}: {rest}"
    if config is None:
        return f"{', '.join(keys.values())}: {rest}"
    written = load_yaml(config)
    shown = [name if isinstance(written.get(name), str) else key for name, key in keys.items()]
    there = dict.fromkeys(flat(written), place)
    by_file = message.startswith(place) or any(name in OF_A_PATH or _around(key, there) for name, key in keys.items())
    return f"{place if by_file else ''}{', '.join(shown)}: {rest}"


def _key_of(name: str) -> str:
    """The dotted key that an error means by ``name``; empty where it means none."""
    if name in OF_A_PATH:
        return f"{name}.path"
    return next((key for key in (ARGUMENTS.get(name, name), f"train.{name}") if key in known_keys()), "")


def _around(key: str, given: Mapping[str, str]) -> str | None:
    """Who gave ``key``, or a section around it; None where nobody did."""
    parts = key.split(".")
    names = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((given[name] for name in names if name in given), None)


@cache
def known_keys() -> dict[str, Any]:
    """Every key, in dotted form, with its type."""

    def walk(cls: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        for name, hint in _hints(cls).items():
            yield prefix + name, hint
            inner = _train_config() if (cls, name) == (Settings, "train") else None
            inner = inner or next((option for option in (hint, *get_args(hint)) if is_dataclass(option)), None)
            if inner is not None:
                yield from walk(inner, f"{prefix}{name}.")

    return dict(walk(Settings, ""))


def _train_config() -> type:
    from hsd.train.config import HSDConfig

    return HSDConfig


def _hints(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls)
    # None stands for a default of None: HSDConfig leaves these to the method.
    return {f.name: hints[f.name] | None if f.default is None else hints[f.name] for f in fields(cls) if f.init}


@cache
def _train() -> Any:
    """The fields of HSDConfig as a TypedDict: what is given, and no defaults."""
    section: Any = TypedDict("Train", _hints(_train_config()), total=False)  # type: ignore[operator]
    section.__pydantic_config__ = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
    return section


@cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    has_its_own = is_dataclass(hint) or is_typeddict(hint)
    of_any_type: Any = hint
    return TypeAdapter(of_any_type, config=None if has_its_own else ConfigDict(arbitrary_types_allowed=True))


def _explain(error: ValidationError, prefix: str, came_from: Mapping[str, str], source: str) -> str:
    """One line about the first key that is wrong."""
    problems = error.errors()
    place = [str(part) for part in problems[0]["loc"]]
    unknown = problems[0]["type"] in ("extra_forbidden", "unexpected_keyword_argument")
    # Behind a key stand the place in a list and the member of a union that was tried.
    lengths = range(len(place), 0, -1)
    length = next((n for n in lengths if unknown or prefix + ".".join(place[:n]) in known_keys()), 0)
    key = (prefix + ".".join(place[:length])).rstrip(".")
    where = _around(key, came_from) or source
    if unknown:
        return f"{where}: {key}: unknown key{nearest(key)}"
    about = [p for p in problems if [str(part) for part in p["loc"][:length]] == place[:length]]
    expected = " or ".join(dict.fromkeys(_wanted(p["msg"], key) for p in about))
    return f"{where}: {key}: expected {expected}, got {problems[0]['input']!r:.200}"


def _wanted(message: str, key: str) -> str:
    if "instance of" not in message:
        return message.removeprefix("Input should be ")
    own = [name.rpartition(".")[2] for name in known_keys() if name.rpartition(".")[0] == key]
    return f"{'a path or ' * (key in OF_A_PATH)}the keys {', '.join(own)}"


def nearest(key: str) -> str:
    """ ", the nearest is ..." or nothing: the same word in another section first, then a similar one."""
    last = {name.rpartition(".")[2]: name for name in known_keys()}
    word = key.rpartition(".")[2]
    same = [name for name in known_keys() if name.rpartition(".")[2] == word]
    found = same or [last[w] for w in difflib.get_close_matches(word, last, n=1)]
    return f", the nearest is {' or '.join(found)}" if found else ""


def _pairs(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise ValueError(f"arguments: expected --key value, got {word!r}")
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not rest or (rest[0].startswith("--") and len(rest[0]) > 2):
                raise ValueError(f"--{key}: expected a value, got none")
            text = rest.pop(0)
        yield key.replace("-", "_"), text


def _options(words: Sequence[str]) -> Iterator[tuple[str, Any, str]]:
    """Key, value and the option as typed."""
    for word, text in _pairs(words):
        key = _full_name(word)
        value = _value(text, known_keys()[key])
        # A text in a section's place is its path, and the section's other keys stay.
        yield f"{key}.path" if key in OF_A_PATH and isinstance(value, str) else key, value, f"--{word}"


def _full_name(word: str) -> str:
    """The dotted key of an option: itself, or the only key that ends in it."""
    found = [word] if word in known_keys() else [n for n in known_keys() if n.rpartition(".")[2] == word]
    if not found:
        raise ValueError(f"--{word}: unknown key{nearest(word)}")
    if len(found) > 1:
        raise ValueError(f"--{word}: expected one of {', '.join('--' + n for n in found)}, got the short {word!r}")
    return found[0]


def _value(text: str, hint: Any) -> Any:
    """The first of an option's values that its type allows: the text as YAML, the text itself, none.

    An empty text is itself where there may be a text: `--data.instruction ""` is no instruction, not the default one.
    """
    try:
        as_yaml = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError):
        as_yaml = text
    for value in (*([text] if not text else []), as_yaml, text, *([None] if text.lower() == "none" else [])):
        try:
            _adapter(hint).validate_python(value)
            return value
        except ValidationError:
            continue
    return as_yaml


def _put(section: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for name in path[:-1]:
        if not isinstance(section.get(name), dict):
            section[name] = {}
        section = section[name]
    section[path[-1]] = value
