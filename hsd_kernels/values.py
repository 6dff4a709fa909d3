"""Checks of single values. Each error is one line: "name: expected X, got Y"."""

from __future__ import annotations

import math
import numbers
from typing import Any


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}: expected one of {allowed}, got {value!r}")


def check_number(name: str, value: Any, *, optional: bool = False, integer: bool = False) -> None:
    """A real number, not a bool; None where ``optional``."""
    kind = numbers.Integral if integer else numbers.Real
    if isinstance(value, bool) or not (isinstance(value, kind) or (value is None and optional)):
        expected = "an integer" if integer else "a number"
        or_none = " or None" if optional else ""
        raise TypeError(f"{name}: expected {expected}{or_none}, got {value!r} ({type(value).__name__})")
    if isinstance(value, int) and not abs(int(value)) < 2**63:  # no operator takes it
        raise ValueError(f"{name}: expected a number below 2^63, got {value}")


def check_positive(name: str, value: Any, *, optional: bool = False, integer: bool = False) -> None:
    check_number(name, value, optional=optional, integer=integer)
    # Comparisons, not math.isfinite: under torch.compile(dynamic=True) a number may be symbolic.
    if value is not None and not (0.0 < value < math.inf):
        raise ValueError(f"{name}: expected a finite number > 0, got {value}")


def check_not_negative(name: str, value: Any) -> None:
    check_number(name, value)
    if not (0.0 <= value < math.inf):
        raise ValueError(f"{name}: expected a finite number >= 0, got {value}")


def check_finite(name: str, value: Any) -> None:
    check_number(name, value)
    if not (-math.inf < value < math.inf):
        raise ValueError(f"{name}: expected a finite number, got {value}")


def check_share(name: str, value: Any) -> None:
    check_number(name, value)
    if not (0.0 <= value <= 1.0):
        raise ValueError(f"{name}: expected a number in [0, 1], got {value}")
