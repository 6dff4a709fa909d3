"""What a text looks like: without case, invisible characters and accents, and with look-alikes as one character."""

from __future__ import annotations

import re
import unicodedata
from functools import cache

# Characters without a glyph outside the category Cf: joiners, fillers, variation selectors, the blank Braille pattern.
_INVISIBLE = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\ufe00-\ufe0f\U000e0100-\U000e01ef]")
_ACCENT = re.compile("(?<=[a-z])[\u0300-\u036f]+")  # on a letter; over a digit it is a repeating decimal


def skeleton(text: str) -> str:
    """NFKC and case folding; without control and format characters (Cc, Cf) and accents of Latin letters; with digits
    of every script, dashes and the characters that Unicode lists as confusable with an ASCII character as that one."""
    text = unicodedata.normalize("NFKC", text).casefold()
    if text.isascii() and text.isprintable():
        return text
    shown = (c for c in _INVISIBLE.sub("", text) if c.isspace() or unicodedata.category(c) not in ("Cc", "Cf"))
    return _ACCENT.sub("", unicodedata.normalize("NFD", "".join(map(_folded, shown))))


@cache
def _folded(c: str) -> str:
    if c.isascii():
        return c
    if (digit := unicodedata.decimal(c, None)) is not None:
        return str(digit)
    if unicodedata.category(c) == "Pd":
        return "-"
    from confusable_homoglyphs.confusables import confusables_data

    # A letter has the look of its capital too: the text's own case is gone.
    alike = [other["c"] for form in (c, c.upper()) for other in confusables_data.get(form, ())]
    return next((other.casefold() for other in alike if len(other) == 1 and other.isascii()), c)
