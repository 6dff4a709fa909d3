"""When two answers are equal: exact numbers, letters, lists, intervals; SymPy is asked for what is left.

`equal(gold, answer, ask)` takes answers as `hsd.verify.answers.extract_answer` gives them. `ask(gold, answer)` decides
about two expressions; it is called only where no exact reading does.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from hsd.verify.lists import Items, expanded, matched, read_items, split
from hsd.verify.quantities import as_latex, parse_number, same_number
from hsd.verify.regions import SYMBOL, read_region, same_regions
from hsd.verify.spelling import is_words, normalized
from hsd.verify.units import Unit, read_unit

MAX_ITEMS = 60
Ask = Callable[[str, str], bool]


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
    first, *others = split(answer, words=True) or [answer]
    one = parse_number(first) if others else None
    return first if one and all((n := parse_number(other)) and same_number(one, n) for other in others) else answer


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
_ASSIGNED = re.compile(
    rf"(?P<name>{SYMBOL}|{SYMBOL}\({SYMBOL}(?:, {SYMBOL})*\)|\({SYMBOL}(?:, {SYMBOL})+\)"
    r"|[A-Z]{2,3}|P\([^=]*\)|\\angle ?[A-Z]+|[A-Za-z][a-z]+(?: [a-z]+)*)(?:=|\\in(?=\\\{))"
)


def _equal(a: str, b: str, ask: Ask, tolerance: float | None) -> bool:
    if a == b:
        return True
    regions = read_region(a), read_region(b)
    if regions[0] and regions[1] and (regions[0].relation or regions[1].relation):
        return same_regions(regions[0], regions[1], lambda x, y: _equal(x, y, ask, tolerance))
    lists = [items if items and items.brackets == "" else None for items in (read_items(a), read_items(b))]
    if lists[0] and lists[1]:
        return _same_items(lists[0], lists[1], ask, tolerance)
    names = [None if listed else _ASSIGNED.match(s) for listed, s in zip(lists, (a, b), strict=True)]
    if names[0] or names[1]:
        left, right = (m["name"] if m else None for m in names)
        if left and right and left != right and all(re.fullmatch(SYMBOL, n) for n in (left, right)):
            return False  # x = 3 for y = 3
        one = _assigned(a) if left else a
        two = _assigned(b) if right else b
        if (names[0] or names[1]) and (left or "=" not in a) and (right or "=" not in b):
            return _equal(one, two, ask, tolerance)
    elif "=" in b and "=" not in a and not _relational(b) and not lists[1]:
        return _equal(a, b.rpartition("=")[2], ask, tolerance)  # 3 + 4 = 7
    numbers = (parse_number(a), parse_number(b))
    if numbers[0] and numbers[1]:
        return same_number(numbers[0], numbers[1], tolerance)
    structures = read_items(a), read_items(b)
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
    left, right = (as_latex(n) if n and not n.percent else s for n, (s, _) in zip(numbers, (one, two), strict=True))
    if one[1] and two[1] and (times := two[1].factor / one[1].factor) != 1:
        right = rf"({right})\cdot\frac{{{times.numerator}}}{{{times.denominator}}}"
    return ask(left, right)


def _relational(s: str) -> bool:
    return any(m[0] != "=" for m in _RELATION.finditer(s))


def _assigned(s: str) -> str:
    name = _ASSIGNED.match(s)
    return s[name.end() if name else 0 :].rpartition("=")[2].strip()


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
    return matched(expanded(a.items), expanded(b.items), lambda x, y: _equal(x, y, ask, tolerance))


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
