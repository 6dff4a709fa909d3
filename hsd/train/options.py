"""Fields of a configuration that declare their choices and their interval, and the check of a value by them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, fields
from enum import Enum
from itertools import pairwise
from typing import Any, Literal, get_args, get_origin, get_type_hints

from hsd.hindsight.context import fields_of
from hsd.methods.term import Schedule
from hsd.named import nearest

SHARE, AT_LEAST_0, ABOVE_0, AT_LEAST_1, FINITE = "(0, 1]", "[0, inf)", "(0, inf)", "[1, inf)", "(-inf, inf)"


def option(default: Any, help: str, interval: str | None = None, choices: tuple[str, ...] = ()) -> Any:
    """A field whose number, where it is not None, is in ``interval``; a `Literal` type declares its own choices."""
    return field(default=default, metadata={"help": help, "interval": interval, "choices": choices})


@dataclass(frozen=True)
class Option:
    """A field as declared. ``default`` None: the method's, where ``by_method``, else none."""

    name: str
    type: Any
    default: Any
    choices: tuple[str, ...]
    interval: str | None  # of a number, or of each number of a schedule, as in "(0, 1]"
    by_method: bool
    help: str


def declared(config: type, by_method: Collection[str]) -> tuple[Option, ...]:
    """The fields of a dataclass that are `option`, in order."""
    hints, found = get_type_hints(config), []
    for f in fields(config):
        if "interval" in f.metadata:
            hint, interval, told = hints[f.name], f.metadata["interval"], f.metadata["help"]
            choices = get_args(hint) if get_origin(hint) is Literal else f.metadata["choices"]
            found.append(Option(f.name, hint, f.default, choices, interval, f.name in by_method, told))
    return tuple(found)


def check(of: Option, value: Any) -> None:
    """Raise ValueError for a value that is none of the choices or outside the interval."""
    if of.choices and value not in of.choices:
        raise ValueError(f"{of.name}: expected one of {of.choices}, got {value!r}")
    if of.interval is None or value is None:
        return
    if of.type == Schedule:
        if not _is_schedule(value, of.interval):
            raise ValueError(
                f"{of.name}: expected a number in {of.interval} or [start, end, steps] or knots [[step, value], ...], "
                f"steps ascending, got {value!r}"
            )
    elif not _inside(value, of.interval):
        raise ValueError(f"{of.name}: expected a number in {of.interval}, got {value!r}")


def check_enums(config: Any, declared_by: type) -> None:
    """Raise ValueError for a value that is none of the enum's by which ``declared_by`` types its field."""
    for name, hint in get_type_hints(declared_by).items():
        for of in get_args(hint):
            if isinstance(of, type) and issubclass(of, Enum) and (value := getattr(config, name)) is not None:
                known = [member.value for member in of]
                if value not in known:  # a member is its text
                    expected = f"one of {', '.join(known)}{nearest(value, known)}"
                    raise ValueError(f"{name}: expected {expected}, got {value!r}")


def check_setting(name: str, default: Any, value: Any) -> None:
    """Raise ValueError unless ``value`` is of the kind of ``default``: a bool, a text, or a number (`REQUIRED` too). A
    template has no other fields than the default's."""
    expected = "True or False" if isinstance(default, bool) else "a text" if isinstance(default, str) else "a number"
    kind = {"True or False": bool, "a text": str, "a number": int | float}[expected]
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    if isinstance(default, str) and (known := fields_of(name, default)):
        if unknown := fields_of(name, value) - known:
            raise ValueError(f"{name}: expected fields among {sorted(known)}, got {sorted(unknown)}")


def _is_schedule(value: Any, interval: str) -> bool:
    if not isinstance(value, list | tuple):
        return _inside(value, interval)
    if value and all(isinstance(knot, list | tuple) and len(knot) == 2 for knot in value):
        steps = [step for step, _ in value]
        ascending = all(a < b for a, b in pairwise(steps))
        return all(_inside(x, AT_LEAST_0) for x in steps) and ascending and all(_inside(y, interval) for _, y in value)
    return len(value) == 3 and all(_inside(x, interval) for x in value) and value[2] >= 1


def _inside(value: Any, interval: str) -> bool:
    """Whether ``value`` is a number in an interval that is written as "(0, 1]"."""
    if not isinstance(value, int | float):
        return False
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    return above and (value <= high if interval[-1] == "]" else value < high)
