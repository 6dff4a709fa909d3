"""A trainer's padded batch as a pack, and states per rollout as a padded batch again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hsd.policy.body_and_head import Split
from hsd.policy.tree.forward import Pack, make_pack

PAYS = 1.25  # unshared tokens per token of the tree; below it the tree was not faster on a CPU


def token_lists(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The tokens of each row of a padded batch (B, T) on either side of its padding."""
    return [
        [t for t, m in zip(row, keep, strict=True) if m] for row, keep in zip(ids.tolist(), mask.tolist(), strict=True)
    ]


def pack_batch(batch: dict[str, Any], sharing: str, rows: Sequence[int] | None = None) -> Pack:
    """The pack of a GRPO batch with teacher prompts, or of some of its rows."""
    at = slice(None) if rows is None else list(rows)
    prompts, rollouts, teacher = (
        token_lists(batch[f"{name}_ids"][at], batch[f"{name}_mask"][at])
        for name in ("prompt", "completion", "teacher_prompt")
    )
    return make_pack(prompts, rollouts, teacher, sharing=sharing)


def pays(pack: Pack, batch: dict[str, Any], live_teacher: bool) -> bool:
    """Whether the tree saves enough of what the unshared forwards compute, padding included."""
    teacher = pack.teacher_only if live_teacher else pack.teacher_nodes
    names = ("prompt_ids", "completion_ids", "teacher_prompt_ids", "completion_ids")
    unshared = sum(batch[name].numel() for name in names)
    return unshared >= PAYS * (len(pack.student_nodes) + len(teacher))


def pad_states(split: Split, states: Sequence[Tensor], length: int) -> Tensor:
    """(B, length, D), 0 behind each rollout's end, as `hsd.train.update.read_rollouts` gives them to the head."""
    hidden = pad_sequence(list(states), batch_first=True)
    hidden = torch.nn.functional.pad(hidden, (0, 0, 0, length - hidden.shape[1]))
    return hidden if torch.is_autocast_enabled(hidden.device.type) else hidden.to(split.weight.dtype)


def shuffle_groups(batch: dict[str, Any], size: int) -> dict[str, Any]:
    """Whole groups of ``size`` rows change places. Rows that are not whole groups (a rank's share) stay in order.

    The groups' order is that of their first rows in TRL's shuffle of all rows: what is sampled next is the same with
    and without the tree.
    """
    n = len(batch["completion_ids"])
    shuffled = torch.randperm(n)
    order = torch.arange(n)
    if n % size == 0:
        order = order.reshape(-1, size)[list(dict.fromkeys((shuffled // size).tolist()))].flatten()

    def permuted(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[order.to(value.device)] if value.ndim else value
        return [value[i] for i in order.tolist()] if isinstance(value, list) else value

    return {key: permuted(value) for key, value in batch.items()}
