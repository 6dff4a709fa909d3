"""Training questions that an evaluation set also has, by three rules; the first that applies is the reason.

1. ``exact_stem``: the same question, but for case, spacing and punctuation.
2. ``ngram_13``: 13 consecutive words in common.
3. ``equal_answer``: equal answers, and of the 3-word sequences of both questions at least 30 % (twice those in common
   over those of both, the Dice overlap), four or more. An equal answer alone says nothing: 6,610 of GSM8K's 7,473
   training questions have the answer of some question of five evaluation sets. With the overlap the rule finds
   rewordings. Between GSM8K's training set and those five, the largest overlap of a pair with equal answers is 21 %;
   within MATH-500 one pair is above 30 %, the same rectangle worded twice.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import Any

from hsd.data.prompts import bare_question
from hsd.data.rows import Row, last_user_text

LONG, SHORT = 13, 3  # words
MIN_OVERLAP, MIN_SHARED = 0.3, 4
RULES = ("exact_stem", "ngram_13", "equal_answer")

_WORD = re.compile(r"\w+")
_NOISE = re.compile(r"[\s.,;:!?'\"`$\\{}~\u2018\u2019\u201c\u201d]+")


@dataclass(frozen=True)
class Match:
    """One training row that falls, with the evaluation row it falls to."""

    rule: str
    row: int  # of the training rows, from 0
    against: str  # name of the evaluation set
    against_row: int
    text: str
    against_text: str
    answer: str
    against_answer: str
    shared: str  # the words in common, or the overlap


def question_of(row: Row) -> str:
    """The question without instructions: the column ``question``, else the last user message."""
    return row.get("question") or bare_question(last_user_text(row))


def words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def stem(text: str) -> str:
    """The question's characters without case, white space, quotes, sentence and LaTeX punctuation. Operators stay:
    ``3+4`` is another question than ``3-4``."""
    return _NOISE.sub("", unicodedata.normalize("NFKC", text).casefold())


def ngrams(of: Sequence[str], n: int) -> list[str]:
    """The distinct runs of n words, in order of appearance."""
    return list(dict.fromkeys(" ".join(of[i : i + n]) for i in range(len(of) - n + 1)))


@dataclass
class Index:
    """Stems and n-grams of evaluation questions. Adding and looking up are linear in the length of the text."""

    equal: Callable[[str, str], bool | None]
    items: list[tuple[str, int, str, str]] = field(default_factory=list)  # set, row, question, answer
    stems: dict[str, int] = field(default_factory=dict)
    long: dict[str, int] = field(default_factory=dict)
    short: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    sizes: list[int] = field(default_factory=list)
    undecided: list[dict[str, str]] = field(default_factory=list)  # answers that could not be compared

    def add(self, name: str, rows: Iterable[Row]) -> None:
        for i, row in enumerate(rows):
            at, text = len(self.items), question_of(row)
            in_order = words(text)
            short = ngrams(in_order, SHORT)
            self.items.append((name, i, text, row["answer"]))
            self.sizes.append(len(short))
            self.stems.setdefault(stem(text), at)
            for gram in ngrams(in_order, LONG):
                self.long.setdefault(gram, at)
            for gram in short:
                self.short[gram].append(at)

    def match(self, i: int, row: Row) -> Match | None:
        """The first rule by which training row number ``i`` falls, or None."""
        text, answer = question_of(row), row["answer"]

        def found(rule: str, at: int, shared: str) -> Match:
            name, number, against_text, against_answer = self.items[at]
            return Match(rule, i, name, number, text, against_text, answer, against_answer, shared)

        if (at := self.stems.get(stem(text))) is not None:
            return found("exact_stem", at, "")
        in_order = words(text)
        for gram in ngrams(in_order, LONG):
            if (at := self.long.get(gram)) is not None:
                return found("ngram_13", at, gram)
        counts: Counter[int] = Counter()
        short = ngrams(in_order, SHORT)
        for gram in short:
            if (holders := self.short.get(gram)) is not None:
                counts.update(holders)
        overlap = {at: 2 * n / (len(short) + self.sizes[at]) for at, n in counts.items() if n >= MIN_SHARED}
        for at in sorted(overlap, key=lambda at: -overlap[at]):
            if overlap[at] >= MIN_OVERLAP and self._same_answer(answer, at):
                return found("equal_answer", at, f"{overlap[at]:.0%} of the {SHORT}-word sequences")
        return None

    def _same_answer(self, answer: str, at: int) -> bool:
        other = self.items[at][3]
        if not answer or not other:  # LiveCodeBench has none
            return False
        verdict = self.equal(answer, other)
        if verdict is None:
            self.undecided.append({"answer": answer, "against_answer": other})
        return bool(verdict)


def decontaminate(
    rows: Sequence[Row], against: dict[str, Sequence[Row]], equal: Callable[[str, str], bool | None] | None = None
) -> tuple[list[int], dict[str, Any]]:
    """The numbers of the rows that stay, and a report: counts per rule and set, and both texts of every removed row.

    Args:
        rows: Training rows.
        against: Evaluation rows by the name of their set.
        equal: Whether two answers are equal, None where it cannot tell (counted, and the row stays); by default
            `answers_equal`.
    """
    index = Index(equal or answers_equal)
    for name, others in against.items():
        index.add(name, others)
    matches = [m for i, row in enumerate(rows) if (m := index.match(i, row)) is not None]
    removed = {m.row for m in matches}
    by_rule = Counter(m.rule for m in matches)
    report = {
        "rules": {
            "exact_stem": "same text but for case, spacing and punctuation",
            "ngram_13": f"{LONG} consecutive words in common",
            "equal_answer": f"equal answer, and a Dice overlap of {SHORT}-word sequences of at least {MIN_OVERLAP:.0%} "
            f"({MIN_SHARED} or more)",
        },
        "train_rows": len(rows),
        "against": {name: len(others) for name, others in against.items()},
        "kept": len(rows) - len(removed),
        "removed": {rule: by_rule[rule] for rule in RULES},
        "removed_by_set": {name: sum(m.against == name for m in matches) for name in against},
        "answers_not_comparable": index.undecided,
        "pairs": [asdict(m) for m in matches],
    }
    return [i for i in range(len(rows)) if i not in removed], report


def answers_equal(a: str, b: str) -> bool | None:
    """The same text, the same number, or equal to SymPy (`hsd.verify.verify_math`, 5 s in a process of its own)."""
    if _plain(a) == _plain(b):
        return True
    numbers = [_number(a), _number(b)]
    if None not in numbers:
        return numbers[0] == numbers[1]
    if "```" in a + b:  # programs
        return False
    from hsd.verify import verify_math

    reward = verify_math(f"\\boxed{{{a}}}", b).reward
    return None if reward is None else reward == 1.0


def _plain(answer: str) -> str:
    return re.sub(r"\s+|\\[,;!]|\\left|\\right|\$", "", answer.replace("dfrac", "frac").replace("tfrac", "frac"))


def _number(answer: str) -> Fraction | None:
    try:
        return Fraction(re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", answer.strip().strip("$")))
    except (ValueError, ZeroDivisionError):
        return None
