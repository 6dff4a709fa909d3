"""Mathematical answers: read in one order (`hsd.verify.answers`), compared in one order (`hsd.verify.values`), and by
SymPy in a process that is killed when its time is over."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from hsd.verify.answers import extract_answer, final_part, is_boxed
from hsd.verify.quantities import read_number, same_number
from hsd.verify.spelling import same_text
from hsd.verify.status import Completion, Result, Status, check_column, completion_text, in_order, rewards
from hsd.verify.sympy_pool import SERVERS
from hsd.verify.values import equal, read_choice

TIMEOUT = 5.0  # seconds of CPU time for one comparison
MAX_ANSWER = 1_000  # characters; the longest gold answer of MATH-500 has 53
MAX_DIGITS = 100_000
Gold = str | int | float | Sequence[Any] | Mapping[str, Any]


def math_reward(completions: Sequence[Completion], answer: Sequence[Gold], **columns: Any) -> list[float | None]:
    """1.0 where the completion's answer equals `answer` (see `verify_math`), else 0.0; a TRL reward function.

    None where the verifier failed, with a warning, and for rows of another kind: those that have ``tests``
    (`hsd.verify.code_reward`). The order is kept.
    """
    return math_reward_with()(completions, answer, **columns)


def math_reward_with(
    *, timeout: float = TIMEOUT, tolerance: float | None = None, workers: int | None = None
) -> Callable[..., list[float | None]]:
    """`math_reward` with the options of `verify_math` and the number of processes, by default one per core.

    The keywords of a reward function are the data set's columns, whatever their names are.
    """

    def math_reward(completions: Sequence[Completion], answer: Sequence[Gold], **columns: Any) -> list[float | None]:
        check_column("answer", answer, completions)
        texts = [completion_text(c) for c in completions]
        other = columns.get("tests") or [None] * len(texts)
        mine = [i for i, tests in enumerate(other) if not tests]
        judged = in_order(
            lambda i: verify_math(texts[i], answer[i], timeout=timeout, tolerance=tolerance), mine, workers
        )
        results = dict(zip(mine, judged, strict=True))
        return rewards("math", [results.get(i) for i in range(len(texts))], columns)

    return math_reward


def choice_reward(completions: Sequence[Completion], answer: Sequence[str], **columns: Any) -> list[float | None]:
    """1.0 where the completion chooses the letter `answer` (see `verify_choice`), else 0.0; a TRL reward function."""
    check_column("answer", answer, completions)
    texts = [completion_text(c) for c in completions]
    return rewards("choice", in_order(lambda i: verify_choice(texts[i], str(answer[i])), range(len(texts)), 1), columns)


def verify_math(text: str, gold: Gold, *, timeout: float = TIMEOUT, tolerance: float | None = None) -> Result:
    """Whether the answer in `text` equals `gold`: an answer, or a solution that ends in one (``\\boxed{}``, ``####``);
    a list of accepted answers, of which one is enough; a mapping with ``ground_truth`` (verl) or ``target``.

    Equal means, in this order: the same spelling after normalization; the same exact number, list, interval or words;
    equal to math-verify 0.9 (SymPy) within `timeout` seconds of CPU time, and then, if both are numbers, within a
    relative difference of 1e-6. Where SymPy cannot read one of the two, the comparison before it decides.
    `tolerance` is a relative difference that two numbers may have, by default none.
    ``verifier_failed``: no gold answer, or the process that asks SymPy did not start, was killed or got no CPU time.
    """
    try:
        targets = [t for t in map(_target, accepted_answers(gold)) if t]
    except (TypeError, ValueError) as error:
        return Result(Status.VERIFIER_FAILED, str(error)[:500])
    if not targets:
        return Result(Status.VERIFIER_FAILED, "gold: expected an answer, got a blank one")
    answer = extract_answer(text)
    if answer is None:
        return Result(Status.NO_ANSWER)
    results = []
    for target in targets:
        results.append(_compare(target, answer, timeout, tolerance))
        if results[-1].status is Status.CORRECT:
            return results[-1]
    failed = [r for r in results if r.status is Status.VERIFIER_FAILED]
    return (failed or results)[0]


def verify_choice(text: str, gold: str) -> Result:
    """Whether `text` chooses the letter of `gold`: "C", "(C)", "(C) 12". Options that are named must agree."""
    target = read_choice(_target(gold))
    if target is None:
        return Result(Status.VERIFIER_FAILED, f"gold: expected a letter, got {gold!r:.100}")
    answer = extract_answer(text)
    given = read_choice(answer) if answer else None
    if given is None:
        part = (final_part(text) or "").strip().splitlines()
        letters = (
            set(re.findall(r"(?<![\w'])\(?([A-J])\)?(?![\w'])(?!(?<=[AI])\s+(?!or\b|and\b)[a-z])", part[-1]))
            if part
            else set()
        )
        letters |= set(re.findall(r"(?i:option|choice)\s+\(?([A-J])\b", part[-1])) if part else set()
        if len(letters) != 1:
            return Result(Status.NO_ANSWER)
        given = (letters.pop(), "")
    right = target[0] == given[0] and (not target[1] or not given[1] or same_text(target[1], given[1]))
    return Result(Status.CORRECT if right else Status.INCORRECT)


def accepted_answers(gold: Gold) -> list[str]:
    """The accepted answers as text: of a list each, of verl's ``{"ground_truth": ...}`` what it holds."""
    if isinstance(gold, Mapping):
        for name in ("ground_truth", "target", "answer"):
            if name in gold:
                return accepted_answers(gold[name])
        raise TypeError(f"gold: expected a mapping with ground_truth, got the keys {sorted(map(str, gold))}")
    if isinstance(gold, int) and not isinstance(gold, bool):
        return [f"{Decimal(gold):f}"]  # str() refuses more than 4,300 digits
    if isinstance(gold, str | float):
        return [str(gold)]
    if isinstance(gold, Sequence):
        return [text for one in gold for text in accepted_answers(one)]
    raise TypeError(f"gold: expected a string, a number or a list of them, got {type(gold).__name__}")


def _target(gold: str) -> str:
    return (extract_answer(gold) or "" if is_boxed(gold) or "####" in gold else gold).strip()


class _Ended(Exception):
    def __init__(self, result: Result):
        self.result = result


def _compare(target: str, answer: str, timeout: float, tolerance: float | None) -> Result:
    if max(len(target), len(answer)) > MAX_ANSWER:
        return _compare_long(target, answer)
    deadline = time.monotonic() + 3 * timeout  # a list asks more than once

    def ask(left: str, right: str) -> bool:
        reply = SERVERS.ask(left, right, timeout, tolerance)
        if "equal" in reply:
            if time.monotonic() > deadline and not reply["equal"]:
                raise _Ended(Result(Status.TIMEOUT, "in SymPy"))
            return reply["equal"]
        if "error" in reply:  # what SymPy cannot read is compared as text, and was
            return False
        status = {"timeout": Status.TIMEOUT, "died": Status.CRASHED}.get(reply.get("ended", ""), Status.VERIFIER_FAILED)
        raise _Ended(Result(status, f"in SymPy: {reply}"))

    try:
        return Result(Status.CORRECT if equal(target, answer, ask, tolerance) else Status.INCORRECT)
    except _Ended as ended:
        return ended.result


def _compare_long(target: str, answer: str) -> Result:
    """Answers over 1,000 characters: numbers digit by digit, others by their spelling."""
    digits = re.compile(r"[-+]?[\d,]*\.?\d+")
    if len(target) > MAX_ANSWER and not (digits.fullmatch(target) and len(target) <= MAX_DIGITS):
        return Result(Status.VERIFIER_FAILED, f"gold: expected at most {MAX_ANSWER} characters, got {len(target)}")
    if len(answer) > MAX_ANSWER and not (digits.fullmatch(answer) and len(answer) <= MAX_DIGITS):
        return Result(Status.TOO_LONG, f"an answer of {len(answer)} characters")
    left, right = read_number(target), read_number(answer)
    same = left is not None and right is not None and same_number(left, right)
    return Result(Status.CORRECT if same else Status.INCORRECT)
