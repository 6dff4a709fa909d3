"""What a user names in a configuration: a known word, or ``module:NAME``, a reward function or a method."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any


def nearest(word: Any, known: Iterable[str]) -> str:
    """ ", the nearest is ..." behind an error about an unknown word; nothing where none is similar."""
    found = difflib.get_close_matches(word, known, n=1) if isinstance(word, str) else []
    return f", the nearest is {found[0]}" if found else ""


def is_named(name: object) -> bool:
    """Whether it reads ``module:NAME``."""
    module, colon, attribute = name.partition(":") if isinstance(name, str) else ("", "", "")
    return bool(module and colon and attribute)


def named(key: str, name: str) -> tuple[ModuleType, Any]:
    """The module and what it has under the name, None where it has nothing. The current folder can be imported.

    Raises ValueError, which begins with the configuration's ``key``, where the module cannot be imported.
    """
    module, _, attribute = name.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = importlib.import_module(module)
    except Exception as error:  # the module's own: a name that is not there, a syntax error
        raise ValueError(f"{key}: expected a module that can be imported, got {name!r} ({error})") from error
    return found, getattr(found, attribute, None)
