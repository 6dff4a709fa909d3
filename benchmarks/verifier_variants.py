"""Made variants of gold answers, right and wrong, by kind and form: pairs for bench_verifiers.py. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal

KINDS = ("scientific", "mixed", "list", "Unicode", "sentence")  # those that the targets name
FULL = str.maketrans("0123456789", "０１２３４５６７８９")  # noqa: RUF001
SUPER = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Pair:
    kind: str
    form: str
    right: bool
    gold: str
    text: str


def variants(n: int) -> Iterator[Pair]:
    """Of a positive integer answer, for instance 72: itself and golds made from it."""
    for kind, make in _KINDS.items():
        for right, gold, forms in make(n):
            for form, text in forms.items():
                yield Pair(kind, form, right, gold, text)


def expressions(gold: str, other: str) -> Iterator[Pair]:
    """Of any answer, for instance of MATH-500, and one that differs from it."""
    for right, answer in ((True, gold), (False, other)):
        hidden = other if right else gold
        forms = {
            "boxed": rf"So \boxed{{{answer}}}.",
            "box after a thought": rf"<think>\boxed{{{hidden}}}</think>" + "\n" + rf"\boxed{{{answer}}}",
            "answer tags": f"<think>{hidden}</think><answer>\n{answer}\n</answer>",
            "display math": f"The answer is\n\\[\n{answer}\n\\]",
            "dollars": f"The final answer is ${answer}$.",
            "final answer, bold": f"**Final Answer:** $\\boxed{{{answer}}}$",
        }
        for form, text in forms.items():
            yield Pair("expression", form, right, gold, text)
    yield Pair("expression", "thought cut off after a box", False, gold, rf"<think>So \boxed{{{gold}}}, or else")
    yield Pair("expression", "box cut off", False, gold, rf"\boxed{{{gold}")


Made = Iterator[tuple[bool, str, dict[str, str]]]


def _scientific(n: int) -> Made:
    for power in (-19, -4, 6, 11):
        value = Decimal(n).scaleb(power)
        mantissa, _, exponent = f"{value:e}".partition("e")
        x = int(exponent)
        wrong = ((False, mantissa, x + 1), (False, mantissa, -x), (False, str(Decimal(mantissa) + 1), x))
        for right, m, e in ((True, mantissa, x), *wrong):
            yield right, f"{n}e{power}", {
                "boxed times": rf"\boxed{{{m} \times 10^{{{e}}}}}",
                "boxed e": rf"\boxed{{{m}e{e}}}",
                "boxed cdot": rf"\boxed{{{m}\cdot 10^{{{e}}}}}",
                "boxed unit": rf"\boxed{{{m} \times 10^{{{e}}} \text{{ m}}}}",
                "boxed Unicode": rf"\boxed{{{m}×10{str(e).translate(SUPER)}}}",  # noqa: RUF001
                "boxed plain": rf"\boxed{{{Decimal(m).scaleb(e):f}}}",
                "sentence": f"The answer is {m} x 10^{e}.",
                "E at the end": f"This gives\n{m}E{e:+03d}",
                "dollars": f"The value is ${m}\\times10^{{{e}}}$ J.",
            }  # fmt: skip
        yield False, f"{n}e{power}", {"mantissa alone": rf"\boxed{{{mantissa}}}", "Euler": rf"\boxed{{e{exponent}}}"}


def _mixed(n: int) -> Made:
    for top, bottom, vulgar in ((1, 4, "¼"), (1, 2, "½"), (2, 3, "⅔")):
        for right, whole in ((True, n), (False, n + 1)):
            yield right, rf"\frac{{{n * bottom + top}}}{{{bottom}}}", {
                "space": rf"\boxed{{{whole} {top}/{bottom}}}",
                "frac": rf"\boxed{{{whole}\frac{{{top}}}{{{bottom}}}}}",
                "tfrac": rf"\boxed{{{whole}\ \tfrac{top}{bottom}}}",
                "Unicode": rf"\boxed{{{whole}{vulgar}}}",
                "sentence": f"It takes {whole} {top}/{bottom} hours.",
                "dollars": f"The answer is ${whole}\\frac{{{top}}}{{{bottom}}}$.",
            }  # fmt: skip
        yield False, f"{n} {top}/{bottom}", {
            "no space": rf"\boxed{{{n}{top}/{bottom}}}",
            "whole alone": rf"\boxed{{{n}}}",
            "part alone": rf"\boxed{{\frac{{{top}}}{{{bottom}}}}}",
            "inverse": rf"\boxed{{{n} {bottom}/{top}}}",
        }  # fmt: skip


def _list(n: int) -> Made:
    a, b = n, n + 3
    yield True, f"{a}, {b}", {
        "reversed": rf"\boxed{{{b}, {a}}}",
        "and": rf"\boxed{{{a} \text{{ and }} {b}}}",
        "set": rf"\boxed{{\{{{a}, {b}\}}}}",
        "two boxes": rf"$x = \boxed{{{a}}}$ or $x = \boxed{{{b}}}$",
        "two formulas": f"The solutions are $x = {a}$ and $x = {b}$.",
        "assigned": rf"\boxed{{x = {a}, x = {b}}}",
        "sentence": f"The answers are {a} and {b}.",
        "semicolon": rf"\boxed{{{a}; {b}}}",
    }  # fmt: skip
    yield False, f"{a}, {b}", {
        "one missing": rf"\boxed{{{a}}}",
        "one more": rf"\boxed{{{a}, {b}, {b + 1}}}",
        "one wrong": rf"\boxed{{{a}, {b + 1}}}",
        "two boxes, one wrong": rf"$x = \boxed{{{a}}}$ or $x = \boxed{{{b + 1}}}$",
        "sum": rf"\boxed{{{a} + {b}}}",
        "sentence": f"The answers are {a} and {b + 1}.",
    }  # fmt: skip
    yield (
        True,
        f"({a}, {b})",
        {"point": rf"\boxed{{\left({a},\ {b}\right)}}", "assigned": rf"\boxed{{(x, y) = ({a}, {b})}}"},
    )
    yield False, f"({a}, {b})", {"swapped": rf"\boxed{{({b}, {a})}}", "closed": rf"\boxed{{[{a}, {b}]}}"}
    yield False, str(n), {"two guesses": f"The answer is {n} or {n + 1}.", "list": rf"\boxed{{{n}, {n + 1}}}"}
    yield False, f"{n}349", {"no thousands": rf"\boxed{{{n}, 349}}"}


def _unicode(n: int) -> Made:
    for right, k in ((True, n), (False, n + 1)):
        yield right, str(n), {
            "full width": rf"\boxed{{{str(k).translate(FULL)}}}",
            "Chinese sentence": f"答案是{k}。",
            "Chinese period": f"The answer is {k}。",
        }  # fmt: skip
        yield right, rf"-\sqrt{{{n}}}", {"root": rf"\boxed{{−√{k}}}", "root of a group": rf"\boxed{{-√({k})}}"}  # noqa: RUF001
        yield right, rf"x^2+{n}", {"square": rf"\boxed{{x² + {k}}}"}
        yield right, rf"{n}\pi", {"pi": rf"\boxed{{{k}π}}", "pi in a sentence": f"The area is {k}π."}
        yield right, rf"x \le {n}", {"at most": rf"\boxed{{x ≤ {k}}}"}
        yield right, f"{n}, {n + 5}", {"full-width comma": rf"\boxed{{{k}，{k + 5}}}"}  # noqa: RUF001
        yield right, rf"{n}\times 10^5", {"superscript": rf"\boxed{{{k}×10⁵}}"}  # noqa: RUF001
    yield False, "x^2", {"not a square": r"\boxed{x2}", "cube": r"\boxed{x³}"}


def _sentence(n: int) -> Made:
    for right, k in ((True, n), (False, n + 1)):
        yield right, str(n), {
            "the answer is": f"The answer is {k}.",
            "there are": f"So there are {k} apples in total.",
            "therefore": f"Therefore, x = {k}.",
            "pays": f"In 3 days she pays ${k}.",
            "hours": f"It takes {k} hours.",
            "bold": f"Thus we find **{k}**.",
            "label": f"**Answer:** {k}",
            "formula": f"Hence 3 + 4 = {k}",
            "first of two": f"There are {k} ways to seat 5 people.",
            "commas": f"The total is {k:,} meters.",
            "decimal": f"The total is {k}.00 dollars.",
            "hashes": f"work\n#### {k}",
            "display": f"We conclude\n$$\nx = {k}\n$$",
            "percent": f"So the share is {k}%",
        }  # fmt: skip
    yield False, str(n), {
        "denied": f"The answer is not {n}.",
        "exponent": f"The answer is $x^{{{n}}}$.",
        "subscript": f"We get $a_{{{n}}}$",
        "in a word": f"This is case H{n}O",
        "earlier": f"First we get {n}.\nThen we add 1 and get {n + 1}.",
        "hashes before": f"#### {n + 1}\nor {n}",
    }  # fmt: skip


def _others(n: int) -> Made:
    for right, k in ((True, n), (False, n + 1)):
        yield right, str(n), {
            "unit": rf"\boxed{{{k}\text{{ cm}}}}",
            "several words": rf"\boxed{{{k} \text{{ square units}}}}",
            "percent": rf"\boxed{{{k}\%}}",
            "name": rf"\boxed{{n_{{\max}} = {k}}}",
            "approximately": rf"\boxed{{x \approx {k}}}",
            "thousands": rf"\boxed{{{k:,}}}",
            "LaTeX thousands": r"\boxed{" + f"{k:,}".replace(",", "{,}") + "}",
            "fraction": rf"\boxed{{\dfrac{{{2 * k}}}{{2}}}}",
        }  # fmt: skip
        yield right, rf"\textbf{{(C)}}\ {n}", {"option": rf"\boxed{{(C) {k}}}", "option alone": rf"\boxed{{{k}}}"}
        yield right, rf"({n}, \infty)", {"greater": rf"\boxed{{x > {k}}}", "turned": rf"\boxed{{{k} < x}}"}
        yield (
            right,
            rf"{n} \le x < {n + 2}",
            {"interval": rf"\boxed{{[{k}, {k + 2})}}", "member": rf"\boxed{{x \in [{k}, {k + 2})}}"},
        )
        yield right, f"{3 * n + 1}/3", {"repeating": rf"\boxed{{{k}.\overline{{3}}}}", "dots": rf"\boxed{{{k}.333...}}"}
        yield right, f"{n} km", {"other unit": rf"\boxed{{{k * 1000}\text{{ m}}}}"}
        yield right, f"y={n}", {"assigned": rf"\boxed{{y = {k}}}"}
    yield False, f"{n} km", {"unequal unit": rf"\boxed{{{n}\text{{ m}}}}"}
    yield False, f"y={n}", {"another variable": rf"\boxed{{x = {n}}}"}
    yield False, rf"\textbf{{(C)}}\ {n}", {"another letter": r"\boxed{B}"}
    yield False, rf"({n}, \infty)", {"closed": rf"\boxed{{x \ge {n}}}", "below": rf"\boxed{{x < {n}}}"}
    yield False, f"{n}:00", {"another time": rf"\boxed{{{n}:30}}"}
    yield True, f"{n}:00", {"time": rf"\boxed{{{n}:00}}"}


_KINDS = {
    "scientific": _scientific,
    "mixed": _mixed,
    "list": _list,
    "Unicode": _unicode,
    "sentence": _sentence,
    "others": _others,
}
