"""Intervals and inequalities as one form: `read_region`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from hsd.verify.lists import closes_last, matched, split
from hsd.verify.quantities import plain_number

# A variable, with index, power and primes.
SYMBOL = r"(?:[A-Za-z]|\\(?!leq|geq|neq|frac|sqrt|in\b)[a-zA-Z]+)(?:_(?:\{[^{}]*\}|\w))?(?:\^(?:\{[^{}]*\}|\w|\*))?'*"
Part = tuple[str, str, str, str]  # "[" or "(", lower end, upper end, "]" or ")"
_FROM, _TO = r"-\infty", r"\infty"
_ORDER = re.compile(r"\\leq|\\geq|<|>")


@dataclass(frozen=True)
class Region:
    variable: str | None
    parts: tuple[Part, ...]
    relation: bool  # written with an inequality or a union, not as one pair in brackets


def read_region(s: str) -> Region | None:
    r"""``(1, 2]``, ``x\in[1, 2)\cup(3, \infty)``, ``1<x\leq 2``, ``x<1 or x>2``, ``x\neq 3``, ``\{x|x>2\}``."""
    if s in (r"\mathbb{R}", "all real numbers", "R", "all reals"):
        return Region(None, (("(", _FROM, _TO, ")"),), True)
    builder = re.fullmatch(r"\\\{\s*(.+?)(?:\\in\\mathbb\{R\})?\s*[|:]\s*(.+)\\\}", s)
    if builder:
        return read_region(builder[2])
    if size := re.fullmatch(rf"\|({SYMBOL})\|(<|>|\\leq|\\geq)(.+)", s):
        name, sign, end = size.groups()
        inside = sign in ("<", r"\leq")
        return read_region(f"-{end}{sign}{name}{sign}{end}" if inside else f"{name}{sign}{end} or -{end}{sign}{name}")
    member = re.match(rf"({SYMBOL})\\in ?(?=[(\[\\])", s)
    variable = member[1] if member else None
    body = s[member.end() :] if member else s
    without = re.fullmatch(r"\\mathbb\{R\}(?:\\setminus|\\backslash|-)\\\{([^,{}]+(?:\{[^{}]*\})*)\\\}", body)
    if without:
        return Region(variable, (("(", _FROM, without[1], ")"), ("(", without[1], _TO, ")")), True)
    if not _ORDER.search(body) and r"\neq" not in body:
        pieces = body.split(r"\cup")
        pairs = [_pair(piece.strip()) for piece in pieces]
        if any(p is None for p in pairs):
            return None
        return Region(variable, tuple(p for p in pairs if p), len(pieces) > 1 or member is not None)
    if excluded := re.fullmatch(rf"(.*?)(?:, | and |\\land)({SYMBOL})\\neq ?([^,]*)", body):
        region = read_region(s[: len(s) - len(body)] + excluded[1])
        return _without_point(region, excluded[3]) if region and region.variable == excluded[2] else None
    pieces = re.split(r" or |\\cup|\\lor|\\vee|, ", body)
    read = [_chain(piece.strip()) for piece in pieces]
    both = [_chain(half.strip()) for half in re.split(r" and |\\cap|\\land|\\wedge", body)]
    if len(both) == 2:
        above, below = sorted((h for h in both if h), key=lambda h: h[1][0][1] == _FROM) if all(both) else (None, None)
        if not above or not below or above[0] != below[0] or len(above[1]) + len(below[1]) > 2:
            return None
        (p,), (q,) = above[1], below[1]
        return Region(above[0], ((p[0], p[1], q[2], q[3]),), True) if (p[2], q[1]) == (_TO, _FROM) else None
    if any(r is None for r in read) or len({r[0] for r in read if r}) != 1:
        return None
    return Region(read[0][0], tuple(p for r in read if r for p in r[1]), True)  # type: ignore[index]


def _without_point(region: Region, point: str) -> Region | None:
    """``1<x<3, x\\neq 2``: the part that has the point is two."""
    at = plain_number(point)
    if at is None:
        return None
    ends = {_FROM: -math.inf, _TO: math.inf}
    parts = []
    for part in region.parts:
        low, high = (ends.get(end, plain_number(end)) for end in part[1:3])
        if low is not None and high is not None and low < at < high:
            parts += [(part[0], part[1], point, ")"), ("(", point, part[2], part[3])]
        else:
            parts.append(part)
    return replace(region, parts=tuple(parts)) if len(parts) == len(region.parts) + 1 else None


def _pair(s: str) -> Part | None:
    if len(s) < 5 or s[0] not in "([" or s[-1] not in ")]" or not closes_last(s):
        return None
    ends = split(s[1:-1])
    return (s[0], _end(ends[0]), _end(ends[1]), s[-1]) if len(ends) == 2 else None


def _end(s: str) -> str:
    return _TO if s in (r"+\infty", r"\infty") else s


def _chain(s: str) -> tuple[str, tuple[Part, ...]] | None:
    """The variable of one relation, and where it holds: ``1<x\\leq 2``, ``x\\neq 3``."""
    signs = re.findall(r"\\leq|\\geq|\\neq|<|>|=", s)
    terms = [t.strip() for t in re.split(r"\\leq|\\geq|\\neq|<|>|=", s)]
    if not all(terms) or "=" in signs:
        return None
    if signs == [r"\neq"]:
        name, point = terms
        return (name, (("(", _FROM, point, ")"), ("(", point, _TO, ")"))) if re.fullmatch(SYMBOL, name) else None
    if all(sign in (">", r"\geq") for sign in signs):
        terms, signs = terms[::-1], [{">": "<", r"\geq": r"\leq"}[sign] for sign in signs[::-1]]
    if not all(sign in ("<", r"\leq") for sign in signs) or len(terms) not in (2, 3):
        return None
    if len(terms) == 2:  # an open end
        lower = re.fullmatch(SYMBOL, terms[0]) and not terms[0].startswith(r"\pi")
        terms, signs = ([_FROM, *terms], ["<", *signs]) if lower else ([*terms, _TO], [*signs, "<"])
    low, name, high = terms
    if not re.fullmatch(SYMBOL, name):
        return None
    start = "[" if signs[0] == r"\leq" and low != _FROM else "("
    return name, ((start, low, _end(high), "]" if signs[1] == r"\leq" and _end(high) != _TO else ")"),)


def same_regions(a: Region, b: Region, same_end: Callable[[str, str], bool]) -> bool:
    if a.variable and b.variable and a.variable != b.variable:
        return False
    if len(a.parts) != len(b.parts) or len(a.parts) > 20:
        return False

    def same(p: Part, q: Part) -> bool:
        ends = ((p[1], q[1]), (p[2], q[2]))
        return (p[0], p[3]) == (q[0], q[3]) and all(
            x == y or ({x, y}.isdisjoint((_FROM, _TO)) and same_end(x, y)) for x, y in ends
        )

    return matched(list(a.parts), list(b.parts), same)
