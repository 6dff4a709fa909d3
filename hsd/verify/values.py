"""When two answers are equal: exact numbers, letters, lists, intervals; SymPy is asked for what is left.

`equal(gold, answer, ask)` takes answers as `hsd.verify.answers.extract_answer` gives them. `ask(gold, answer)` decides
about two expressions; it is called only where no exact reading does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from decimal import Context, Decimal, InvalidOperation
from fractions import Fraction
from typing import TypeVar

from hsd.verify.spelling import is_words, normalized
from hsd.verify.units import SCALES, Unit, read_unit

CLOSE = Fraction(1, 10**6)  # the relative difference under which a decimal stands for a fraction or a root
DIGITS = 6  # that it must have: 0.333333, but 0.000001 stands for no 1/1000001
MAX_EXPONENT = 5000
MAX_ITEMS = 60
Ask = Callable[[str, str], bool]
Item = TypeVar("Item")
_WIDE = Context(prec=200_000)

_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d*)?"
_NUMBER = re.compile(
    rf"""(?P<sign>[-+]?)(?:
        (?P<top1>\d+)[ ](?:and[ ])?(?P<top>\d+)/(?P<bottom>\d+)                              # 1 1/4
        |(?P<whole>\d+)?\\frac\{{(?P<ftop>-?{_DECIMAL})\}}\{{(?P<fbottom>-?{_DECIMAL})\}}     # 1\\frac{{1}}{{4}}
        |(?P<ratio>{_DECIMAL})/(?P<under>{_DECIMAL})
        |(?P<lead>{_DECIMAL})\\overline\{{(?P<period>\d+)\}}
        |(?:(?P<mantissa>{_DECIMAL})(?:\*|\\times|\\cdot|[ ]?x[ ]?))?
            \{{?10\}}?\^(?:\{{(?P<power>[-+]?\d+)\}}|(?P<power1>-?\d+))
        |(?P<decimal>{_DECIMAL})(?:[eE](?P<e>[-+]?\d+))?
    )(?P<rest>.*)""",
    re.DOTALL | re.ASCII | re.VERBOSE,
)


@dataclass(frozen=True)
class Number:
    value: Fraction
    decimal: bool = True  # written as a decimal, with so many significant digits if it has a point or an exponent
    digits: int = 0
    percent: bool = False
    unit: Unit | None = None


def read_number(answer: str) -> Number | None:
    """One number, also with a unit: ``\\$1,234.50``, 1 1/4, 3.0 x 10^8, 0.\\overline{3}, 28%, 5 km/h, 3 million."""
    return _number(normalized(answer))


def plain_number(answer: str) -> Fraction | None:
    """The value of an answer that is one number, None with a percent sign: ``\\$1,234.50`` is 1234.5."""
    number = read_number(answer)
    return None if number is None or number.percent else number.value


def _number(s: str) -> Number | None:
    if s.startswith(("(", "-(")) and s.endswith(")") and re.fullmatch(r"-?\([^()]*\)", s):
        inner = _number(s.lstrip("-")[1:-1])
        return inner and replace(inner, value=-inner.value if s.startswith("-") else inner.value)
    s = re.sub(r"^([-+]?)\((-?[\d.]+)\)/\(?(-?[\d.]+)\)?$", r"\1\\frac{\2}{\3}", s)
    s = re.sub(r"^(\d+(?:\.\d+)?)\^(?:\{(-?\d{1,3})\}|(\d))$", _integer_power, s)
    m = _NUMBER.fullmatch(s)
    if m is None:
        return None
    read = _value(m)
    if read is None:
        return None
    value, decimal, rest = *read, m["rest"].strip()
    shown = m["mantissa"] or m["decimal"] or ""
    digits = len(re.sub(r"^[0.,]+|\D", "", shown)) if "." in shown else 0
    if rest == "" or (m["lead"] is not None and rest == r"\ldots"):
        return Number(-value if m["sign"] == "-" else value, decimal, digits)
    if m["sign"] == "-":
        value = -value
    if (
        rest == r"\ldots"
        and decimal
        and (cycle := re.search(r"(\d+?)\1\1+$|(\d{3,}?)\2$", s.removesuffix(r"\ldots")))
        and "." in s
    ):
        lead = s[: s.index(cycle[0])] if "." in s[: s.index(cycle[0])] else ""
        return _number(f"{lead}\\overline{{{cycle[1] or cycle[2]}}}") if lead else None
    word = re.match(r"([a-z]+)\b\s*", rest)
    if word and word[1] in SCALES:
        value, rest = value * SCALES[word[1]], rest[word.end() :]
        if not rest:
            return Number(value, decimal, digits)
    if rest.startswith("%"):
        return Number(value, decimal, digits, percent=True) if rest == "%" else None
    if re.match(r"[A-Za-z]$", rest) and not s[: len(s) - len(rest)].endswith(" "):
        return None  # a variable: 5m
    unit = read_unit(rest)
    return None if unit is None else Number(value, decimal, digits, unit=unit)


def _integer_power(m: re.Match[str]) -> str:
    exponent = int(m[2] or m[3])
    if len(m[1]) * exponent > 2000 or exponent < 0:
        return m[0]
    return _decimal(_fraction(m[1]) ** exponent)


def _value(m: re.Match[str]) -> tuple[Fraction, bool] | None:
    try:
        if m["top1"] is not None:
            return Fraction(_integer(m["top1"])) + Fraction(_integer(m["top"]), _integer(m["bottom"])), False
        if m["ftop"] is not None:
            part = _fraction(m["ftop"]) / _fraction(m["fbottom"])
            if m["whole"] is None:
                return part, False
            proper = 0 < part < 1 and m["ftop"].isdigit() and m["fbottom"].isdigit()
            return (_integer(m["whole"]) + part, False) if proper else None
        if m["ratio"] is not None:
            return _fraction(m["ratio"]) / _fraction(m["under"]), False
        if m["period"] is not None:
            lead = m["lead"] if "." in m["lead"] else m["lead"] + "."
            places = len(lead.partition(".")[2])
            repeated = Fraction(_integer(m["period"]), (10 ** len(m["period"]) - 1) * 10**places)
            return (_fraction(lead) if re.search(r"\d", lead) else 0) + repeated, False
        power = m["power"] or m["power1"]
        if power is not None:
            return _scaled(m["mantissa"] if m["mantissa"] is not None else "1", power), True
        if m["e"] is not None:
            return _scaled(m["decimal"], m["e"]), True
        return _fraction(m["decimal"]), True
    except (ValueError, ZeroDivisionError, InvalidOperation):
        return None


def _integer(digits: str) -> int:
    return int(Decimal(digits))  # not int(): over 4,300 digits it refuses


def _fraction(decimal: str) -> Fraction:
    if not re.search(r"\d", decimal) or len(decimal) > 100_000:
        raise ValueError
    return Fraction(Decimal(decimal.replace(",", "").rstrip(".")))


def _scaled(mantissa: str, exponent: str) -> Fraction:
    if len(exponent) > 6 or abs(int(exponent)) > MAX_EXPONENT:
        raise ValueError
    return _fraction(mantissa) * Fraction(10) ** int(exponent)


# -- equality ---------------------------------------------------------------------------------------------------------


def equal(gold: str, answer: str, ask: Ask, tolerance: float | None = None) -> bool:
    """Whether `answer` equals `gold`; `tolerance` is a relative difference that two numbers may have."""
    exact, _, rounded = re.sub(r"\\(?:simeq|doteq)(?![a-zA-Z])", r"\\approx", answer).rpartition(r"\approx")
    if exact.strip() and r"\approx" not in gold:  # 2\sqrt{3} \approx 3.46 answers both
        return any(equal(gold, one, ask, tolerance) for one in (rounded, exact))
    letter = read_choice(gold)
    if letter is not None and (letter[1] or len(normalized(gold)) == 1):
        return _same_choice(letter, answer, ask, tolerance)
    left, right = normalized(gold), normalized(answer)
    if not left or not right:
        return False
    if left == right:
        return True
    if is_words(gold) or is_words(answer) or (_all_words(left) and _all_words(right)):
        return _same_words(left, right)
    return _equal(left, _one_value(right), ask, tolerance)


def _one_value(answer: str) -> str:
    """The first of several spellings of one number: ``\\frac{3}{8}, 0.375``."""
    first, *others = _split(answer, words=True) or [answer]
    one = _number(first) if others else None
    return first if one and all((n := _number(other)) and same_number(one, n) for other in others) else answer


def read_choice(answer: str) -> tuple[str, str] | None:
    r"""A letter and its option: ``\textbf{(C)}\ 12`` gives ("C", "12"), "(C)" gives ("C", "")."""
    s = re.sub(r"\\(?:text|textbf|mathrm|mathbf|textit|mbox)\s*\{([^{}]*)\}", r" \1 ", answer)
    s = re.sub(r"\\ |\\[,;:]|\\q?quad(?![a-zA-Z])|~", " ", s).replace("$", " ").replace("*", "").strip()
    s = re.sub(r"^(?i:option|choice|answer)\s+", "", s)
    m = re.match(r"\(\s*([A-Z])\s*\)\s*[:.]?\s*|([A-Z])\s*[).:](?:\s+|$)|([A-Z])$", s)
    if m is None:
        return None
    option = s[m.end() :].strip().rstrip(".")
    if option.startswith(("=", "\\cup", "\\in", "+", "-(", "/")):
        return None
    return (m[1] or m[2] or m[3]), option


def _same_choice(gold: tuple[str, str], answer: str, ask: Ask, tolerance: float | None) -> bool:
    given = read_choice(answer)
    if given is None:
        return bool(gold[1]) and equal(gold[1], answer, ask, tolerance)
    return gold[0] == given[0] and (not gold[1] or not given[1] or equal(gold[1], given[1], ask, tolerance))


_RELATION = re.compile(r"\\leq|\\geq|\\neq|<|>|=|\\in(?![a-zA-Z])")
_SYMBOL = r"(?:[A-Za-z]|\\(?!leq|geq|neq|frac|sqrt|in\b)[a-zA-Z]+)(?:_(?:\{[^{}]*\}|\w))?(?:\^(?:\{[^{}]*\}|\w|\*))?'*"
_ASSIGNED = re.compile(
    rf"(?P<name>{_SYMBOL}|{_SYMBOL}\({_SYMBOL}(?:, {_SYMBOL})*\)|\({_SYMBOL}(?:, {_SYMBOL})+\)"
    r"|[A-Z]{2,3}|P\([^=]*\)|\\angle ?[A-Z]+|[A-Za-z][a-z]+(?: [a-z]+)*)(?:=|\\in(?=\\\{))"
)


def _equal(a: str, b: str, ask: Ask, tolerance: float | None) -> bool:
    if a == b:
        return True
    regions = read_region(a), read_region(b)
    if None not in regions and any(r.relation for r in regions if r):
        return _same_regions(*regions, ask, tolerance)  # type: ignore[arg-type]
    lists = [items if items and items.brackets == "" else None for items in (_items(a), _items(b))]
    if lists[0] and lists[1]:
        return _same_items(lists[0], lists[1], ask, tolerance)
    names = [None if listed else _ASSIGNED.match(s) for listed, s in zip(lists, (a, b), strict=True)]
    if names[0] or names[1]:
        left, right = (m["name"] if m else None for m in names)
        if left and right and left != right and all(re.fullmatch(_SYMBOL, n) for n in (left, right)):
            return False  # x = 3 for y = 3
        one = _assigned(a) if left else a
        two = _assigned(b) if right else b
        if (names[0] or names[1]) and (left or "=" not in a) and (right or "=" not in b):
            return _equal(one, two, ask, tolerance)
    elif "=" in b and "=" not in a and not _relational(b) and not lists[1]:
        return _equal(a, b.rpartition("=")[2], ask, tolerance)  # 3 + 4 = 7
    numbers = (_number(a), _number(b))
    if numbers[0] and numbers[1]:
        return same_number(numbers[0], numbers[1], tolerance)
    structures = _items(a), _items(b)
    if structures[0] or structures[1]:
        if not (structures[0] and structures[1]):
            return False
        return _same_items(structures[0], structures[1], ask, tolerance)
    if a == r"\emptyset" or b == r"\emptyset":
        return _same_words(a, b)
    if re.search(r"_(?:\d+|\{\d+\})$", a) and re.match(r"\w+_", a) and a.rpartition("_")[0] == b and a[0].isdigit():
        return True  # 13_5 for 13 in base 5
    if re.match(r"\w*\d_\{?\d", a) or re.match(r"\w*\d_\{?\d", b):
        return re.sub(r"[{}]", "", a) == re.sub(r"[{}]", "", b)
    if not all(n or is_expression(s) for n, s in zip(numbers, (a, b), strict=True)):
        return a.casefold() == b.casefold()
    one, two = (_without_unit(s) for s in (a, b))
    if one[1] and two[1] and not one[1].same(two[1]):
        return False
    left, right = (_as_latex(n) if n and not n.percent else s for n, (s, _) in zip(numbers, (one, two), strict=True))
    if one[1] and two[1] and (times := two[1].factor / one[1].factor) != 1:
        right = rf"({right})\cdot\frac{{{times.numerator}}}{{{times.denominator}}}"
    return ask(left, right)


def _as_latex(number: Number) -> str:
    """A number as SymPy reads it: to LaTeX, "1e-5" is Euler's number less 5."""
    top, bottom = number.value.numerator, number.value.denominator
    return (
        _decimal(number.value)
        if number.digits >= DIGITS or bottom == 1
        else rf"\frac{{{Decimal(top):f}}}{{{Decimal(bottom):f}}}"
    )


def _decimal(value: Fraction) -> str:
    """A fraction that ends, as a decimal."""
    places = next(k for k in range(2 * MAX_EXPONENT) if 10**k % value.denominator == 0)
    return f"{Decimal(int(value * 10**places)).scaleb(-places, _WIDE):f}"


def _relational(s: str) -> bool:
    return any(m[0] != "=" for m in _RELATION.finditer(s))


def _assigned(s: str) -> str:
    name = _ASSIGNED.match(s)
    return s[name.end() if name else 0 :].rpartition("=")[2].strip()


def same_number(gold: Number, answer: Number, tolerance: float | None = None) -> bool:
    a, b = gold.value, answer.value
    if gold.unit and answer.unit:
        if not gold.unit.same(answer.unit):
            return False
        if gold.unit.powers == answer.unit.powers:
            a, b = a * gold.unit.factor, b * answer.unit.factor
    exact = gold.decimal == answer.decimal or max(gold.digits, answer.digits) < DIGITS
    if gold.percent != answer.percent and (answer.unit is None and gold.unit is None):
        whole = (a / 100, b) if gold.percent else (a, b / 100)
        bare = abs(answer.value if answer.percent else gold.value) >= 1  # 28% for 28, but not 0.28% for 0.28
        return (bare and _same_value(a, b, exact, tolerance)) or _same_value(*whole, exact, tolerance)
    return gold.percent == answer.percent and _same_value(a, b, exact, tolerance)


def _same_value(a: Fraction, b: Fraction, exact: bool, tolerance: float | None) -> bool:
    allowed = Fraction(tolerance) if tolerance is not None else Fraction(0) if exact else CLOSE
    return a == b or abs(a - b) <= allowed * max(abs(a), abs(b))


@dataclass(frozen=True)
class Items:
    brackets: str  # "" for a list without, else "()", "[)", "{}", ":" or "matrix"
    items: tuple[str, ...]


def _items(s: str) -> Items | None:
    """A list, tuple, interval, set, ratio or matrix of two items or more, or a set of one."""
    matrix = re.fullmatch(r"[(\[]?\\begin\{([pbBvV]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}[)\]]?", s, re.DOTALL)
    if matrix and matrix[1] not in ("vmatrix", "Vmatrix"):
        rows = [row for row in re.split(r"\\\\", matrix[2]) if row.strip()]
        cells = [cell.strip() for row in rows for cell in row.split("&")]
        return Items(f"matrix {len(rows)}", tuple(cells))
    if s.startswith("\\{") and s.endswith("\\}") and "|" not in s:
        inner = s[2:-2].strip()
        return Items("{}", tuple(_split(inner))) if inner else None
    if len(s) > 2 and s[0] in "([" and s[-1] in ")]" and _closes_last(s):
        inner = _split(s[1:-1])
        if len(inner) > 1:
            return Items(s[0] + s[-1], tuple(inner))
        return Items("[]", tuple(inner)) if s[0] + s[-1] == "[]" else None
    listed = _split(s, words=True)
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


def _closes_last(s: str) -> bool:
    depth = 0
    for i, c in enumerate(s):
        depth += (c in "([") - (c in ")]")
        if depth == 0:
            return i == len(s) - 1
    return False


def _split(s: str, words: bool = False) -> list[str]:
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


def _same_items(a: Items, b: Items, ask: Ask, tolerance: float | None) -> bool:
    if len(a.items) > MAX_ITEMS or len(b.items) > MAX_ITEMS:
        return False
    loose = {"", "{}"}
    unordered = a.brackets in loose and b.brackets in loose
    square = b.brackets == "[]" and len(b.items) != 2  # two are an interval
    as_list = (a.brackets == "" and (square or b.brackets == "()")) or (b.brackets == "" and a.brackets == "()")
    if not (unordered or as_list or a.brackets == b.brackets):
        return False
    if not unordered:
        return len(a.items) == len(b.items) and all(
            _equal(x, y, ask, tolerance) for x, y in zip(a.items, b.items, strict=True)
        )
    return _matched(_expanded(a.items), _expanded(b.items), lambda x, y: _equal(x, y, ask, tolerance))


def _matched(left: list[Item], right: list[Item], same: Callable[[Item, Item], bool]) -> bool:
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


def _expanded(items: tuple[str, ...]) -> list[str]:
    """`x=1, 2` names its variable once; `\\pm 2` is two items; each once."""
    out = []
    for item in items:
        inner = _items(item) if "\\pm" in item else None
        out += inner.items if inner else [item]
    return list(dict.fromkeys(out))


def _same_words(a: str, b: str) -> bool:
    return _plain_words(a) == _plain_words(b) != ""


_EMPTY = re.compile(
    r"(?:(?:the |this )?\w+ has |there (?:is|are) )?no (?:(?:real|integer|positive|valid|such) )?(?:solutions?|roots?)"
    r"(?: exists?)?|(?:the )?empty set|none exist"
)


def _plain_words(s: str) -> str:
    words = re.sub(r"\s+", " ", re.sub(r"[\"'.!]", "", s)).strip().casefold()
    return r"\emptyset" if _EMPTY.fullmatch(words) else words.removeprefix("the ")


def _all_words(s: str) -> bool:
    return re.fullmatch(r"[A-Za-z' -]{4,}", s) is not None


# -- intervals and inequalities ---------------------------------------------------------------------------------------


Part = tuple[str, str, str, str]  # "[" or "(", lower end, upper end, "]" or ")"


@dataclass(frozen=True)
class Region:
    variable: str | None
    parts: tuple[Part, ...]
    relation: bool  # written with an inequality or a union, not as one pair in brackets


_FROM, _TO = r"-\infty", r"\infty"
_ORDER = re.compile(r"\\leq|\\geq|<|>")


def read_region(s: str) -> Region | None:
    r"""``(1, 2]``, ``x\in[1, 2)\cup(3, \infty)``, ``1<x\leq 2``, ``x<1 or x>2``, ``x\neq 3``, ``\{x|x>2\}``."""
    if s in (r"\mathbb{R}", "all real numbers", "R", "all reals"):
        return Region(None, (("(", _FROM, _TO, ")"),), True)
    builder = re.fullmatch(r"\\\{\s*(.+?)(?:\\in\\mathbb\{R\})?\s*[|:]\s*(.+)\\\}", s)
    if builder:
        return read_region(builder[2])
    if size := re.fullmatch(rf"\|({_SYMBOL})\|(<|>|\\leq|\\geq)(.+)", s):
        name, sign, end = size.groups()
        inside = sign in ("<", r"\leq")
        return read_region(f"-{end}{sign}{name}{sign}{end}" if inside else f"{name}{sign}{end} or -{end}{sign}{name}")
    member = re.match(rf"({_SYMBOL})\\in ?(?=[(\[\\])", s)
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
    if excluded := re.fullmatch(rf"(.*?)(?:, | and |\\land)({_SYMBOL})\\neq ?([^,]*)", body):
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
    if len(s) < 5 or s[0] not in "([" or s[-1] not in ")]" or not _closes_last(s):
        return None
    ends = _split(s[1:-1])
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
        return (name, (("(", _FROM, point, ")"), ("(", point, _TO, ")"))) if re.fullmatch(_SYMBOL, name) else None
    if all(sign in (">", r"\geq") for sign in signs):
        terms, signs = terms[::-1], [{">": "<", r"\geq": r"\leq"}[sign] for sign in signs[::-1]]
    if not all(sign in ("<", r"\leq") for sign in signs) or len(terms) not in (2, 3):
        return None
    if len(terms) == 2:  # an open end
        lower = re.fullmatch(_SYMBOL, terms[0]) and not terms[0].startswith(r"\pi")
        terms, signs = ([_FROM, *terms], ["<", *signs]) if lower else ([*terms, _TO], [*signs, "<"])
    low, name, high = terms
    if not re.fullmatch(_SYMBOL, name):
        return None
    start = "[" if signs[0] == r"\leq" and low != _FROM else "("
    return name, ((start, low, _end(high), "]" if signs[1] == r"\leq" and _end(high) != _TO else ")"),)


def _same_regions(a: Region, b: Region, ask: Ask, tolerance: float | None) -> bool:
    if a.variable and b.variable and a.variable != b.variable:
        return False
    if len(a.parts) != len(b.parts) or len(a.parts) > 20:
        return False

    def same(p: Part, q: Part) -> bool:
        ends = ((p[1], q[1]), (p[2], q[2]))
        return (p[0], p[3]) == (q[0], q[3]) and all(
            x == y or ({x, y}.isdisjoint((_FROM, _TO)) and _equal(x, y, ask, tolerance)) for x, y in ends
        )

    return _matched(list(a.parts), list(b.parts), same)


# -- what SymPy may read ----------------------------------------------------------------------------------------------

_FUNCTIONS = set("sin cos tan cot sec csc log exp sqrt arcsin arccos arctan sinh cosh tanh".split())


def is_expression(s: str) -> bool:
    """Whether all of `s` is mathematics: no words, no numbers side by side. SymPy would read the start and stop."""
    plain = re.sub(r"\\begin\{\w+\}|\\end\{\w+\}|\\[a-zA-Z]+", " ", s)
    if any(w.lower() not in _FUNCTIONS for w in re.findall(r"[A-Za-z]{4,}", plain)):
        return _without_unit(s)[1] is not None
    return not re.search(r"\d\s+\d|\d\.\d+\.|\.\.|\\ldots|!!|[?\"#@:]|\d'|_\{?\d{4}", s) and "\\pmod" not in s


def _without_unit(s: str) -> tuple[str, Unit | None]:
    """An expression and the unit behind it: ``2\\sqrt{3} cm``."""
    m = re.search(r"(?<=[\d})])\s*((?:[A-Za-z]{2,}|(?<=\s)[A-Za-z](?=$|/|\^))(?:[ /^{}\-\dA-Za-z]*))$", s)
    if m is None:
        m = re.search(r"(?<=\\pi)\s+((?:[A-Za-z]{2,})(?:[ /^{}\-\dA-Za-z]*))$", s)
    if m is None or m[1].split("(")[0].lower() in _FUNCTIONS:
        return s, None
    unit = read_unit(m[1])
    return (s[: m.start()].strip(), unit) if unit is not None and m[1] not in ("ab", "xy", "mn", "pq") else (s, None)
