"""Units behind a number: `read_unit("km/h")`. A word that is no known unit is a base of its own ("apples")."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_CHANGES = {"percent", "pi", "or", "and", "base", "mod", "times", "plus", "minus", "over", "choose",
            "factorial", "sqrt", "root", "to", "not", "divided", "less", "more", "if", "is", "no", "sin", "cos", "tan",
            "log", "ln", "exp", "max", "min", "gcd", "lcm", "x", "y", "z", "i", "e"}  # fmt: skip

_TABLE = """
length m 1: m meter metre
length m 1000: km kilometer kilometre
length m 1/10: dm decimeter decimetre
length m 1/100: cm centimeter centimetre
length m 1/1000: mm millimeter millimetre
length m 1/1000000: \u03bcm um micrometer micrometre micron
length m 1/1000000000: nm nanometer nanometre
length m 127/5000: inch in inches
length m 381/1250: ft foot feet
length m 1143/1250: yd yard
length m 201168/125: mi mile
mass g 1: g gram
mass g 1000: kg kilogram
mass g 1/1000: mg milligram
time s 1: s sec second secs
time s 1/1000: ms millisecond
time s 60: min minute mins
time s 3600: h hr hour hrs
time s 86400: day
time s 604800: week
money usd 1: dollar usd buck
money usd 1/100: cent
money euro 1: euro EUR
angle deg 1: degree deg
volume l 1: l liter litre
volume l 1/1000: ml milliliter millilitre
force n 1: N newton
energy j 1: J joule
energy j 1000: kJ kilojoule
power w 1: W watt
power w 1000: kW kilowatt
frequency hz 1: Hz hertz
frequency hz 1000: kHz
frequency hz 1000000: MHz
pressure pa 1: Pa pascal
current amp 1: A ampere amp
voltage v 1: V volt
temperature k 1: K kelvin
amount mol 1: mol mole
parsec pc 1: pc parsec
charge c 1: C coulomb
energy ev 1: eV
brightness lum 1: Lsun
"""
UNITS: dict[str, tuple[str, Fraction]] = {}
for _line in _TABLE.strip().splitlines():
    _head, _, _names = _line.partition(": ")
    _, _base, _factor = _head.split()
    for _name in _names.split():
        UNITS[_name] = (_base, Fraction(_factor))
        if len(_name) > 2 and _name.islower():
            UNITS[f"{_name}s"] = UNITS[_name]
_COMPOUND = {"mph": "mile/hour", "kph": "km/hour", "kmph": "km/hour", "cc": "cm^3", "erg": "erg"}
_TOKEN = re.compile(
    r"\s*(?:(/|\bper\b)|(\*|\\cdot|\\times)|(\()|(\))|(square|sq|cubic)\b\.?|(squared|cubed)\b|([A-Za-z\u03bc]+)|(?:\^\{?(-?\d+)\}?)|(\.))"
)


@dataclass(frozen=True)
class Unit:
    factor: Fraction
    powers: tuple[tuple[str, int], ...]  # of base units and unknown words, sorted

    def same(self, other: Unit) -> bool:
        """Whether both measure the same: the same powers, or words that include the other's (red apples)."""
        if self.powers == other.powers:
            return True
        known = {base for base, _ in UNITS.values()}
        mine, theirs = set(self.powers), set(other.powers)
        return (mine <= theirs or theirs <= mine) and not any(base in known for base, _ in mine ^ theirs)


def read_unit(text: str) -> Unit | None:
    """None where the text is no unit: signs, too many words, or words that change the number before it."""
    text = re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"\1/(\2)", text.strip().rstrip("."))
    text = re.sub(r"\bdegrees? ?([CF])\b", lambda m: f"degrees {'celsius' if m[1] == 'C' else 'fahrenheit'}", text)
    factor, powers = Fraction(1), {}
    sign, power, position, last, inside, words = 1, 1, 0, "", False, 0
    while position < len(text):
        m = _TOKEN.match(text, position)
        if m is None or m.end() == position:
            return None
        position = m.end()
        over, dot, opened, closed, shape, raised, word, exponent, period = m.groups()
        if over:
            sign = -1
        elif opened:
            inside = True
        elif closed:
            sign, inside = (1 if inside else sign), False
        elif shape:
            power = 3 if shape == "cubic" else 2
        elif word:
            if (word.lower() in _CHANGES and word not in UNITS) or word.lower() in SCALES:
                return None
            words += 1
            if word in _COMPOUND:
                inner = read_unit(_COMPOUND[word]) if _COMPOUND[word] != word else None
                if inner:
                    factor *= inner.factor
                    for base, p in inner.powers:
                        powers[base] = powers.get(base, 0) + p
                    continue
            base, one = UNITS.get(word) or UNITS.get(word.lower()) or (re.sub(r"s$", "", word.lower()), Fraction(1))
            powers[base] = powers.get(base, 0) + sign * power
            factor *= one ** (sign * power)
            last, size, shift = base, one, sign
            power = 1
            if not inside:
                sign = 1
        elif exponent or raised:
            if not last:
                return None
            extra = int(exponent or (3 if raised == "cubed" else 2)) - 1
            powers[last] += shift * extra
            factor *= size ** (shift * extra)
        elif not (dot or period):
            return None
    if not powers or words > 5:
        return None
    return Unit(factor, tuple(sorted((b, p) for b, p in powers.items() if p)))
