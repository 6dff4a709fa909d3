"""Success on held-out questions with an interval, for the demo: one reward function, everything in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hsd.data.rows import completions_of, reward_columns
from hsd.evaluate.interval import share, with_interval
from hsd.evaluate.sampling import is_truncated

RewardFn = Callable[..., Sequence[float | None]]


@dataclass(frozen=True)
class Success:
    """Share of successes over ``questions`` x ``samples``, with a 95 % interval over questions (`interval.share`)."""

    mean: float
    low: float
    high: float
    questions: int
    samples: int
    truncated: float
    mean_length: float

    def __str__(self) -> str:
        return with_interval(self.mean, self.low, self.high)


def score(
    tokenizer: Any, questions: Sequence[dict], rollouts: Sequence[Sequence[int]], reward: RewardFn
) -> Sequence[float | None]:
    """Rewards of one rollout per question, called as TRL calls a reward function: with every column there is."""
    if not questions:
        return []
    ids = [list(rollout) for rollout in rollouts]
    completions = completions_of(questions, tokenizer.batch_decode(ids, skip_special_tokens=True))
    return reward(completions=completions, completion_ids=ids, **reward_columns(questions))


def success(
    rewards: Sequence[float | None], rollouts: Sequence[Sequence[int]], samples: int, end_ids: list[int]
) -> Success:
    """Summary of ``samples`` consecutive rollouts per question, with rewards from 0 to 1, or None without a verdict."""
    grid = [rewards[at : at + samples] for at in range(0, len(rewards), samples)]
    found = share(grid)
    return Success(
        mean=found.mean,
        low=found.low,
        high=found.high,
        questions=len(grid),
        samples=samples,
        truncated=sum(is_truncated(r, end_ids) for r in rollouts) / len(rollouts),
        mean_length=sum(map(len, rollouts)) / len(rollouts),
    )
