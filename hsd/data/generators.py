"""Questions of reasoning-gym's generators, by name: ``reasoning_gym:NAME,key=value,...``.

load("reasoning_gym:number_sorting,max_numbers=4,size=1000,seed=1")

The keys are those of the generator's configuration. Without them ``size`` is 500 and ``seed`` 0. A question depends on
the seed and its number, so that name and number are all that `hsd.verify.reasoning_gym_reward` needs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

PREFIX = "reasoning_gym:"
# Their scorers of version 0.1.25 give the reply to eval or to SymPy's parse_expr: a reply could run any program.
EVALUATES_REPLIES = {
    *("binary_matrix", "countdown", "intermediate_integration", "n_queens", "polynomial_multiplication"),
    *("puzzle24", "simple_integration", "spiral_matrix", "string_insertion"),
}


@lru_cache(maxsize=16)
def generator(name: str) -> Any:
    """reasoning-gym's data set of ``name``. Raises ValueError for a name, key or value that it does not know."""
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise ValueError(f"data: expected the package reasoning-gym for {name!r}, got {error}") from error
    kind, *pairs = name.removeprefix(PREFIX).split(",")
    if kind not in DATASETS:
        raise ValueError(f"data: expected a generator among {', '.join(sorted(DATASETS))}, got {kind!r}")
    if kind in EVALUATES_REPLIES:
        raise ValueError(f"data: expected a generator whose scorer does not run the reply as Python, got {kind!r}")
    config = DATASETS[kind][1]
    options: dict[str, Any] = {"size": 500, "seed": 0}
    for pair in _whole(pairs):
        key, equals, value = pair.partition("=")
        if not equals or key not in config.__dataclass_fields__:
            raise ValueError(f"data: expected {kind},key=value with keys {_keys(config)}, got {pair!r}")
        options[key] = _value(value)
    try:
        return create_dataset(kind, **options)
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"data: expected values that {kind} accepts, got {options} ({error})") from error


def generated(name: str, limit: int | None) -> Iterator[dict[str, Any]]:
    """The generator's questions as raw rows. Without ``limit`` its ``size`` says how many."""
    data = generator(name)
    for index in range(min(len(data), limit or len(data))):
        entry = data[index]
        row = {"prompt": entry["question"], "question": entry["question"], "answer": entry["answer"]}
        yield row | {"kind": "generated", "generator": name, "id": str(index)}


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


def _keys(config: Any) -> str:
    return ", ".join(config.__dataclass_fields__)
