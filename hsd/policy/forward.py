"""Forward passes over rollouts, each sequence by itself: the states that predict a rollout's tokens.

`hsd.policy.tree` gives the same states with every shared prefix computed once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hsd.policy.body_and_head import BodyAndHead, hidden_states
from hsd_kernels import Head


@dataclass(frozen=True)
class FrozenStates:
    """What the teacher or the reference makes of the rollouts, without gradient."""

    hidden: Tensor  # (B, T, D), at the positions that predict the rollouts' tokens
    head: Head | None = None  # that these states go through; None is the student's


@dataclass(frozen=True)
class Prompts:
    """Token ids (B, P), padded on the left, and their mask (B, P)."""

    ids: Tensor
    mask: Tensor


@dataclass(frozen=True)
class RolloutInputs:
    """Rollouts (B, T), padded on the right, and the prompts they follow: the "student"'s and, but for methods without
    one, the "teacher"'s. With K contexts a rollout the latter has K B rows, those of the first context first."""

    prompts: Mapping[str, Prompts]
    completion_ids: Tensor  # (B, T)
    completion_mask: Tensor  # (B, T)

    @property
    def length(self) -> int:
        """T."""
        return self.completion_ids.shape[1]

    def rows(self, index: Sequence[int]) -> RolloutInputs:
        at, size = list(index), len(self.completion_ids)

        def some(p: Prompts) -> Prompts:
            rows = [k * size + i for k in range(len(p.ids) // size) for i in at]
            return Prompts(p.ids[rows], p.mask[rows])

        prompts = {who: some(p) for who, p in self.prompts.items()}
        return RolloutInputs(prompts, self.completion_ids[at], self.completion_mask[at])

    def forward(self, parts: BodyAndHead, who: str) -> Tensor:
        """(B, T, D), or (K B, T, D): `forward_rollouts` behind the prompts of ``who``."""
        prompts = self.prompts[who]
        times = len(prompts.ids) // max(1, len(self.completion_ids))
        ids = torch.cat([prompts.ids, self.completion_ids.repeat(times, 1)], 1)
        mask = torch.cat([prompts.mask, self.completion_mask.repeat(times, 1)], 1)
        return forward_rollouts(parts, ids, mask, self.length)


def forward_rollouts(parts: BodyAndHead, input_ids: Tensor, attention_mask: Tensor, length: int) -> Tensor:
    """States (B, length, D) that predict the last ``length`` tokens of ``input_ids`` (B, S): left-padded prompts, each
    followed by a rollout. In the head's dtype, or, under autocast, in the body's."""
    hidden = hidden_states(parts.body, input_ids, attention_mask)[:, -(length + 1) : -1]
    return in_head_dtype(parts, hidden)


def in_head_dtype(parts: BodyAndHead, hidden: Tensor) -> Tensor:
    """A body that normalises in fp32 may hand back a wider dtype than the head's; autocast settles it otherwise."""
    autocast = torch.is_autocast_enabled(hidden.device.type)
    return hidden if autocast else hidden.to(parts.linear.weight.dtype)


def with_own_head(parts: BodyAndHead, hidden: Tensor) -> FrozenStates:
    """States (B, T, D) of another model than the student, with its head, detached."""
    head = parts.head
    bias = None if head.bias is None else head.bias.detach()
    return FrozenStates(hidden, head.with_tensors(head.weight.detach(), bias))
