"""Success on held-out questions with an interval, for the demo: one reward function, everything in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

RewardFn = Callable[..., list[float]]


@dataclass(frozen=True)
class Success:
    """Share of successes over ``questions`` x ``samples``, with a 95 % bootstrap interval over questions."""

    mean: float
    low: float
    high: float
    questions: int
    samples: int
    truncated: float
    mean_length: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def score(
    tokenizer: Any, questions: Sequence[dict], rollouts: Sequence[Sequence[int]], reward: RewardFn
) -> list[float]:
    """Rewards of one rollout per question, called as TRL calls a reward function: with every column there is."""
    if not questions:
        return []
    completions: list[Any] = tokenizer.batch_decode([list(r) for r in rollouts], skip_special_tokens=True)
    if not isinstance(questions[0]["prompt"], str):
        completions = [[{"role": "assistant", "content": text}] for text in completions]
    columns = {name: [q.get(name) for q in questions] for name in questions[0]}
    prompts = columns.pop("prompt")
    return reward(completions=completions, completion_ids=[list(r) for r in rollouts], prompts=prompts, **columns)


def success(rewards: Sequence[float], rollouts: Sequence[Sequence[int]], samples: int, end_ids: list[int]) -> Success:
    """Summary of ``samples`` consecutive rollouts per question."""
    r = torch.tensor(rewards, dtype=torch.float64).reshape(-1, samples).mean(1)
    g = torch.Generator().manual_seed(0)
    means = torch.stack([r[torch.randint(len(r), (len(r),), generator=g)].mean() for _ in range(2000)])
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Success(
        mean=r.mean().item(),
        low=low,
        high=high,
        questions=len(r),
        samples=samples,
        truncated=sum(x[-1] not in end_ids for x in rollouts) / len(rollouts),
        mean_length=sum(map(len, rollouts)) / len(rollouts),
    )
