r"""The answer of a completion, as text; `hsd.verify.values` compares it.

The order in which a completion is read, the first that is there:

1. the final part: what follows the last closed thought; a thought that is still open has no answer
2. the last ``<answer>`` tag, closed
3. the last ``\boxed{}``, closed; all boxes of its line where only "and", "or", "," or ``x =`` stand between them
4. what follows the last ``####``
5. what follows the last "answer is"
6. the last line

Of a line (4 to 6): its formulas, if it has some; else what follows "is", "are", "=" or ":"; of that one number.
"""

from __future__ import annotations

import re

from hsd.verify.quantities import read_number, same_number
from hsd.verify.spelling import ascii_math
from hsd.verify.units import SCALES, UNITS

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_NAMES = r"(?:think|thinking|thought|thoughts|reasoning|analysis)"
_THOUGHT_ENDS = re.compile(
    rf"(?i:</{_NAMES}>|\[/think\]|<\|end_of_thought\|>|\u25c1/think\u25b7|<\|channel\|>final<\|message\|>|assistantfinal)"
)
_THOUGHT_STARTS = re.compile(
    rf"(?i:<{_NAMES}>|\[think\]|<\|begin_of_thought\|>|\u25c1think\u25b7|<\|channel\|>analysis)|\A\s*analysis(?=[A-Z])"
)
_SPECIAL = re.compile(r"(?:(?:<\|[a-z_]{1,20}\|>|</s>|<eos>|<end_of_turn>)\s?)++\Z")
_SAYS = re.compile(
    r"(?i:\banswers?\b(?:(?:(?!not\b|n't)[^.\n:=$\\]){0,60}?\b(?:is|are|be|equals|becomes)\b|\W{0,6}?[:=]))[\s:*_]*([^\s:][^\n]*)"
)
# What is inside holds no second opener: with one, the time of a run of "\(" is quadratic, under Python's global lock.
_MATH = re.compile(
    r"(?<!\\)\$\$((?:\\.|[^$\\])++)\$\$|(?<!\\)\$((?:\\.|[^$\\\n])++)\$(?!\d)|\\\(((?:(?!\\[()]).)++)\\\)|\\\[((?:(?!\\[\[\]]).)++)\\\]",
    re.DOTALL,
)
_BETWEEN = re.compile(
    r"(?:[\s,;:.$()\[\]*\\!&]|\b(?:and|or|x|y|z|n|a|b)\b|[a-z]?_\{?\w\}?|=|\\(?:text|quad|qquad)\b|\{|\})*"
)
_COPULA = re.compile(
    r"(?i:\b(?:is|are|was|were|be|equals?|gives?|yields?|becomes?|get|obtain)\b(?!\s+not\b))|[=\u2248\u2192]|:(?=\s)"
)
_FILLER = re.compile(
    r"(?i:\s*(?:equal|to|about|approximately|roughly|around|exactly|precisely|simply|just|only|now|thus|therefore|then|at|the|a"
    r"|an|value|number|point|interval|set|total|of|given|by|option|choice|that|we|have|also|still|indeed|it|us|me)\b[\s:,]*)+"
)
# A sign counts only where no operand stands before it ("7-5" ends in 5).
SIGNED = (
    r"(?:(?<![\w)\]}%$])[-+]\s?(?=\$?\.?\d))?(?:(?:\\?\$|\\(?:euro|pound|yen|rupee) ?)-?)?"
    r"(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+|(?=\.\d))(?:\.\d+)?"
)
_IN_SENTENCE = re.compile(
    rf"(?<![\w^\\{{_.])(?<![A-Za-z]-)(?<!\d,)(?<!\d/)(?<!\d:)({SIGNED}(?:[eE][-+]?\d+|\s*(?:x|\*|\\times|\\cdot)\s*10\s*\^\s*(?:-?\d+|\{{-?\d+\}})"
    rf"|\s+\d+/\d+|\s*\\frac\{{\d+\}}\{{\d+\}}|/\d+(?:,\d{{3}})*|:\d\d)?)(?:\s*(\\?%)|([a-zA-Z]+))?(?!\w|/|\^(?!\\circ))",
    re.ASCII,
)
_CONTINUES = re.compile(r"[\s,]*(?:(?:or|and|to|through|until)\b.*\d|/|[-+*^=<>]|\\(?!text)|,\s*-?\d)", re.DOTALL)


def extract_answer(text: str) -> str | None:
    """What the completion ends on, read in the order above. None where there is nothing, or where it is cut off."""
    part = final_part(text)
    if part is None or not part.strip():
        return None
    part = re.sub(r"<<[^<>\n]*>>", "", ascii_math(part))  # GSM8K's calculator
    if is_boxed(part):
        return _last_boxes(part)
    part = _MATH.sub(lambda m: re.sub(r"\s*\n\s*", " ", m[0]), part)  # display math on lines of its own
    _, mark, tail = part.rpartition("####")
    if not mark:
        said = [m[1] for m in _SAYS.finditer(part)]
        lines = [line for line in part.splitlines() if re.search(r"\w|\\\S", line)]
        tail = said[-1] if said else lines[-1] if lines else ""
    lines = tail.strip().splitlines()
    answer = _of_line(lines[0]) if lines else None
    return answer if answer and re.search(r"\w|\\\S", answer) else None


def final_part(text: str) -> str | None:
    """What follows the last closed thought, or stands in the last ``<answer>``; None if that is cut off."""
    ends = list(_THOUGHT_ENDS.finditer(text))
    part = text[ends[-1].end() :] if ends else text
    if special := _SPECIAL.search(part.rstrip()):
        part = part[: special.start()]
    if _THOUGHT_STARTS.search(part):
        return None
    lower = part.lower()
    close, last = lower.rfind("</answer>"), lower.rfind("<answer>")
    if last < 0:
        return part
    if last > close:
        return None
    return part[last + len("<answer>") : close]


def is_boxed(text: str) -> bool:
    return _BOX.search(text) is not None


def _last_boxes(text: str) -> str | None:
    *earlier, last = _BOX.finditer(text)
    end, content = _braced(text, last.end(), len(text))
    if content is None:
        return None
    content = re.sub(r"^\\text\s*\{[^{}]*\b(?:is|are|[=:])\s*\}", "", content).strip()
    found, start = [content], last.start()
    for box in reversed(earlier):
        after, other = _braced(text, box.end(), start)
        between = text[after:start].replace("\\ ", " ")
        if other is None or "\n" in between or not _BETWEEN.fullmatch(between):
            break
        found.insert(0, other)
        start = box.start()
    different = list(dict.fromkeys(found))
    scale = re.match(r"[\s$]*(\\?%|[a-z]+\b)", text[end:])
    if len(different) == 1 and scale and (scale[1] in SCALES or "%" in scale[1]):
        return f"{content} {scale[1]}"
    return ", ".join(different)


def _braced(text: str, start: int, stop: int) -> tuple[int, str | None]:
    """Where the braces that open at `start` end, before `stop`, and their content; or the word there."""
    if text[start : start + 1] != "{":
        word = re.match(r"[^\s${}]+", text[start:stop])
        return (start + word.end(), word[0]) if word else (start, None)
    depth, i = 0, start
    while i < stop:
        if text[i] == "\\":
            i += 1  # an escaped brace does not count
        elif text[i] == "{":
            depth += 1
        elif text[i] == "}":
            depth -= 1
            if depth == 0:
                return i + 1, text[start + 1 : i].strip() or None
        i += 1
    return i, None


_POWER = r"(?:\s*\^\s*\{?-?\d\}?)?"
_UNIT_WORDS = rf"[A-Za-z]+\b{_POWER}(?:(?:/| per )[A-Za-z]+{_POWER})?(?: squared| cubed)?"
_WORDS = re.compile(r"[A-Za-z]+")
_MARKUP = re.compile(r"^(?:#{1,6}\s+|[-\u2022]\s+(?=[A-Za-z*])|\d{1,2}[.)]\s+(?=[A-Za-z*$]))")
_ROUNDED = re.compile(r"[\s,]*\b(?:or|which is)\s+(?:approximately|about|roughly)\s+(?=[$\d.])")


def _of_line(line: str) -> str | None:
    line = re.sub(r"\*\*|__|`", "", _MARKUP.sub("", line.strip())).strip("* ")
    line = re.sub(r"\s*\(or ([^()]+)\)", r" or \1", line)
    line = _ROUNDED.sub(r" \\approx ", line)
    formulas = [m for m in _MATH.finditer(line) if not _wordy(_inner(m))]
    if formulas:
        *earlier, last = formulas
        after = line[last.end() :]
        found, start = [_inner(last)], last.start()
        if earlier and line[earlier[-1].end() : start].strip() == r"\approx":
            return f"{_inner(earlier[-1])} \\approx {_inner(last)}"
        for m in reversed(earlier):
            if not _BETWEEN.fullmatch(line[m.end() : start]):
                break
            found.insert(0, _inner(m))
            start = m.start()
        joined = ", ".join(dict.fromkeys(found))
        unit = re.match(rf"\s*(\\?%|{_UNIT_WORDS})", after)
        number = _numbers(after)
        if re.match(r"[\s,(]*(?:or|and|maybe|perhaps)\b", after) and number:
            one, two = read_number(joined), read_number(number[-1])
            return joined if one and two and same_number(one, two) else line  # or two guesses
        if unit and ("%" in unit[1] or unit[1] in SCALES or _WORDS.findall(unit[1])[0] in UNITS):
            return f"{joined} {unit[1]}"
        negated = re.search(r"\bnot\s*$", line[: formulas[0].start()]) is not None
        return line if negated else number[-1] if number and "$" not in after else joined or None
    return _of_sentence(re.sub(r"(?<!\.)\.\s*$|(?<=[a-z]{2})!+\s*$", "", line))


def _inner(formula: re.Match[str]) -> str:
    return next((g for g in formula.groups() if g), "").strip()


def _wordy(text: str) -> bool:
    """Whether there are words in it that are no names of mathematics."""
    if re.search("[^\\W\\d_a-zA-Z\u0370-\u03ff]", text):
        return True
    plain = re.sub(r"\\(?:text|mathrm|textbf|mbox|operatorname|begin|end)\s*\{[^{}]*\}|\\[a-zA-Z]+", " ", text)
    words = re.findall(r"[A-Za-z]{2,}", plain)
    return any(w.lower() not in _MATH_WORDS and (len(w) > 3 or w.lower() in _SMALL_WORDS) for w in words)


_CHOSEN = re.compile(
    r"(?i:answer|choice|option)\b[^.]{0,20}?\bis\s+(?:option\s+)?\(?([A-J])\)?(?![\w'])(?!\s*[-=+*/^<>])(?! or)"
    r"|(?i:option|choice)\s+\(?([A-J])\)?\s+is\s+(?:the\s+)?(?:correct|right)\b"
)
_NO_ANSWER = re.compile(
    r"(?i:\bnot|n't|than)\s+$|\u2260\s*$|\\neq\s*$"
    r"|(?i:figure|step|case|problem|question|chapter|section|table|example|equation|page)\s+$"
)
_SPAN = re.compile(r"(?i:\b(?:after|in|within|every|for|over|during)\s+(?:the\s+)?$)")
_WORD = re.compile(r"\s+([a-z]+)\b")
_TIME = re.compile(r"\s*(?:more |full )?(?:second|minute|hour|day|week|month|year)s?\b")

_MATH_WORDS = set("sin cos tan log ln exp sqrt max min mod gcd lcm pi or and sinh cosh tanh frac".split())
_SMALL_WORDS = set("so is it we to of in the for has are not but no as at by be he she per all day".split())


def _of_sentence(line: str) -> str | None:
    said = re.match(r"(?i:\(?\s*([A-J])\s*[).:]\s)", line)
    if not _wordy(line) or said:
        return line.strip() or None
    if chosen := _CHOSEN.search(line):
        return chosen[1] or chosen[2]
    rest = line
    end = len(line.rstrip())
    copulas = [m for m in _COPULA.finditer(line) if m.end() < end]
    if copulas:
        rest = line[copulas[-1].end() :]
    filler = _FILLER.match(rest)
    rest = (rest[filler.end() :] if filler else rest).strip(" :,") or rest.strip()
    before = line[: copulas[-1].start()] if copulas else ""
    negated = re.match(r"(?i:(?:not|wrong|incorrect|impossible)\b)", rest) or re.search(
        r"(?i:\bnot|cannot|n't)\s+$", before
    )
    if negated and before and not rest.lower().startswith("not"):
        return line.strip()
    if not re.search(r"[\d\\]", rest) and _numbers(line):
        return _numbers(line)[-1]
    if not _wordy(rest) and not negated:
        return rest.strip() or None
    first = _IN_SENTENCE.match(rest)
    if first and (shown := _shown(first)):
        after = rest[first.end() :]
        if _CONTINUES.match(after):
            return rest
        words = re.match(rf"\s+((?:square |cubic |sq )?{_UNIT_WORDS})", after)
        return (
            f"{shown} {words[1]}"
            if words
            and words[1] not in shown
            and not re.match(r"(?:if|when|in|for|because|since|by|left|of|as|so|not)\b", words[1])
            else shown
        )
    numbers = _numbers(rest)
    if numbers:
        return numbers[-1]
    return None if re.fullmatch(r"\s*", rest) else rest


def _numbers(text: str) -> list[str]:
    """The numbers of a sentence that may be its answer: not after "not", no label, no time span if there are others."""
    found = [(m, shown) for m in _IN_SENTENCE.finditer(text) if (shown := _shown(m))]
    found = [(m, shown) for m, shown in found if not _NO_ANSWER.search(text[max(0, m.start() - 12) : m.start()])]
    spans = [_SPAN.search(text[max(0, m.start() - 12) : m.start()]) and _TIME.match(text, m.end()) for m, _ in found]
    return [shown for (_, shown), span in zip(found, spans, strict=True) if not span or all(spans)]


def _shown(m: re.Match[str]) -> str | None:
    """The number of a sentence with its percent, scale or unit; None where letters follow that are none of these."""
    number = m[1].strip()
    if m[2]:
        return f"{number}%"
    if m[3]:
        return f"{number} {m[3]}" if m[3] in UNITS else None
    word = _WORD.match(m.string, m.end())
    return f"{number} {word[1]}" if word and (word[1] in SCALES or word[1] == "percent") else number
