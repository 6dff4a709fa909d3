"""Exact numbers of answers: decimals, fractions, mixed numbers, scientific notation, percent signs, units."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from decimal import Context, Decimal, InvalidOperation
from fractions import Fraction

from hsd.verify.spelling import normalized
from hsd.verify.units import SCALES, Unit, read_unit

CLOSE = Fraction(1, 10**6)  # the relative difference under which a decimal stands for a fraction or a root
DIGITS = 6  # that it must have: 0.333333, but 0.000001 stands for no 1/1000001
MAX_EXPONENT = 5000
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
    return parse_number(normalized(answer))


def plain_number(answer: str) -> Fraction | None:
    """The value of an answer that is one number, None with a percent sign: ``\\$1,234.50`` is 1234.5."""
    number = read_number(answer)
    return None if number is None or number.percent else number.value


def parse_number(s: str) -> Number | None:
    if s.startswith(("(", "-(")) and s.endswith(")") and re.fullmatch(r"-?\([^()]*\)", s):
        inner = parse_number(s.lstrip("-")[1:-1])
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
        return parse_number(f"{lead}\\overline{{{cycle[1] or cycle[2]}}}") if lead else None
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


def as_latex(number: Number) -> str:
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
