"""The answer of a completion, and when two answers are written alike. Text only; `hsd.verify.math` asks SymPy."""

from __future__ import annotations

import re
from decimal import MAX_EMAX, MAX_PREC, MIN_EMIN, Context, Decimal

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_SAYS = re.compile(r"(?i:answer\s*(?:is|:|=))[\s:]*([^\s:][^\n]*)")
# What is inside holds no second opener: with one, 10,000 tokens of "\(" were read for 15 s under Python's global lock.
_MATH = re.compile(r"(?<!\\)\$\$?((?:\\.|[^$\\])+)\$\$?|\\\(((?:(?!\\[()]).)+)\\\)|\\\[((?:(?!\\[\[\]]).)+)\\\]")
_NUMBER = re.compile(r"([-+]?)\$?(\d{1,3}(?:,\d{3})+|\d*)(\.\d+)?", re.ASCII)

_SPACES = re.compile(r"\\[!,;: ]|~|\\q?quad(?![a-zA-Z])|\\(?:left|right|displaystyle|limits)(?![a-zA-Z])")
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_UNIT = re.compile(
    r"(?<=[\d})])(?:\s*\\(?:text|mathrm|mbox)\s*\{\s*([A-Za-z][A-Za-z .]*)\}|\s+([A-Za-z]{2,}(?: [A-Za-z]+)*))"
    r"(?:\s*\^\s*(?:\d|\{\d\}))?\s*$"
)
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_NO_UNITS = {*_SCALES, "percent", "pi", "or", "and", "base", "mod"}  # words that change the number before them
_WORD = re.compile(r"[A-Za-z]{4,}(?:[ -][A-Za-z]+)*")
_EXACT = Context(prec=MAX_PREC, Emax=MAX_EMAX, Emin=MIN_EMIN)  # the default one rounds products to 28 digits


def extract_answer(text: str) -> str | None:
    """What the completion ends on: the content of its last ``\\boxed{}``, None where that is empty or cut off.
    Without a box: what follows the last ``####``, else the last "answer is", else the last line; of these the last
    ``$...$`` if there is one. None where the text is blank."""
    boxes = list(_BOX.finditer(text))
    if boxes:
        return _braced(text, boxes[-1].end())
    _, mark, tail = text.rpartition("####")
    if not mark:
        said = [m[1] for m in _SAYS.finditer(text)]
        lines = text.strip().splitlines()
        tail = said[-1] if said else lines[-1] if lines else ""
    tail = tail.strip().splitlines()[0].strip() if tail.strip() else ""
    inner = [m for m in _MATH.finditer(tail)]
    found = next((g for g in inner[-1].groups() if g), "") if inner else tail
    return found.strip().strip("*").strip() or None


def is_boxed(text: str) -> bool:
    return _BOX.search(text) is not None


def _braced(text: str, start: int) -> str | None:
    """The content of the braces that open at `start`, or the word there."""
    if text[start : start + 1] != "{":
        word = re.match(r"[^\s${}]+", text[start:])
        return word[0] if word else None
    depth, i = 0, start
    while i < len(text):
        if text[i] == "\\":
            i += 1  # an escaped brace does not count
        elif text[i] == "{":
            depth += 1
        elif text[i] == "}":
            depth -= 1
            if depth == 0:
                return text[start + 1 : i].strip() or None
        i += 1
    return None


def normalized(answer: str) -> str:
    """One spelling for answers that are written differently: spacing, ``\\dfrac``, ``\\text``, units, dollar signs,
    degrees, thousands commas, ``x =`` before and a period after."""
    s = answer.strip().replace("\u2212", "-").replace("\\$", "").strip("$").strip()
    s = re.sub(r"^\\[(\[](.*)\\[)\]]$", r"\1", s, flags=re.DOTALL).strip()
    s = s.rstrip(".").rstrip("$").strip()
    s = _SPACES.sub(" ", s)
    s = re.sub(r"\\[dt]frac(?![a-zA-Z])", r"\\frac", s)
    s = re.sub(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree(?![a-zA-Z])|\u00b0", "", s)
    s = _without_unit(s.strip())
    s = _TEXT.sub(r"\1", s).replace("\\%", "%").replace("$", "")
    s = re.sub(r"^[A-Za-z]\s*(?:=|\\in(?![a-zA-Z]))\s*", "", s)
    s = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", s)
    s = re.sub(r"\\sqrt\s*(\d)", r"\\sqrt{\1}", s)
    s = re.sub(r"^(-?\d+)\s+(\d+)/(\d+)$", r"\1\\frac{\2}{\3}", s)
    s = re.sub(r"\s+", "", s)
    s = re.sub(r"^\(([A-Za-z])\)$", r"\1", s)  # a choice: (A) is A
    number = _NUMBER.fullmatch(s)
    if number and any(c.isdigit() for c in s):
        s = s.replace(",", "").lstrip("+")
    return s


def _without_unit(s: str) -> str:
    unit = _UNIT.search(s)
    return s if unit is None or _word(unit) in _NO_UNITS else s[: unit.start()].strip()


def _word(unit: re.Match[str]) -> str:
    return (unit[1] or unit[2]).strip(" .").split()[0].lower()


def plain_number(answer: str) -> Decimal | None:
    """The value of an answer that is one decimal number, with or without a unit: ``\\$1,234.50`` is 1234.5, 3 million
    is 3000000 (math-verify drops such words)."""
    scale, unit = 1, _UNIT.search(answer.strip().rstrip("."))
    if unit is not None and _word(unit) in _SCALES:
        answer, scale = answer.strip()[: unit.start()], _SCALES[_word(unit)]
    match = _NUMBER.fullmatch(normalized(answer))
    if match is None or not (match[2] or match[3]):
        return None
    return _EXACT.multiply(Decimal(f"{match[1]}{match[2].replace(',', '') or 0}{match[3] or ''}"), scale)


def is_words(answer: str) -> bool:
    """Whether an answer is text (``\\text{Evelyn}``, east), which SymPy would read as a product of letters."""
    inner = _TEXT.fullmatch(answer.strip())
    return inner is not None or _WORD.fullmatch(answer.strip()) is not None


def same_text(a: str, b: str) -> bool:
    left, right = normalized(a), normalized(b)
    return left != "" and (left == right or ((is_words(a) or is_words(b)) and left.casefold() == right.casefold()))
