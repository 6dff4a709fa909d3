"""A value as YAML or a shell gives it, as the type that a field declares."""

from __future__ import annotations

import types
from dataclasses import is_dataclass
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin

NONE = ("none", "null", "~")
WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "none"}


class WrongType(Exception):
    """Says what was expected and what came."""


def options(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the hint itself."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def convert(value: Any, hint: Any) -> Any:
    """``value`` as ``hint`` wants it. Numbers may be text: YAML reads 1e-5, without a dot, as text.

    An exact fit goes before a reading of text, so that "none" stays text where text is allowed.
    """
    for fit in (_exact, _read):
        for option in options(hint):
            try:
                return fit(value, option)
            except (ValueError, WrongType):
                continue
    raise WrongType(f"expected {describe(hint)}, got {value!r}")


def describe(hint: Any) -> str:
    words = []
    for option in options(hint):
        if get_origin(option) is Literal:
            words += [repr(a) for a in get_args(option)]
        elif get_origin(option) is list:
            words.append(f"a list ({describe(get_args(option)[0])} each)")
        elif isinstance(option, type) and issubclass(option, Enum):
            words += [str(member.value) for member in option]
        else:
            keyed = _is_mapping(option) or is_dataclass(option)
            words.append(WORDS.get(option) or ("keys and values" if keyed else str(option)))
    return " or ".join(dict.fromkeys(words))


def _exact(value: Any, option: Any) -> Any:
    origin = get_origin(option)
    if option is Any or (value is None and option is type(None)):
        return value
    if option is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if option in (bool, int, str) and type(value) is option:
        return value
    if origin is Literal and any(value == a and type(value) is type(a) for a in get_args(option)):
        return value
    if (origin is list or option is list) and isinstance(value, list):
        return [convert(v, get_args(option)[0]) for v in value] if get_args(option) else value
    if _is_mapping(option) and isinstance(value, dict):
        return value
    if isinstance(option, type) and issubclass(option, Enum) and isinstance(value, str):
        return option(value).value
    raise WrongType


def _read(value: Any, option: Any) -> Any:
    if option is type(None) and isinstance(value, str) and value.lower() in NONE:
        return None
    if option is float and isinstance(value, str):
        return float(value)
    if option is int and isinstance(value, str | float):
        number = float(value)
        if number.is_integer():
            return int(number)
    raise WrongType


def _is_mapping(option: Any) -> bool:
    return option is dict or get_origin(option) is dict
