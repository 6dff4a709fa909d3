"""Training questions that an evaluation set also has, by three rules; the first that applies is the reason.

1. ``exact_stem``: the same question, but for case, spacing, punctuation, invisible characters and look-alikes.
2. ``ngram_13``: 13 consecutive words in common, and more than a formula (`copied_run`).
3. ``equal_answer``: equal answers, and of the 3-word sequences of both questions at least 30 % (twice those in common
   over those of both, the Dice overlap), four or more. An equal answer alone says nothing, since most answers are small
   numbers. With the overlap the rule finds rewordings. docs/data.md has the counts.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from hsd.data.prompts import bare_question
from hsd.data.rows import Row
from hsd.data.skeleton import skeleton
from hsd.hindsight.groups import last_user_text

LONG, SHORT = 13, 3  # words
MIN_OVERLAP, MIN_SHARED = 0.3, 4
LONGEST_FORMULA, EDGE = 40, 6  # words
WHOLE, HALF, REST = 0.9, 0.5, 0.5  # of words, in `copied_run`
CANDIDATES = 5  # evaluation questions with the most 13-word sequences in common that `copied_run` looks at
RULES = ("exact_stem", "ngram_13", "equal_answer")

_WORD = re.compile(r"\w+")
_NOISE = re.compile(r"[\s.,;:!?'\"`$\\{}~\u2018\u2019\u201c\u201d]+")
Equal = Callable[[Any, Any], bool | None]


@dataclass(frozen=True)
class Match:
    """One training row that falls, with the evaluation row it falls to."""

    rule: str
    row: int  # of the training rows, from 0
    against: str  # name of the evaluation set
    against_row: int
    text: str
    against_text: str
    answer: str | list[str]
    against_answer: str | list[str]
    shared: str  # the words in common, or the overlap


def question_of(row: Row) -> str:
    """The question without instructions: the column ``question``, else the last user message."""
    return row.get("question") or bare_question(last_user_text(row["prompt"]))


def words(text: str) -> list[str]:
    return _WORD.findall(skeleton(text))


def stem(text: str) -> str:
    """The question's characters without case, white space, quotes, sentence and LaTeX punctuation. Operators stay:
    ``3+4`` is another question than ``3-4``."""
    return _NOISE.sub("", skeleton(text))


def ngrams(of: Sequence[str], n: int) -> list[str]:
    """The distinct runs of n words, in order of appearance."""
    return list(dict.fromkeys(" ".join(of[i : i + n]) for i in range(len(of) - n + 1)))


def copied_run(of: Sequence[str], against: Sequence[str]) -> bool:
    """Whether the words that both have in runs of 13 or more are a copy of the evaluation question ``against``.

    One of these must hold: the runs are nine tenths of it; they are half of it, not counting formulas; the other words
    of the two are half the same (Dice). A formula is a run of at most 40 words that begins or ends both questions, give
    or take 6 words, unless only 3 words stand before and 3 behind it: "where m and n are relatively prime positive
    integers. Find m + n."
    """
    places = {" ".join(of[j : j + LONG]): j for j in range(len(of) - LONG + 1)}
    copied, no_formula, i = 0, 0, 0
    mine, others = Counter(of), Counter(against)
    while i <= len(against) - LONG:
        j = places.get(" ".join(against[i : i + LONG]))
        if j is None:
            i += 1
            continue
        size = _same_start(against[i:], of[j:])
        before, behind = max(i, j), max(len(against) - i, len(of) - j) - size
        copied += size
        formula = size <= LONGEST_FORMULA and min(before, behind) <= EDGE and max(before, behind) > SHORT
        no_formula += 0 if formula else size
        mine.subtract(against[i : i + size])
        others.subtract(against[i : i + size])
        i += size
    mine, others = +mine, +others
    rest = 2 * (mine & others).total() / max(1, mine.total() + others.total())
    return copied >= WHOLE * len(against) or no_formula >= HALF * len(against) or rest >= REST


def _same_start(a: Sequence[str], b: Sequence[str]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@dataclass
class Index:
    """Stems and n-grams of evaluation questions. Adding and looking up are linear in the length of the text."""

    equal: Equal
    items: list[tuple[str, int, str, Any]] = field(default_factory=list)  # set, row, question, answer
    stems: dict[str, int] = field(default_factory=dict)
    long: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    short: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    sizes: list[int] = field(default_factory=list)
    undecided: list[dict[str, Any]] = field(default_factory=list)  # answers that could not be compared

    def add(self, name: str, rows: Iterable[Row]) -> None:
        for i, row in enumerate(rows):
            at, text = len(self.items), question_of(row)
            in_order = words(text)
            short = ngrams(in_order, SHORT)
            self.items.append((name, i, text, row["answer"]))
            self.sizes.append(len(short))
            self.stems.setdefault(stem(text), at)
            for grams, holders in ((ngrams(in_order, LONG), self.long), (short, self.short)):
                for gram in grams:
                    holders[gram].append(at)

    def match(self, i: int, row: Row) -> Match | None:
        """The first rule by which training row number ``i`` falls, or None."""
        text, answer = question_of(row), row["answer"]

        def found(rule: str, at: int, shared: str) -> Match:
            name, number, against_text, against_answer = self.items[at]
            return Match(rule, i, name, number, text, against_text, answer, against_answer, shared)

        if (at := self.stems.get(stem(text))) is not None:
            return found("exact_stem", at, "")
        in_order = words(text)
        long, short = ngrams(in_order, LONG), ngrams(in_order, SHORT)
        for at, _ in _holders(long, self.long).most_common(CANDIDATES):
            if copied_run(in_order, words(self.items[at][2])):
                return found("ngram_13", at, next(gram for gram in long if at in self.long.get(gram, ())))
        counts = _holders(short, self.short)
        overlap = {at: 2 * n / (len(short) + self.sizes[at]) for at, n in counts.items() if n >= MIN_SHARED}
        for at in sorted(overlap, key=lambda at: -overlap[at]):
            if overlap[at] >= MIN_OVERLAP and self._same_answer(answer, at):
                return found("equal_answer", at, f"{overlap[at]:.0%} of the {SHORT}-word sequences")
        return None

    def _same_answer(self, answer: Any, at: int) -> bool:
        other = self.items[at][3]
        if not answer or not other:  # LiveCodeBench has none
            return False
        verdict = self.equal(answer, other)
        if verdict is None:
            self.undecided.append({"answer": answer, "against_answer": other})
        return bool(verdict)


def _holders(grams: Iterable[str], holders: dict[str, list[int]]) -> Counter[int]:
    """How many of ``grams`` each evaluation question has."""
    counts: Counter[int] = Counter()
    for gram in grams:
        if gram in holders:
            counts.update(holders[gram])
    return counts


def decontaminate(
    rows: Sequence[Row], against: dict[str, Sequence[Row]], equal: Equal | None = None
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
            "exact_stem": "same text but for case, spacing, punctuation, invisible characters and look-alikes",
            "ngram_13": f"{LONG} consecutive words in common, more than a formula",
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


def answers_equal(a: str | list[str], b: str | list[str]) -> bool | None:
    """Whether an accepted answer of ``a`` equals one of ``b``: programs as text, else to `hsd.verify.verify_math`.

    None where the verifier failed.
    """
    from hsd.verify import verify_math

    if isinstance(a, list) or isinstance(b, list):
        pairs = [(x, y) for x in _as_list(a) for y in _as_list(b)]
        verdicts = [answers_equal(x, y) for x, y in pairs]
        return True if True in verdicts else None if None in verdicts else False
    if a == b or "```" in a + b:
        return a == b
    reward = verify_math(f"\\boxed{{{a}}}", b).reward
    return None if reward is None else reward == 1.0


def _as_list(answer: str | list[str]) -> list[str]:
    return answer if isinstance(answer, list) else [answer]
