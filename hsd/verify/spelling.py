"""One spelling for answers: `normalized`. Everything that compares answers as text uses it."""

from __future__ import annotations

import re
import unicodedata

_SUPER = str.maketrans(
    "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207a\u207b\u207f\u2071", "0123456789+-ni"
)
_SUB = str.maketrans("\u2080\u2081\u2082\u2083\u2084\u2085\u2086\u2087\u2088\u2089\u208a\u208b\u2099", "0123456789+-n")
_SUPER_RUN = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207a\u207b\u207f\u2071]+")
_SUB_RUN = re.compile("[\u2080-\u2089\u208a\u208b\u2099]+")
_ROOT = re.compile(
    r"([\u221a\u221b\u221c])\s*(\((?:[^()]|\([^()]*\))*\)|\{[^{}]*\}|\d+(?:\.\d+)?|[A-Za-z\u0370-\u03ff])"
)
_SYMBOLS = {
    "\u2212": "-", "\u2013": "-", "\u2014": "-", "\u2010": "-", "\u2011": "-", "\ufe63": "-", "\u00d7": r"\times ",
    "\u22c5": r"\cdot ", "\u00b7": r"\cdot ", "\u2217": "*", "\u00f7": "/", "\u2044": "/", "\u2215": "/",
    "\u2264": r"\leq ", "\u2265": r"\geq ", "\u2a7d": r"\leq ", "\u2a7e": r"\geq ", "\u2260": r"\neq ",
    "\u00b1": r"\pm ", "\u222a": r"\cup ", "\u2229": r"\cap ", "\u2208": r"\in ", "\u2205": r"\emptyset ",
    "\u00f8": r"\emptyset ", "\u221e": r"\infty ", "\u00b0": r"^\circ ", "\u2248": r"\approx ", "\u2243": r"\approx ",
    "\u3002": ".", "\uff0c": ", ", "\u3001": ", ", "\uff1a": ": ", "\u03c0": r"\pi ", "\u03b1": r"\alpha ",
    "\u03b2": r"\beta ", "\u03b3": r"\gamma ", "\u03b4": r"\delta ", "\u03b8": r"\theta ", "\u03bb": r"\lambda ",
    "\u03bc": r"\mu ", "\u03c3": r"\sigma ", "\u03c6": r"\phi ", "\u03d5": r"\phi ", "\u03c9": r"\omega ",
    "\u03c1": r"\rho ", "\u03c4": r"\tau ", "\u03b5": r"\epsilon ", "\u0394": r"\Delta ", "\u03a9": r"\Omega ",
    "\u03a3": r"\Sigma ", "\u211d": r"\mathbb{R}", "\u2124": r"\mathbb{Z}", "\u2115": r"\mathbb{N}",
    "\u211a": r"\mathbb{Q}", "\u2102": r"\mathbb{C}", "\u2032": "'", "\u2018": "'", "\u2019": "'", "\u201c": '"',
    "\u201d": '"', "\u2026": r"\ldots ", "\u22ef": r"\ldots ", "\u2223": "|", "\u2216": r"\setminus ",
    "\u27e8": r"\langle ", "\u27e9": r"\rangle ", "\u2192": r"\to ", "\u00a0": "~", "\u2009": "\\,", "\u202f": "\\,",
    "\u20ac": r"\euro ", "\u00a3": r"\pound ", "\u00a5": r"\yen ", "\u20b9": r"\rupee ", "\u00a2": " cents",
}  # fmt: skip
_SYMBOL = re.compile("|".join(map(re.escape, _SYMBOLS)))


def ascii_math(s: str) -> str:
    """Mathematical Unicode as LaTeX: x², √5, ½, 0.3̅, ≤, full-width digits."""
    if s.isascii():
        return s
    s = _SUPER_RUN.sub(lambda m: f"^{{{m[0].translate(_SUPER)}}}", s)
    s = _SUB_RUN.sub(lambda m: f"_{{{m[0].translate(_SUB)}}}", s)
    s = re.sub(r"((?:\d\u0305)+)", lambda m: rf"\overline{{{m[1].replace(chr(0x305), '')}}}", s)
    s = re.sub(r"((?:\d\u0307)+)", lambda m: rf"\overline{{{m[1].replace(chr(0x307), '')}}}", s)
    s = "".join(_vulgar(c) for c in s if unicodedata.category(c) != "Cf")
    s = _SYMBOL.sub(lambda m: _SYMBOLS[m[0]], s)
    s = unicodedata.normalize("NFKC", s)
    for _ in range(3):  # a root inside a root
        s = _ROOT.sub(
            lambda m: {"\u221a": r"\sqrt", "\u221b": r"\sqrt[3]", "\u221c": r"\sqrt[4]"}[m[1]] + _group(m[2]), s
        )
    return _SYMBOL.sub(lambda m: _SYMBOLS[m[0]], s)


def _group(inner: str) -> str:
    return "{" + (inner[1:-1] if inner[0] in "({" else inner) + "}"


def _vulgar(c: str) -> str:
    if unicodedata.category(c) != "No" or "\u2044" not in (plain := unicodedata.normalize("NFKC", c)):
        return c
    top, _, bottom = plain.partition("\u2044")
    return rf"\frac{{{top}}}{{{bottom}}}" if bottom else c


_SPACES = re.compile(r"(?<!\\)\\[;: ]|~|\\q?quad(?![a-zA-Z])|\\hspace\*?\{[^{}]*\}")
_NOTHING = re.compile(
    r"\\(?:left|right|displaystyle|textstyle|limits|bigl?|bigr|Bigl?|Bigr|rm|bf|it|large|Large|LARGE|huge|Huge|small)(?![a-zA-Z])|\\(?:text)?color\s*\{[^{}]*\}|\\!|\\phantom\{[^{}]*\}"
)
_TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|textsf|mathrm|mathbf|mathit|mbox|hbox|underline|operatorname|unit|bm|boldsymbol)\*?\s*\{((?:[^{}]|\{[^{}]*\})*+)\}"
)
_SAME = {
    r"\\[dtc]frac(?![a-zA-Z])": r"\\frac", r"\\(?:varnothing|empty)(?![a-zA-Z])|\\\{\s*\\\}|\{\s*\}$": r"\\emptyset ",
    r"\\(?:leqslant|le)(?![a-zA-Z])|<=": r"\\leq ", r"\\(?:geqslant|ge)(?![a-zA-Z])|>=": r"\\geq ",
    r"\\(?:ne)(?![a-zA-Z])|!=": r"\\neq ", r"\\lt(?![a-zA-Z])": "<", r"\\gt(?![a-zA-Z])": ">",
    r"\\(?:infin|inf)(?![a-zA-Z])": r"\\infty ", r"\\lbrace(?![a-zA-Z])": r"\\{", r"\\rbrace(?![a-zA-Z])": r"\\}",
    r"\\(?:dots|cdots|dotsc|dotso)(?![a-zA-Z])|\.\.\.": r"\\ldots ", r"\\(?:approx|simeq|doteq)(?![a-zA-Z])": "=",
    r"\\(?:mid|vert)(?![a-zA-Z])": "|", r"\\colon(?![a-zA-Z])": ":", r"\\(?:ast)(?![a-zA-Z])": "*",
    r"\\div(?![a-zA-Z])": "/", r"\\R(?![a-zA-Z])": r"\\mathbb{R}", r"\\dot\{(\d)\}": r"\\overline{\1}",
    r"\\bar\{(\d+)\}": r"\\overline{\1}", r"(\d\.\d*)\((\d+)\)(?!\w)": r"\1\\overline{\2}", r"\\%": "%",
    r"(?<=\d)\s*(?:percent|per cent)(?![a-zA-Z])": "%",
    r"\^\s*(?:\\circ(?![a-zA-Z])|\{\s*\\circ\s*\})|\\degree(?![a-zA-Z])|\\textdegree": " degrees ",
}  # fmt: skip
_SPELLINGS = [(re.compile(pattern), other) for pattern, other in _SAME.items()]
_BARE = re.compile(
    r"(?<![a-zA-Z\\])(?:(sin|cos|tan|cot|csc|ln|log|arcsin|arccos|arctan|sinh|cosh|tanh|pi|sqrt)|(infinity))(?![a-zA-Z])"
)
_CURRENCY = r"dollar|euro|pound|yen|rupee"
_CODES = {"USD": "dollar", "EUR": "euro", "GBP": "pound", "JPY": "yen", "INR": "rupee", "Rs": "rupee", "US": "dollar"}
_CODE = re.compile(rf"(?<![a-zA-Z])({'|'.join(_CODES)}(?=\s*\\dollar))\.?\s*(?:\\dollar\s*)?(?=\.?\d)")
_SCALE = "hundred|thousand|million|billion|trillion"
_AMOUNT = re.compile(
    rf"([-+]?)\s*\\({_CURRENCY})\s*([-+]?)\s*((?:\d|,(?=\d{{3}}))*\.?\d+(?:\s*(?:{_SCALE})\b)?)(?:\s*(?:{_CURRENCY})s?|\s*USD)?"
)
_THOUSANDS = re.compile(r"(?<![\d,.\w])(-?\d{1,3})((?:,\d{3})+)(?![\d,])")
_BRACKETS = re.compile(r"[()\[\]{}]")


def normalized(answer: str) -> str:
    """One spelling for answers that are written differently: Unicode, spaces, ``\\dfrac``, ``\\text``, dollar signs,
    degrees, percent, thousands commas, a period after. A comma that separates is followed by a space, and only that."""
    s = ascii_math(answer.strip()).replace("{:}", ":")
    s = re.sub(r"^(['\"])(.*)\1$", r"\2", s)
    s = re.sub(r"(?<=\d)\s*(?:\{,\}|,\s*\\!)\s*(?=\d{3}(?!\d))", ",", s).replace("{,}", ",")
    s = re.sub(r"(?<=\d)(?:\\,|\\!|~)(?=\d{3}(?!\d))|\\!", "", s).replace("\\,", " ")
    s = re.sub(r"^\\[(\[](.*)\\[)\]]$", r"\1", s, flags=re.DOTALL)
    s = re.sub(r"\\\$\s*(-?)(?=\.?\d)|(?<![\d}])\$(?=\.?\d)(?!.*\$)", r"\\dollar \1", s)
    s = s.replace("\\$", "").replace("$", " ")
    s = _NOTHING.sub("", s)
    s = _SPACES.sub(" ", s)
    s = _TEXT.sub(r" \1 ", s)
    s = re.sub(r"(?<=[\w)])\s*\*\*\s*(?=[\w({-])", "^", s)
    s = re.sub(r"(?<=\d)\s*:\s*(?=\d)", ":", s)
    s = re.sub(r"(?<=\d)\s*(?:\^\s*\{?\s*)?(?:st|nd|rd|th)\s*\}?\s*\.?$", "", s)
    s = re.sub(r"\\\\\s*\[[\d.]+\s*[a-z]{2}\]", r"\\\\", s)
    s = re.sub(r"\\dot\s*(\d)", r"\\dot{\1}", s)
    s = re.sub(r"\\dot\{(\d)\}(\d*)\\dot\{(\d)\}", r"\\overline{\1\2\3}", s)
    s = re.sub(r"(?<=\d)\s*([apAP])\.?\s?[mM]\b\.?\s*$", lambda m: f" {m[1].lower()}m", s) if ":" in s else s
    for pattern, other in _SPELLINGS:
        s = pattern.sub(other, s)
    s = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", s)
    s = re.sub(r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{", s)
    s = re.sub(r"(\\frac\s*\{[^{}]*\})\s*(\d)", r"\1{\2}", s)
    s = re.sub(r"\\log\s*_\s*(\d)", r"\\log_{\1}", s)
    s = re.sub(r"\\sqrt\s*([\da-zA-Z])", r"\\sqrt{\1}", s)
    s = _CODE.sub(lambda m: rf"\{_CODES[m[1][:3]]} ", s)
    s = _AMOUNT.sub(r"\1\3\4 \2s", s)
    s = re.sub(rf"\\({_CURRENCY})", r" \1s", s.replace(r"\dollar", ""))
    s = re.sub(r"^\s*(?:\\sim|approximately|approx\.?|about|roughly|around)(?![a-zA-Z])", "", s)
    s = _BARE.sub(lambda m: rf"\{m[1] or 'infty'} ", s)
    s = re.sub(r"\\sqrt\s*\(((?:[^()]|\([^()]*\))*)\)", r"\\sqrt{\1}", s)
    s = re.sub(r"\{([^{}]*)\\over(?![a-zA-Z])([^{}]*)\}", r"\\frac{\1}{\2}", s)
    s = s.strip().rstrip(".;,").strip()
    s = re.sub(r"(?<=\d) (?=\d{3}(?!\d))", "", s) if re.fullmatch(r"[-+]?\d{1,3}(?: \d{3})+(?:\.\d+)?", s) else s
    s = "".join(_unthousand(part) if depth == 0 else part for depth, part in _by_depth(s))
    s = re.sub(r"\s*,\s*", ", ", s)
    s = re.sub(r"\s*([-+*/^_=<>(){\[|&])\s*|\s*([}\])])(?:\s+(?![a-zA-Z]))?", r"\1\2", s)
    s = re.sub(r"(\\[a-zA-Z]+)\s+(?=[^a-zA-Z])|\s+(?=\\)", lambda m: m[1] or "", s)
    s = re.sub(r"\s*(?<![a-zA-Z\\])(and|or)(?![a-zA-Z])\s*", r" \1 ", s)
    s = re.sub(r"\s+", " ", s).strip()
    s = s[1:-1].strip() if re.fullmatch(r"\{(?:[^{}\\]|\\(?!choose|over|atop)|\{[^{}]*\})*\}", s) else s
    return re.sub(r"^\((\w)\)$|^\((\w+)\)(?=_)", r"\1\2", s)  # a choice: (A) is A; (12)_5 is 12_5


def _unthousand(part: str) -> str:
    return _THOUSANDS.sub(lambda m: m[1] + m[2].replace(",", ""), part)


def _by_depth(s: str) -> list[tuple[int, str]]:
    """The text in pieces, each with the number of brackets around it. LaTeX groups count as brackets."""
    parts, depth, start = [], 0, 0
    for m in _BRACKETS.finditer(s):
        parts.append((depth, s[start : m.start()]))
        depth = depth + 1 if m[0] in "([{" else max(0, depth - 1)
        parts.append((1, m[0]))
        start = m.end()
    return [*parts, (depth, s[start:])]


def is_words(answer: str) -> bool:
    """Whether an answer is text (``\\text{Evelyn}``, east), which SymPy would read as a product of letters."""
    inner = _TEXT.fullmatch(answer.strip())
    if inner is not None and re.search(r"[A-Za-z]{2}|^[A-Za-z]$", inner[1].strip()) and not re.search(r"\d", inner[1]):
        return True
    return re.fullmatch(r"[A-Za-z]{4,}(?:[ '-][A-Za-z]+)*", answer.strip().rstrip(".")) is not None


def same_text(a: str, b: str) -> bool:
    """The same spelling; for words without regard to case."""
    left, right = normalized(a), normalized(b)
    return left != "" and (left == right or ((is_words(a) or is_words(b)) and left.casefold() == right.casefold()))
