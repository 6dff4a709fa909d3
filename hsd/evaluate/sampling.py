"""Sampling from a transformers model, as in training. `Sampling` replaces settings that the model declares; the model
keeps its others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from hsd.hindsight.context import tokenize_prompt
from hsd.padding import padded
from hsd.policy.generate import generate
from hsd.progress import Progress


@dataclass(frozen=True)
class Sampling:
    max_new_tokens: int
    temperature: float = 1.0  # 0 takes the most probable token
    top_p: float = 1.0
    batch_size: int = 128
    top_k: int = 0  # 0 keeps all tokens
    min_p: float | None = None  # of the most probable token's probability
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}: expected a positive whole number, got {value!r}")
        if not isinstance(self.temperature, int | float) or not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature: expected a finite number of at least 0, got {self.temperature!r}")
        if not isinstance(self.top_p, int | float) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a number above 0 and at most 1, got {self.top_p!r}")
        if type(self.top_k) is not int or self.top_k < 0:
            raise ValueError(f"top_k: expected a whole number of at least 0, got {self.top_k!r}")
        if self.min_p is not None and not (isinstance(self.min_p, int | float) and 0 <= self.min_p <= 1):
            raise ValueError(f"min_p: expected None or a number in [0, 1], got {self.min_p!r}")
        if not isinstance(self.repetition_penalty, int | float) or not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty: expected a number above 0, got {self.repetition_penalty!r}")


CHOICE = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # how a token is chosen


def choice_of(config: Any) -> dict[str, Any]:
    """The fields of `Sampling` that a `GRPOConfig` decides."""
    return {name: getattr(config, name) for name in CHOICE}


@torch.no_grad()
def sample(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    sampling: Sampling,
    *,
    seed: int,
    progress: Progress | None = None,
) -> list[list[int]]:
    """One rollout per prompt: token ids up to and including the first end token. The caller's RNG is left alone."""
    ids = [tokenize_prompt(tokenizer, p) for p in prompts]
    return sample_from_ids(model, tokenizer, ids, sampling, seed=seed, progress=progress)


@torch.no_grad()
def sample_from_ids(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    seed: int,
    progress: Progress | None = None,
) -> list[list[int]]:
    """`sample` on prompts that are token ids already."""
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: expected a number of 64 bits, got {seed}")
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            rollouts: list[list[int]] = []
            for start in range(0, len(prompt_ids), sampling.batch_size):
                rollouts += _sample_batch(model, tokenizer, prompt_ids[start : start + sampling.batch_size], sampling)
                if progress is not None:
                    progress(len(rollouts), len(prompt_ids))
            return rollouts
    finally:
        model.train(was_training)


def _sample_batch(model: Any, tokenizer: Any, ids: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
    end_ids = end_token_ids(model, tokenizer)
    pad_id = next(i for i in (tokenizer.pad_token_id, *end_ids, 0) if i is not None)  # masked: any token will do
    input_ids, mask = padded(ids, pad_id, "left")
    choice: dict[str, Any] = {"do_sample": False, "repetition_penalty": sampling.repetition_penalty}
    if sampling.temperature > 0:
        choice = {"do_sample": True} | choice_of(sampling)
    out = generate(
        model,
        input_ids.to(model.device),
        mask.to(model.device),
        max_new_tokens=sampling.max_new_tokens,
        pad_id=pad_id,
        end_ids=end_ids,
        **choice,
    )
    return [until_end(row, end_ids) for row in out[:, input_ids.shape[1] :].tolist()]


def end_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends a rollout: the tokenizer's and those the model declares; none where neither has one."""
    return all_end_ids(model.generation_config.eos_token_id, tokenizer)


def all_end_ids(declared: int | list[int] | None, tokenizer: Any) -> list[int]:
    ends = [tokenizer.eos_token_id, *(declared if isinstance(declared, list) else [declared])]
    return sorted({i for i in ends if i is not None})


def is_truncated(rollout: Sequence[int], end_ids: Sequence[int]) -> bool:
    """Whether a rollout stopped at its limit, and not with an end token."""
    return not rollout or rollout[-1] not in end_ids


def until_end(ids: list[int], end_ids: Sequence[int]) -> list[int]:
    """The tokens up to and including the first that ends a rollout."""
    for t, token in enumerate(ids):
        if token in end_ids:
            return ids[: t + 1]
    return ids
