import time

import pytest

from hsd.verify.answers import extract_answer
from hsd.verify.quantities import plain_number
from hsd.verify.spelling import normalized, same_text


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{5} then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"x = \boxed{5} or $x = \boxed{6}$", "5, 6"),
        (r"\boxed{4}" + "\n" + r"\boxed{5}", "5"),
        ("<think>\\boxed{5}</think> so 6", "6"),
        ("<think>\\boxed{5}", None),
        ("<answer>\n6\n</answer> 7", "6"),
        (r"\boxed{\{1, 2\}} is it", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed 7$", "7"),
        (r"\fbox{3}", "3"),
        (r"\boxed{5} no, \boxed{7", None),  # cut off: the earlier one was taken back
        (r"\boxed{}", None),
        (r"\boxedfoo 3", r"\boxedfoo 3"),
        ("work\n#### 1,234\n", "1,234"),
        ("The answer is $x^2$.\nBye", "x^2"),
        ("Final Answer: **(3, 4)**", "(3, 4)"),
        ("first\nso $a$ and then $b + 1$", "b + 1"),
        (r"so \(\frac12\)", r"\frac12"),
        (r"\(a\) and \[b\]", "a, b"),
        (r"\(\(\( so \(x^2\)", "x^2"),
        (r"it is $\$32,\!348$.", r"\$32,\!348"),
        ("the answer is:", None),
        ("  \n", None),
        ("", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (r"\dfrac{1}{2}", r"\frac12"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
        ("$5$", "5"),
        (r"\text{Evelyn}", "evelyn"),
        (r"\text{(A)}", "A"),
        ("1,234", "1234"),
        (r"11,\! 111", "11111"),
        (r"\sqrt3", r"\sqrt{3}"),
        ("\u22125", "-5"),
        (r"5\%", "5%"),
        (r"\$5", "5 dollars"),
        (r"45^\circ", "45 degrees"),
        (r"\varnothing", r"\{\}"),
        ("x\u00b2", "x^{2}"),
        ("\uff11\uff12", "12"),
    ],
)
def test_same_text(a, b):
    assert same_text(a, b) and same_text(b, a)
    assert normalized(normalized(a)) == normalized(a)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("5 million", "5"),
        (r"5\text{ percent}", "5"),
        ("5 pi", "5"),
        ("5x", "5"),
        ("(1,2)", "[1,2]"),
        ("1,2", "12"),
        ("32, 349", "32349"),
        ("1 1/4", "11/4"),
        (r"\text{Evelyn}", r"\text{Eve}"),
        ("nylevE", "Evelyn"),
        ("", ""),
        ("2_5", "25"),
        ("a", "A"),  # as symbols they differ
    ],
)
def test_different_text(a, b):
    assert not same_text(a, b)


def test_plain_number():
    assert plain_number(r"\$1,234.50") == plain_number("1234.5 dollars") == plain_number("+1234.5")
    assert plain_number(r"3\text{ million}") == plain_number("3 million.") == 3_000_000
    assert plain_number("5 percent") is None and plain_number("5 pi") is None
    assert plain_number(".5") == plain_number("0.5") and plain_number("-0") == plain_number("0")
    assert plain_number("1" * 40) != plain_number("1" * 39 + "2"), "28 digits are not enough"
    assert plain_number("0." + "1" * 39) != plain_number("0." + "1" * 38)
    assert plain_number("1e3") == plain_number(r"10^3") == 1000 and plain_number(r"1\tfrac14") == plain_number("5/4")
    for text in ("5x", "", ".", "-", "12,34", "1.2.3", "1/0", "e-5", "1e99999", "2_5", "\u0663"):
        assert plain_number(text) is None, text


def test_hostile_text_is_read_in_linear_time():
    import time

    start = time.process_time()
    openers = (
        "<<a" * 40_000,
        r"\boxed{" * 20_000,
        "{" * 100_000,
        "$" * 100_000,
        r"\(" * 50_000,
        r"\[" * 50_000,
        r"$\(" * 30_000,
    )
    more = ("answer is" * 20_000, r"\text{" * 20_000, "\n" * 100_000, "$1$ " * 30_000, r"\boxed{1}" * 20_000)
    for text in (*openers, *more):
        extract_answer(text)
    for text in (
        "5 " + "a " * 500,
        "\\text{" * 160,
        "1," * 500,
        "\\left" * 200,
        " " * 1000,
        "5" + " a" * 499,
        "USD" * 330,
        "{}" * 500,
        " and" * 250,
    ):
        normalized(text)
    assert time.process_time() - start < 2.5


@pytest.mark.parametrize("said", ["The answer is " + "maybe " * 9, "1,234.5 ", "7 and then ", "not 7 ", "answer: "])
def test_a_long_text_is_read_in_linear_time(said):
    """Half a million characters; what copied the rest of the text at each word took minutes under Python's lock."""
    started = time.process_time()
    extract_answer(said * (500_000 // len(said)) + "so on")
    assert time.process_time() - started < 2.0
