"""The three rules of decontamination, on made questions, and on GSM8K against five real evaluation sets."""

import os
import random
import time
from pathlib import Path

import pytest

from hsd.data import load
from hsd.data.decontaminate import LONG, answers_equal, decontaminate, ngrams, stem, words
from hsd.data.prompts import math_prompt

SHARED = Path(os.environ.get("HSD_SHARED_DATA", Path(__file__).parents[3].parent / "shared" / "data"))

RECTANGLE = (
    "Consider the rectangular region with the following points as vertices: $(5,4), (-5,4), (-5,-4), (5,-4)$. "
    "How many points with integer coordinates will be strictly in the interior of this rectangular region?"
)
REWORDED = (
    "Consider the rectangle with vertices at $(5,4), (-5,4), (-5,-4), (5,-4)$. How many integer coordinates "
    "will be strictly inside the rectangular region?"
)
OTHER = "A farmer has eleven cows and buys six more at the market; what is the number of legs in his stable now?"


def row(question: str, answer: str = "1", **rest) -> dict:
    return {"prompt": math_prompt(question), "answer": answer, "question": question} | rest


def verdict(question: str, answer: str, against: str, against_answer: str, **kwargs) -> str | None:
    kept, report = decontaminate([row(question, answer)], {"eval": [row(against, against_answer)]}, **kwargs)
    assert len(kept) + len(report["pairs"]) == 1
    return report["pairs"][0]["rule"] if report["pairs"] else None


@pytest.mark.parametrize(
    ("question", "against", "same"),
    [
        ("What is  $2+3$?", "what is 2 + 3", True),
        ("It\u2019s \u201cdone\u201d.", 'it\'s "done"', True),
        ("\\frac{1}{2}", "\\frac12", True),
        ("What is 2+3?", "What is 2-3?", False),
        ("What is 2+3?", "What is 2+4?", False),
        ("Is 1 < 2", "Is 1 > 2", False),
    ],
)
def test_stem(question, against, same):
    assert (stem(question) == stem(against)) is same
    assert verdict(question, "1", against, "2") == ("exact_stem" if same else None)


@pytest.mark.parametrize(
    "disguise",
    [
        "H\u0430ve \u0430 c\u0430t",  # Cyrillic
        "\u0397ave \u03b1 cat",  # Greek
        "Ha\u200bve a\u2060 c\u00adat\ufeff",  # category Cf
        "Ha\u034fve a c\ufe0fat\U000e0101",  # no glyph, but not Cf
        "Ha\x00ve a\x08 cat",  # category Cc
        "\uff28ave \U0001d41a cat",  # full width, mathematical bold
        "H\u00e1ve a\u0323 c\u0251t",  # accents, a Latin look-alike
        "HAVE\u00a0a\u3000cat",
        "Have\ta\r\ncat",
    ],
)
def test_a_disguise_is_no_other_question(disguise):
    tail = " with three legs and how many legs have seven such cats on a wall then?"
    assert words(disguise) == ["have", "a", "cat"]
    assert verdict(disguise + "?", "1", "have a cat", "2") == "exact_stem"
    assert verdict(f"Say: {disguise}{tail} Now!", "1", "Have a cat" + tail, "2") == "ngram_13"


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("5\u22123", "5-3", True),  # minus signs and dashes
        ("5\u20133", "5 - 3", True),
        ("\u0665+1", "5+1", True),  # digits of another script
        ("0.3\u0305", "0.3", False),  # a repeating decimal is another number
        ("5\u00f73", "5-3", False),
        ("\u0413\u0434\u0435 \u0434\u043e\u043c?", "\u0433\u0434\u0435 \u0414\u041e\u041c", True),
        ("\u0413\u0434\u0435 \u0434\u043e\u043c?", "\u0433\u0434\u0435 \u0434\u044b\u043c?", False),
        ("\u4e00\u4e8c", "\u4e00\u4e09", False),
    ],
)
def test_look_alikes_and_what_only_comes_near(a, b, same):
    assert (stem(a) == stem(b)) is same


PRIMES = "where $m$ and $n$ are relatively prime positive integers."
FORMULAS = [
    f"The probability can be written in the form $\\frac{{m}}{{n}}$, {PRIMES} Find $m+n$.",
    "Express your answer in the form $a\\sqrt{b}+c$, where $a$, $b$ and $c$ are integers and $b$ is not divisible by "
    "the square of any prime. Find $a+b+c$.",
]
BALLS = "A jar holds five red and three blue marbles, and two are drawn without putting the first one back."
TRIANGLE = "In triangle $ABC$ the bisector of the angle at $A$ meets the opposite side in $D$, with $BD=4$ and $CD=6$."


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("ending", ["", " Compute $100m+n$."])
def test_a_formula_that_two_questions_share_removes_nothing(formula, ending):
    cut = formula.rpartition(". ")[0] + "." if ending else formula
    for first, second in ((BALLS, TRIANGLE), (BALLS, "Compute $\\sin 15^\\circ$."), (BALLS * 4, TRIANGLE)):
        for a, b in ((first, second), (second, first)):
            assert verdict(f"{a} {formula}", "7", f"{b} {cut}{ending}", "9") is None
            assert verdict(f"{formula} {a}", "7", f"{formula} {b}", "9") is None  # at the beginning
    # The same question in front of it is a copy, also with another ending or beginning.
    assert verdict(f"{BALLS} {formula}", "7", f"{BALLS} {cut}{ending}", "9") in ("exact_stem", "ngram_13")
    reworded = BALLS.replace("A jar holds", "There are")
    assert verdict(f"{reworded} {formula}", "7", f"{BALLS} {formula}", "9") == "ngram_13"


def test_thirteen_words_in_common_and_not_twelve():
    common = "one two three four five six seven eight nine ten eleven twelve thirteen".split()
    assert len(common) == LONG
    assert verdict("A " + " ".join(common) + " b?", "1", "C, " + " ".join(common).upper() + "; d", "2") == "ngram_13"
    assert verdict("A " + " ".join(common[1:]) + " b?", "1", "C " + " ".join(common[1:]) + " d", "2") is None
    assert ngrams(words("a b. C"), 3) == ["a b c"] and ngrams(["a"], 3) == []


def test_an_equal_answer_falls_only_with_overlap():
    assert verdict(REWORDED, "63", RECTANGLE, "63") == "equal_answer"
    assert verdict(RECTANGLE, "63", REWORDED, "63") == "equal_answer"
    assert verdict(REWORDED, "64", RECTANGLE, "63") is None
    assert verdict(OTHER, "63", RECTANGLE, "63") is None  # the answer alone
    assert verdict("", "", "", "") == "exact_stem"


def test_a_short_phrase_is_no_overlap():
    # Three sequences of each question's five or six: more than 30 %, but not four of them.
    assert verdict("What is the value of y in 3y = 9?", "3", "What is the value of 3 + 0?", "3") is None


def test_an_answer_that_cannot_be_compared_is_reported_and_stays():
    kept, report = decontaminate([row(REWORDED, "x")], {"e": [row(RECTANGLE, "y")]}, equal=lambda a, b: None)
    assert kept == [0] and report["answers_not_comparable"] == [{"answer": "x", "against_answer": "y"}]
    kept, report = decontaminate([row(REWORDED, "")], {"e": [row(RECTANGLE, "")]}, equal=lambda a, b: True)
    assert kept == [0]  # no answers (LiveCodeBench), nothing to compare


def test_the_report():
    train = [row(OTHER, "68"), row(RECTANGLE.upper(), "63"), row(REWORDED, "63"), row("New?", "5")]
    against = {"first": [row("Unrelated question.", "5")], "second": [row(RECTANGLE, "63"), row(RECTANGLE, "63")]}
    kept, report = decontaminate(train, against)
    assert kept == [0, 3]
    assert report["removed"] == {"exact_stem": 1, "ngram_13": 0, "equal_answer": 1}
    assert report["removed_by_set"] == {"first": 0, "second": 2}
    assert report["against"] == {"first": 1, "second": 2}
    assert (report["train_rows"], report["kept"]) == (4, 2)
    first, second = report["pairs"]
    assert (first["row"], first["against"], first["against_row"]) == (1, "second", 0)
    assert (second["text"], second["against_text"], second["shared"]) == (REWORDED, RECTANGLE, second["shared"])
    assert second["shared"].endswith("% of the 3-word sequences")


def test_instructions_do_not_count():
    """Rows without the column `question`: every prompt ends in the same twelve words."""
    a, b = ({"prompt": math_prompt(q), "answer": "1"} for q in ("How many cats?", "How many dogs?"))
    assert decontaminate([a], {"e": [b]})[0] == [0]
    assert decontaminate([a], {"e": [{"prompt": "How many cats", "answer": "2"}]})[0] == []


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        ("\\dfrac{1}{2}", "\\frac{1}{2}", True),
        ("1,234", "1234", True),
        ("0.5", "1/2", True),
        ("\\left( 3, 4 \\right)", "(3,4)", True),
        ("$5", "5", True),
        ("3", "4", False),
        ("```python\npass\n```", "7", False),
        ("```python\npass\n```", "```python\npass\n```", True),
        (["3", "1/2"], "0.5", True),
        ("0.5", ["3", "1/2"], True),
        (["3", "4"], ["5", "6"], False),
    ],
)
def test_answers_equal(a, b, equal):
    assert answers_equal(a, b) is equal


def test_answers_equal_with_sympy():
    assert answers_equal("\\sqrt{8}", "2\\sqrt{2}") is True
    assert answers_equal("\\sqrt{8}", "2\\sqrt{3}") is False


def test_a_hundred_thousand_rows_take_seconds():
    rng = random.Random(0)
    vocabulary = [f"w{i}" for i in range(3000)]

    def text(n: int) -> str:
        return " ".join(rng.choices(vocabulary, k=n))

    evaluation = [row(text(50), str(i)) for i in range(1000)]
    train = [row(text(50), str(i % 1000)) for i in range(5000)]
    train[17] = row("Once more: " + evaluation[3]["question"], "0")
    began = time.process_time()
    _, report = decontaminate(train, {"e": evaluation})
    seconds = time.process_time() - began
    assert [p["row"] for p in report["pairs"]] == [17]
    assert seconds < 6, seconds  # 0.4 s here: 100,000 rows would be allowed two minutes


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is absent")
def test_gsm8k_against_five_real_sets():
    names = ["gsm8k_test", "svamp_test", "math500", "aime24", "aime25"]
    against = {name: load(str(SHARED / f"{name}.jsonl")) for name in names}
    train = load(str(SHARED / "gsm8k_train.jsonl"))
    kept, report = decontaminate(train, against)
    assert report["removed"] == {"exact_stem": 0, "ngram_13": 3, "equal_answer": 0}
    assert report["removed_by_set"] == {name: 3 * (name == "gsm8k_test") for name in names}
    assert len(kept) == 7470
    # A leaked copy of each set falls whole.
    assert decontaminate(against["math500"], against)[0] == []
