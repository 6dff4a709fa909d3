"""Padded rollouts as a tree, and states per rollout as a padded batch again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hsd.policy.body_and_head import BodyAndHead
from hsd.policy.forward import RolloutInputs, in_head_dtype
from hsd.policy.tree.forward import TreeBatch, make_tree_batch

PAYS = 1.25  # unshared tokens per token of the tree; below it the tree's bookkeeping may cost what it saves


def token_lists(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The tokens of each row of a padded batch (B, T) on either side of its padding."""
    return [row[keep].tolist() for row, keep in zip(ids, mask.bool(), strict=True)]


def tree_of(inputs: RolloutInputs, sharing: str) -> TreeBatch:
    """The tree of all student and teacher sequences."""
    student, teacher = (
        token_lists(inputs.prompts[who].ids, inputs.prompts[who].mask) if who in inputs.prompts else []
        for who in ("student", "teacher")
    )
    rollouts = token_lists(inputs.completion_ids, inputs.completion_mask)
    return make_tree_batch(student, rollouts, teacher, sharing=sharing)


def pays(tree: TreeBatch, inputs: RolloutInputs, live_teacher: bool) -> bool:
    """Whether the tree saves enough of what separate forward passes compute, padding included."""
    teacher = tree.teacher_only if live_teacher else tree.teacher_nodes
    length = inputs.completion_ids.shape[1]
    separate = sum(p.ids.numel() + len(p.ids) * length for p in inputs.prompts.values())
    return separate >= PAYS * (len(tree.student_nodes) + len(teacher))


def pad_states(parts: BodyAndHead, states: Sequence[Tensor], length: int) -> Tensor:
    """(B, length, D), 0 behind each rollout's end, in the dtype of `hsd.policy.forward.forward_rollouts`."""
    hidden = pad_sequence(list(states), batch_first=True)
    return in_head_dtype(parts, torch.nn.functional.pad(hidden, (0, 0, 0, length - hidden.shape[1])))
