"""Answers that are lists: tuples, sets, intervals by their brackets, ratios, matrices; told apart and matched."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class Items:
    brackets: str  # "" for a list without, else "()", "[)", "{}", ":" or "matrix"
    items: tuple[str, ...]


def read_items(s: str) -> Items | None:
    """A list, tuple, interval, set, ratio or matrix of two items or more, or a set of one."""
    matrix = re.fullmatch(r"[(\[]?\\begin\{([pbBvV]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}[)\]]?", s, re.DOTALL)
    if matrix and matrix[1] not in ("vmatrix", "Vmatrix"):
        rows = [row for row in re.split(r"\\\\", matrix[2]) if row.strip()]
        cells = [cell.strip() for row in rows for cell in row.split("&")]
        return Items(f"matrix {len(rows)}", tuple(cells))
    if s.startswith("\\{") and s.endswith("\\}") and "|" not in s:
        inner = s[2:-2].strip()
        return Items("{}", tuple(split(inner))) if inner else None
    if len(s) > 2 and s[0] in "([" and s[-1] in ")]" and closes_last(s):
        inner = split(s[1:-1])
        if len(inner) > 1:
            return Items(s[0] + s[-1], tuple(inner))
        return Items("[]", tuple(inner)) if s[0] + s[-1] == "[]" else None
    listed = split(s, words=True)
    if len(listed) > 1:
        return Items("", tuple(listed))
    if re.fullmatch(r"-?[\w.]+(?::[\w.]+)+(?: [a-zA-Z.]+)?", s):
        return Items(":", tuple(s.split(":")))
    signs = re.search(r"\\pm|\\mp", s)
    if signs and len(re.findall(r"\\pm|\\mp", s)) == 1:
        before, after = s[: signs.start()], s[signs.end() :]
        plus = "+" if before and before[-1] not in "=({" else ""
        return Items("", (f"{before}{plus}{after}", f"{before}-{after}"))
    return None


def closes_last(s: str) -> bool:
    depth = 0
    for i, c in enumerate(s):
        depth += (c in "([") - (c in ")]")
        if depth == 0:
            return i == len(s) - 1
    return False


def split(s: str, words: bool = False) -> list[str]:
    """At commas and semicolons outside of brackets; with `words` at "and", "or" too."""
    parts, depth, start = [], 0, 0
    ends = re.compile(r"[(\[{]|[)\]}]|[,;]" + (r"| (?:and|or) " if words else ""))
    for m in ends.finditer(s):
        if m[0] in "([{":
            depth += 1
        elif m[0] in ")]}":
            depth = max(0, depth - 1)
        elif depth == 0:
            parts.append(s[start : m.start()])
            start = m.end()
    parts = [p.strip() for p in [*parts, s[start:]]]
    parts = [re.sub(r"^(?:and|or) ", "", p) for p in parts]
    return [p for p in parts if p] if words else parts


def expanded(items: tuple[str, ...]) -> list[str]:
    """`x=1, 2` names its variable once; `\\pm 2` is two items; each once."""
    out = []
    for item in items:
        inner = read_items(item) if "\\pm" in item else None
        out += inner.items if inner else [item]
    return list(dict.fromkeys(out))


def matched(left: list[Item], right: list[Item], same: Callable[[Item, Item], bool]) -> bool:
    """Whether each of `left` has one of `right` for itself, and none is over."""
    if len(left) != len(right):
        return False
    right = list(right)
    for x in left:
        at = right.index(x) if x in right else next((i for i, y in enumerate(right) if same(x, y)), None)
        if at is None:
            return False
        del right[at]
    return True
