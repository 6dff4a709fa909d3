"""Rows of the mathematical data sets, each from one row as its hub repository documents it. Pure functions."""

from __future__ import annotations

import re
from math import isfinite
from typing import Any

from hsd.data.prompts import bare_question, math_prompt
from hsd.data.rows import Row
from hsd.verify.answers import extract_answer, is_boxed


class Unusable(Exception):
    """The row cannot be verified: a proof, no answer, no tests. The message is the reason, counted by the loader."""


def last_boxed(text: str) -> str | None:
    r"""The content of the last ``\boxed{...}`` (or ``\fbox``), braces balanced; ``\boxed 5`` gives ``5``."""
    return extract_answer(text) if is_boxed(text) else None


def gsm8k(raw: dict[str, Any]) -> Row:
    """openai/gsm8k: ``question``, ``answer`` (worked, ends in ``#### n``). Without ``####`` it is the answer itself."""
    text = answer_text(raw["answer"])
    solution, mark, final = text.rpartition("####")
    answer = re.sub(r"(?<=\d),(?=\d{3})", "", final.strip()) if mark else text
    # <<48/2=24>> is a note for a calculator, not part of the text.
    return _row(raw["question"], answer, solution=re.sub(r"<<[^<>]*>>", "", solution).strip() if mark else None)


def math(raw: dict[str, Any]) -> Row:
    """EleutherAI/hendrycks_math (``problem``, ``level``, ``type``, ``solution``), HuggingFaceH4/MATH-500 (also
    ``answer``, ``unique_id``), HuggingFaceH4/aime_2024 and math-ai/aime25 (``problem``, ``answer``, ``id``).

    Without ``answer`` it is the last boxed expression of the solution.
    """
    solution = raw.get("solution")
    answer = raw["answer"] if "answer" in raw else last_boxed(solution or "")
    level = raw.get("level")
    return _row(
        raw["problem"],
        answer,
        solution=solution,
        id=raw.get("unique_id", raw.get("id")),
        level=str(level).removeprefix("Level ") if level is not None else None,
    )


def numina(raw: dict[str, Any]) -> Row:
    """AI-MO/NuminaMath-1.5 (``problem``, ``solution``, ``answer``, ``question_type``, ``problem_is_valid``,
    ``solution_is_valid``, ``source``) and AI-MO/NuminaMath-CoT (``source``, ``problem``, ``solution``, ``messages``).

    Proofs, missing answers and rows that the data set marks as invalid are unusable.
    """
    answer = raw["answer"] if "answer" in raw else last_boxed(raw["solution"])
    if raw.get("question_type") == "proof" or str(answer).strip().lower() == "proof":
        raise Unusable("a proof")
    if str(answer).strip().lower() in ("notfound", "none", ""):
        raise Unusable("no answer")
    if any(raw.get(column, "Yes") != "Yes" for column in ("problem_is_valid", "solution_is_valid")):
        raise Unusable("marked invalid by the data set")
    return _row(raw["problem"], answer, solution=raw.get("solution"), level=raw.get("source"))


def svamp(raw: dict[str, Any]) -> Row:
    """ChilleD/SVAMP: ``Body``, ``Question``, ``Answer`` (a number as text or float), ``Type``, ``ID``."""
    body = raw["Body"].strip()
    stop = "" if body.endswith((".", ",", "?", "!", ";", ":")) else "."
    number = float(answer_text(raw["Answer"]))
    if not isfinite(number):
        raise Unusable("no finite answer")
    answer = str(int(number)) if number.is_integer() else repr(number)
    return _row(f"{body}{stop} {raw['Question'].strip()}", answer, id=raw.get("ID"), level=raw.get("Type"))


def answer_text(answer: Any) -> str:
    """The answer without space around it. Raises `Unusable` where there is none, TypeError for a list and the like."""
    if answer is not None and (isinstance(answer, bool) or not isinstance(answer, str | int | float)):
        raise TypeError(f"answer: expected a string or a number, got {answer!r:.200}")
    if answer is None or answer != answer or not str(answer).strip():  # NaN is a table's None
        raise Unusable("no answer")
    return str(answer).strip()


def _row(question: str, answer: Any, **rest: Any) -> Row:
    answer, question = answer_text(answer), bare_question(question)
    row = {"prompt": math_prompt(question), "answer": answer, "question": question, "kind": "math"}
    return row | {key: str(value) for key, value in rest.items() if value is not None}
