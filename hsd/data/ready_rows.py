"""Rows of files that bring their own prompt: the row form itself, and verl's. Pure functions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hsd.data.prompts import bare_question
from hsd.data.rows import TEXTS, Row, Unusable, accepted, check_row
from hsd.hindsight.groups import last_user_text


def ready(raw: dict[str, Any]) -> Row:
    """The row form of `hsd.data.rows`. Numbers become text, a mapping of tests its JSON; columns without a value go."""
    row = {"kind": "code" if raw.get("tests") else "math"} | {c: value for c, value in raw.items() if value is not None}
    row |= {c: str(row[c]) for c in TEXTS if type(row.get(c)) in (int, float)}
    if isinstance(row.get("tests"), Mapping):
        row["tests"] = json.dumps(row["tests"])
    row["answer"] = "" if row["kind"] == "code" and not row.get("answer") else accepted(row.get("answer"))
    if isinstance(row.get("prompt"), str) and not row["prompt"].strip():
        raise Unusable("no question")
    return check_row(row)


def verl(raw: dict[str, Any]) -> Row:
    """verl's: ``prompt`` (messages), ``reward_model`` with ``ground_truth`` (an answer, several, or for programs JSON
    with ``inputs`` and ``outputs``), ``data_source``, ``ability``, ``extra_info``. The prompt stays as it is."""
    reward_model, extra = _mapping(raw["reward_model"]), _mapping(raw.get("extra_info") or {})
    truth = reward_model.get("ground_truth")
    row: Row = {"prompt": raw["prompt"], "source": raw.get("data_source"), "id": _text(extra.get("index"))}
    tests = _tests(truth)
    if tests is not None:
        row |= {"kind": "code", "tests": tests, "answer": _text(extra.get("answer")) or ""}
    else:
        row |= {"answer": truth, "solution": _text(extra.get("answer"))}
    row = ready(row | {"question": _text(extra.get("question"))})
    return {"question": bare_question(last_user_text(row["prompt"]))} | row


def _mapping(value: Any) -> Mapping[str, Any]:
    """A mapping, or its JSON, which is what a CSV cell holds."""
    found = json.loads(value) if isinstance(value, str) else value
    if not isinstance(found, Mapping):
        raise TypeError(f"reward_model, extra_info: expected mappings, got {value!r:.200}")
    return found


def _tests(truth: Any) -> str | None:
    if not isinstance(truth, str | Mapping):
        return None
    try:
        found = json.loads(truth, parse_int=str) if isinstance(truth, str) else truth
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, Mapping) or not {"inputs", "outputs"} <= found.keys():
        return None
    return truth if isinstance(truth, str) else json.dumps(truth)


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
