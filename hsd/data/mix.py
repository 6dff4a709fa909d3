"""Difficulty bins from pass rates, and mixing of streams by ratio."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from hsd.data.rows import Row
from hsd.named import nearest

EASY, HARD = 0.5, 0.2


def difficulty(pass_rate: float) -> str:
    """``"easy"`` above 0.5, ``"hard"`` below 0.2, else ``"medium"`` (the bins of arXiv 2606.15576)."""
    if not 0 <= pass_rate <= 1:
        raise ValueError(f"pass_rate: expected a share from 0 to 1, got {pass_rate}")
    return "easy" if pass_rate > EASY else "hard" if pass_rate < HARD else "medium"


def with_difficulty(rows: Sequence[Row], samples: Iterable[dict[str, Any]]) -> list[Row]:
    """The rows with ``pass_rate`` and ``difficulty``, from the lines of an evaluation's ``samples.jsonl`` on them.

    A row of which the verifier judged no sample gets neither. Raises ValueError where the samples are of other rows.
    """
    rewards: dict[int, list[float]] = defaultdict(list)
    for record in samples:
        if missing := {"row", "id", "answer", "reward"} - record.keys():
            raise ValueError(
                f"samples: expected a column {min(missing)!r}{nearest(min(missing), record)}, got {sorted(record)}"
            )
        at, reward = record["row"], record["reward"]
        if (
            type(at) is not int
            or not 0 <= at < len(rows)
            or (record["id"], record["answer"]) != (rows[at].get("id"), rows[at]["answer"])
        ):
            raise ValueError(f"samples: expected those of these {len(rows)} rows, got row {at!r}, id {record['id']!r}")
        if reward is not None and type(reward) not in (int, float):
            raise TypeError(f"reward: expected a number or None, got {reward!r} for row {at}")
        if reward is not None:
            rewards[at].append(reward)
    rates = {at: sum(values) / len(values) for at, values in rewards.items()}
    return [
        row | {"pass_rate": rates[at], "difficulty": difficulty(rates[at])} if at in rates else dict(row)
        for at, row in enumerate(rows)
    ]


def mix(streams: Sequence[Sequence[Row]], ratio: Sequence[int], *, seed: int, length: int | None = None) -> list[Row]:
    """One list in which the streams alternate by ``ratio``: after any n rows, two streams are within one row of theirs.

    Each stream is shuffled by ``seed``, and again each time it has been used up. The result is a plain list, the same
    for the same arguments, so a run that resumes at row n goes on with the same rows.

    Args:
        streams: For instance mathematical and programming questions.
        ratio: Positive integers, one per stream: ``(4, 1)``.
        length: Rows in all; by default as many as there are before any row would come twice.
    """
    if len(streams) != len(ratio) or any(r < 1 for r in ratio):
        raise ValueError(f"ratio: expected a positive integer for each of {len(streams)} streams, got {list(ratio)}")
    if any(len(stream) == 0 for stream in streams):
        raise ValueError(f"streams: expected at least one row in each, got {[len(s) for s in streams]}")
    if length is not None and length < 0:
        raise ValueError(f"length: expected a number of rows or None, got {length}")
    total, used = sum(ratio), [0] * len(streams)
    orders: list[list[int]] = [[] for _ in streams]
    mixed: list[Row] = []
    while length is None or len(mixed) < length:
        # The stream that is furthest behind its share of the next row.
        k = max(range(len(streams)), key=lambda i: (ratio[i] * (len(mixed) + 1) - total * used[i], -i))
        at, epoch = used[k] % len(streams[k]), used[k] // len(streams[k])
        if epoch and length is None:
            return mixed
        if at == 0:
            orders[k] = list(range(len(streams[k])))
            random.Random(f"mix-{seed}-{k}-{epoch}").shuffle(orders[k])
        mixed.append(streams[k][orders[k][at]])
        used[k] += 1
    return mixed
