"""reasoning-gym's own scorers as a reward. They run in this process, as the library has them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from hsd.data.generators import generator
from hsd.verify.answers import final_part
from hsd.verify.status import Completion, check_column, completion_text

_SAID = re.compile(r"(?i:\banswer\b(?: is)?)[\s:*]+(\S[^\n]*)")


def reasoning_gym_reward(
    completions: Sequence[Completion], generator: Sequence[str], id: Sequence[str], **columns: Any
) -> list[float]:
    """What the scorer of the question's generator gives its reply, from 0.0 to 1.0; a TRL reward function.

    Args:
        generator: names of `hsd.data.load`, such as ``reasoning_gym:gcd,max_value=20``, one a reply.
        id: the number of each question in its generator.

    Many scorers give a part of 1.0 for a wrong answer of the right form. `final_text` is what is scored.
    """
    check_column("generator", generator, completions)
    check_column("id", id, completions)
    replies = map(completion_text, completions)
    return [_score(*asked) for asked in zip(replies, generator, id, strict=True)]


def reasoning_gym_success(completions: Sequence[Completion], **columns: Any) -> list[float]:
    """1.0 where `reasoning_gym_reward` is 1, else 0.0: for an evaluation, which counts successes."""
    return [float(score == 1.0) for score in reasoning_gym_reward(completions, **columns)]


def _score(reply: str, name: str, index: str) -> float:
    data = generator(name)
    return float(data.score_answer(final_text(reply), data[int(index)]))


def final_text(reply: str) -> str | None:
    """What a reply ends on, as it stands: the last ``<answer>``, what follows the last "answer is" or "answer:", or the
    last line. None where there is nothing, or where a thought is still open."""
    part = final_part(reply)
    if part is None or not part.strip():
        return None
    if "<answer>" in reply.lower():
        return part.strip()
    said = _SAID.findall(part)
    text = said[-1] if said else part.strip().splitlines()[-1]
    return text.strip().removesuffix(".").strip("*`\"' ")
