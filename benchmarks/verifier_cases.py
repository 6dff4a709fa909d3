"""Cases for bench_verifiers.py: spellings of gold answers and mutants of HumanEval's solutions. Pure functions."""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Iterator
from fractions import Fraction

# Mutants that compute the same on every input that the problem allows.
EQUIVALENT = {
    ("HumanEval/25", "comparison flipped"): "what is left of n after the loop is a prime and is appended in both",
    (
        "HumanEval/32",
        "comparison flipped",
    ): "looks further where an end is a root already and finds another one; the problem allows any",
    ("HumanEval/35", "comparison flipped"): "the maximum is the same whichever of two equal elements is kept",
    (
        "HumanEval/108",
        "integer plus one",
    ): "twice the first digit of a positive number leaves the sign of its digit sum",
    ("HumanEval/108", "comparison flipped"): "differs for 0 only, whose digit sum is 0 either way",
    ("HumanEval/111", "comparison flipped"): "the running maximum is the same if set again to an equal count",
    ("HumanEval/114", "comparison flipped"): "a sum of 0 is set to 0",
    (
        "HumanEval/116",
        "integer plus one",
    ): "one bit less for every positive number; 0 stays first because ties are in order of value",
    ("HumanEval/127", "integer plus one"): "2 has no divisor to try, so the loop says prime",
    ("HumanEval/129", "integer plus one"): "an upper bound that some neighbour is always under",
    (
        "HumanEval/129",
        "operator swapped",
    ): "an upper bound that some neighbour is never over: two neighbours differ, the smaller is at most n * n - 1",
    ("HumanEval/145", "comparison flipped"): "differs for 0 only, whose digit sum is 0 either way",
    ("HumanEval/146", "comparison flipped"): "10 ends in an even digit",
    ("HumanEval/147", "integer plus one"): "every element is 1 larger, a sum of three 3 larger: the same modulo 3",
    ("HumanEval/147", "operator swapped"): "every element is 2 smaller, a sum of three 6 smaller: the same modulo 3",
    ("HumanEval/151", "comparison flipped"): "0 is even",
    ("HumanEval/154", "integer plus one"): "the slice at the extra place is shorter than the pattern",
    ("HumanEval/159", "comparison flipped"): "where need equals remaining both branches return the same",
}
# Mutants that are wrong where HumanEval's tests do not look.
UNNOTICED = {
    ("HumanEval/20", "operator swapped"): "the first pair's distance is a sum",
    ("HumanEval/31", "integer plus one"): "2 is not called prime",
    ("HumanEval/31", "comparison flipped"): "2 is not called prime",
    ("HumanEval/32", "integer plus one"): "may stop before the signs differ",
    ("HumanEval/35", "integer plus one"): "fails on lists of one element",
    ("HumanEval/40", "integer plus one"): "misses neighbours",
    ("HumanEval/40", "operator swapped"): "takes an element twice",
    ("HumanEval/43", "integer plus one"): "misses neighbours",
    ("HumanEval/46", "comparison flipped"): "fails for n = 4",
    ("HumanEval/59", "integer plus one"): "2 is not called prime",
    ("HumanEval/59", "comparison flipped"): "2 is not called prime",
    ("HumanEval/68", "integer plus one"): "a list of one even element gives []",
    ("HumanEval/75", "integer plus one"): "4 is called prime",
    ("HumanEval/95", "integer plus one"): "a dictionary of one key gives False",
    ("HumanEval/99", "integer plus one"): "14.50 is rounded to even",
    ("HumanEval/127", "comparison flipped"): "every length but 2 is called prime",
    ("HumanEval/127", "operator swapped"): "every length is called prime",
}


def number_forms(number: str) -> dict[str, str]:
    """A GSM8K answer, for instance 1,234, as models write it."""
    plain = number.replace(",", "")
    commas = f"{int(plain):,}" if re.fullmatch(r"-?\d+", plain) else number
    sign, digits = ("-", plain[1:]) if plain.startswith("-") else ("", plain)
    forms = {
        "boxed": rf"So it is \boxed{{{plain}}}.",
        "boxed, commas": rf"\boxed{{{commas}}}",
        "boxed, LaTeX commas": rf"\boxed{{{commas.replace(',', '{,}')}}}",
        "boxed, dollar sign": rf"\boxed{{{sign}\${digits}}}",
        "boxed, unit": rf"\boxed{{{plain}\text{{ dollars}}}}",
        "boxed, period": rf"\boxed{{{plain}.}}",
        "boxed, x =": rf"\boxed{{x = {plain}}}",
        "boxed, fraction": rf"\boxed{{\dfrac{{{2 * Fraction(plain)}}}{{2}}}}",
        "in math": f"The answer is ${plain}$.",
        "plain": plain,
        "plain, commas": commas,
        "plain, unit": f"The answer is {commas} apples.",
        "plain, dollars": f"She pays {sign}${digits}.",
        "plain, bold": f"**{commas}**",
        "hashes": f"work\n#### {commas}",
        "earlier numbers": f"3 + 4 = 7, and then 1,000.\nIn total: {commas}",
    }
    if "." not in plain:
        forms |= {"boxed, .00": rf"\boxed{{{plain}.00}}", "plain, .00": f"{sign}${digits}.00"}
    return forms


def wrong_number_forms(number: str) -> dict[str, str]:
    other = Fraction(number.replace(",", "")) + 1
    text = str(other) if other.denominator == 1 else str(float(other))
    return {
        "boxed": rf"\boxed{{{text}}}",
        "plain": f"The answer is {text}.",
        "taken back": rf"\boxed{{{number}}} no, \boxed{{{text}}}",
        "million": rf"\boxed{{{number} \text{{ million}}}}" if Fraction(number.replace(",", "")) else r"\boxed{1}",
        "list": rf"\boxed{{{number}, {text}}}",
    }


def math_forms(answer: str) -> dict[str, str]:
    """A MATH answer as models write it. Forms that do not apply to it are left out."""
    forms = {
        "boxed": rf"So \boxed{{{answer}}}.",
        "boxed, period": rf"\boxed{{{answer}.}}",
        "boxed, dollars": rf"\boxed{{${answer}$}}",
        "boxed, spaces": rf"\boxed{{ {re.sub(r',(?![0-9]{3}(?![0-9]))', ', ', answer).replace('+', ' + ')} }}",
        "in math": f"The answer is ${answer}$.",
        "in brackets": f"The answer is \\({answer}\\)",
        "plain": answer,
    }
    swapped = {
        "dfrac": answer.replace(r"\frac", r"\dfrac"),
        "frac": answer.replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac"),
        "no left, right": answer.replace(r"\left", "").replace(r"\right", ""),
        "short frac": re.sub(r"\\frac\{(\d)\}\{(\d)\}", r"\\frac\1\2", answer),
        "no text": re.sub(r"\\text\{([^{}]*)\}", r"\1", answer),
        "no degrees": re.sub(r"\^\{?\\circ\}?", "", answer),
        "slash": re.sub(r"^(-?)\\frac\{(\d+)\}\{(\d+)\}$", r"\1\2/\3", answer),
        "mixed slash": re.sub(r"^(\d+) ?\\frac\{(\d+)\}\{(\d+)\}$", r"\1 \2/\3", answer),
    }
    forms |= {name: rf"\boxed{{{text}}}" for name, text in swapped.items() if text != answer}
    forms |= {f"boxed, {name}": rf"\boxed{{{text}}}" for name, text in _numbers(answer)}
    return forms


def _numbers(answer: str) -> Iterator[tuple[str, str]]:
    """Other spellings of an integer, a decimal or a simple fraction."""
    fraction = re.fullmatch(r"(-?)\\[dt]?frac\{(\d+)\}\{(\d+)\}", answer)
    if fraction:
        value = Fraction(int(fraction[2]), int(fraction[3]))
        decimal = f"{float(value):.10f}".rstrip("0")
        if Fraction(decimal) == value:
            yield "decimal", fraction[1] + decimal
    elif re.fullmatch(r"-?\d+\.\d+", answer):
        value = Fraction(answer)
        yield "fraction", f"{'-' if value < 0 else ''}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"
    elif re.fullmatch(r"-?\d+", answer):
        yield "x =", f"x = {answer}"
        yield "unit", rf"{answer}\text{{ cm}}"
        yield "dollar sign", rf"\${answer}"
        if abs(int(answer)) >= 1000:
            yield "commas", f"{int(answer):,}"
            yield "LaTeX commas", f"{int(answer):,}".replace(",", ",\\!")


def mutants(prompt: str, solution: str, entry_point: str) -> dict[str, str]:
    """Whole programs, each wrong in one way; kinds without a place in this solution are left out."""
    tree = ast.parse(prompt + solution)
    name = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == entry_point)
    first = name.args.args[0].arg if name.args.args else "None"
    found = {
        "return None": _with_body(tree, entry_point, "return None"),
        "empty body": _with_body(tree, entry_point, "pass"),
        "early return of an argument": _with_start(tree, entry_point, f"return {first}"),
        "early return of the empty": _with_start(tree, entry_point, f"return type({first})()"),
        "raises": _with_start(tree, entry_point, "raise ValueError"),
        "infinite loop": _with_start(tree, entry_point, "while True: pass"),
        "exits": _with_start(tree, entry_point, "import os; os._exit(0)"),
        "exits when loaded": "import sys\nsys.exit(0)\n" + prompt + solution,
        "syntax error": prompt + solution.rstrip() + ")\n",
        "off by one in the result": _with_wrapper(tree, entry_point),
    }
    return found | dict(_one_node(tree, entry_point))


def _edited(tree: ast.Module, entry_point: str) -> tuple[ast.Module, ast.FunctionDef]:
    fresh = copy.deepcopy(tree)
    return fresh, next(n for n in fresh.body if isinstance(n, ast.FunctionDef) and n.name == entry_point)


def _with_body(tree: ast.Module, entry_point: str, code: str) -> str:
    fresh, function = _edited(tree, entry_point)
    function.body = ast.parse(code).body
    return ast.unparse(fresh)


def _with_start(tree: ast.Module, entry_point: str, code: str) -> str:
    fresh, function = _edited(tree, entry_point)
    function.body = ast.parse(code).body + function.body
    return ast.unparse(fresh)


_OFF = """
def _off(x):
    if isinstance(x, bool): return not x
    if isinstance(x, (int, float)): return x + 1
    if isinstance(x, str): return x + "1"
    if isinstance(x, (list, tuple)): return x[:-1] if len(x) else type(x)((1,))
    if isinstance(x, dict): return {**x, "off": 1}
    return 1
"""


def _with_wrapper(tree: ast.Module, entry_point: str) -> str:
    return (
        f"{ast.unparse(tree)}\n{_OFF}\n_right = {entry_point}\ndef {entry_point}(*args): return _off(_right(*args))\n"
    )


_FLIPPED: dict[type, type] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_SWAPPED: dict[type, type] = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Mod: ast.FloorDiv}


def _one_node(tree: ast.Module, entry_point: str) -> Iterator[tuple[str, str]]:
    """The first integer plus one, the first comparison flipped, the first operator swapped, in the entry point."""
    for kind in ("integer plus one", "comparison flipped", "operator swapped"):
        fresh, function = _edited(tree, entry_point)
        for node in (n for statement in function.body for n in ast.walk(statement)):
            if kind == "integer plus one" and isinstance(node, ast.Constant) and type(node.value) is int:
                node.value += 1
            elif kind == "comparison flipped" and isinstance(node, ast.Compare) and type(node.ops[0]) in _FLIPPED:
                node.ops[0] = _FLIPPED[type(node.ops[0])]()
            elif kind == "operator swapped" and isinstance(node, ast.BinOp) and type(node.op) in _SWAPPED:
                node.op = _SWAPPED[type(node.op)]()
            else:
                continue
            yield kind, ast.unparse(fresh)
            break
