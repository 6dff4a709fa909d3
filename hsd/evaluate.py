"""Sampling and scoring outside of training: success on held-out questions with an interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from hsd.context import tokenize_prompt

RewardFn = Callable[..., list[float]]


@dataclass(frozen=True)
class Sampling:
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int = 128


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


@torch.no_grad()
def sample(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    sampling: Sampling,
    *,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """One rollout per prompt: token ids up to and including the first end token. The caller's RNG is left alone."""
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            rollouts: list[list[int]] = []
            for start in range(0, len(prompts), sampling.batch_size):
                rollouts += _sample_batch(model, tokenizer, prompts[start : start + sampling.batch_size], sampling)
                if progress is not None:
                    progress(len(rollouts), len(prompts))
            return rollouts
    finally:
        model.train(was_training)


def _sample_batch(model: Any, tokenizer: Any, prompts: Sequence[Any], sampling: Sampling) -> list[list[int]]:
    pad_id, end_ids = tokenizer.pad_token_id, end_token_ids(model, tokenizer)
    ids = [tokenize_prompt(tokenizer, p) for p in prompts]
    width = max(map(len, ids))
    out = model.generate(
        input_ids=torch.tensor([[pad_id] * (width - len(x)) + list(x) for x in ids], device=model.device),
        attention_mask=torch.tensor([[0] * (width - len(x)) + [1] * len(x) for x in ids], device=model.device),
        do_sample=True,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=0,
        repetition_penalty=1.0,  # as in training: a model may declare another one
        max_new_tokens=sampling.max_new_tokens,
        pad_token_id=pad_id,
        eos_token_id=end_ids,
    )
    return [_until_end(row, end_ids) for row in out[:, width:].tolist()]


def end_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends a rollout: the tokenizer's and those the model declares."""
    declared = model.generation_config.eos_token_id
    declared = declared if isinstance(declared, list) else [] if declared is None else [declared]
    return sorted({tokenizer.eos_token_id, *declared})


def score(
    tokenizer: Any, questions: Sequence[dict], rollouts: Sequence[Sequence[int]], reward: RewardFn
) -> list[float]:
    """Rewards of one rollout per question, called as TRL calls a reward function."""
    completions: list[Any] = tokenizer.batch_decode([list(r) for r in rollouts], skip_special_tokens=True)
    if questions and not isinstance(questions[0]["prompt"], str):
        completions = [[{"role": "assistant", "content": text}] for text in completions]
    return reward(
        completions=completions,
        completion_ids=[list(r) for r in rollouts],
        prompts=[q["prompt"] for q in questions],
        answer=[q["answer"] for q in questions],
    )


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


def _until_end(ids: list[int], end_ids: list[int]) -> list[int]:
    for t, token in enumerate(ids):
        if token in end_ids:
            return ids[: t + 1]
    return ids
