"""reasoning-gym's generators, by name (``reasoning_gym:NAME,key=value,...``), and their own scorers as a reward.

hsd.data.load("reasoning_gym:number_sorting,max_numbers=4,size=1000,seed=1")

The keys are those of the generator's configuration. Without them ``size`` is 500 and ``seed`` 0. A question depends on
the seed and its number, so that name and number are all that `reasoning_gym_reward` needs. The scorers run in this
process, as the library has them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from hsd.named import nearest
from hsd.verify.answers import final_part
from hsd.verify.status import Completion, check_column, completion_text

PREFIX = "reasoning_gym:"
# Their scorers of version 0.1.25 give the reply to eval or to SymPy's parse_expr: a reply could run any program.
EVALUATES_REPLIES = {
    *("binary_matrix", "countdown", "intermediate_integration", "n_queens", "polynomial_multiplication"),
    *("puzzle24", "simple_integration", "spiral_matrix", "string_insertion"),
}
_SAID = re.compile(r"(?i:\banswer\b(?: is)?)[\s:*]+(\S[^\n]*)")


@lru_cache(maxsize=16)
def generator(name: str) -> Any:
    """reasoning-gym's data set of ``name``. Raises ValueError for a name, key or value that it does not know."""
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise ValueError(
            f'data: expected the package reasoning-gym (pip install "hsd-kernels[gym]") for {name!r}, got {error}'
        ) from error
    kind, *pairs = name.removeprefix(PREFIX).split(",")
    if kind not in DATASETS:
        known = f"{', '.join(sorted(DATASETS))}{nearest(kind, DATASETS)}"
        raise ValueError(f"data: expected a generator among {known}, got {kind!r}")
    if kind in EVALUATES_REPLIES:
        raise ValueError(f"data: expected a generator whose scorer does not run the reply as Python, got {kind!r}")
    config = DATASETS[kind][1]
    keys = config.__dataclass_fields__
    options: dict[str, Any] = {"size": 500, "seed": 0}
    for pair in _whole(pairs):
        key, equals, value = pair.partition("=")
        if not equals or key not in keys:
            known = f"{', '.join(keys)}{nearest(key, keys)}"
            raise ValueError(f"data: expected {kind},key=value with keys {known}, got {pair!r}")
        options[key] = _value(value)
    try:
        return create_dataset(kind, **options)
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"data: expected values that {kind} accepts, got {options} ({error})") from error


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


def _whole(parts: list[str]) -> list[str]:
    """``tasks=["a","b"]`` was split at its own commas: put together what is no JSON without the rest."""
    pairs: list[str] = []
    for part in parts:
        if pairs and pairs[-1].count("[") > pairs[-1].count("]"):
            pairs[-1] += "," + part
        else:
            pairs.append(part)
    return pairs


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
