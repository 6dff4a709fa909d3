"""Rows of the mathematical data sets, each from one row as its hub repository documents it. Pure functions."""

from __future__ import annotations

import re
from math import isfinite
from typing import Any

from hsd.data.prompts import bare_question, math_prompt
from hsd.data.rows import Row, Unusable, accepted, answer_text
from hsd.verify.answers import extract_answer, is_boxed
from hsd.verify.spelling import normalized


def last_boxed(text: str) -> str | None:
    r"""The content of the last ``\boxed{...}`` (or ``\fbox``), braces balanced; ``\boxed 5`` gives ``5``."""
    return extract_answer(text) if is_boxed(text) else None


def gsm8k(raw: dict[str, Any]) -> Row:
    """openai/gsm8k: ``question``, ``answer`` (worked, ends in ``#### n``). Without ``####`` it is the answer itself."""
    answer = accepted(raw["answer"])
    if isinstance(answer, list) or "####" not in answer:
        return _row(raw["question"], answer)
    solution, _, final = answer.rpartition("####")
    # <<48/2=24>> is a note for a calculator, not part of the text.
    return _row(raw["question"], normalized(final), solution=re.sub(r"<<[^<>]*>>", "", solution).strip())


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


def _row(question: Any, answer: Any, **rest: Any) -> Row:
    if not isinstance(question, str | None):
        raise TypeError(f"question: expected a string, got {question!r:.200}")
    question = bare_question(question or "")
    if not question:
        raise Unusable("no question")
    row = {"prompt": math_prompt(question), "answer": accepted(answer), "question": question, "kind": "math"}
    return row | {key: str(value) for key, value in rest.items() if value is not None}
