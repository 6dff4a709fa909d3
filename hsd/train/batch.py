"""The tensors added to TRL's batch dictionary, which TRL splits and shuffles, and the typed batch made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hsd.hindsight.teacher_prompts import TeacherPrompt
from hsd.policy.forward import Prompts, RolloutInputs
from hsd.train.update import Targets, rollout_weights


@dataclass(frozen=True)
class TeacherBatch:
    """What is added to TRL's batch of B rollouts: the tensors of their teachers' prompts."""

    teacher_prompt_ids: Tensor  # (B, P), padded on the left
    teacher_prompt_mask: Tensor  # (B, P)
    has_context: Tensor  # (B,) bool; a rollout without a teacher's context is left out of the divergence
    divergence_position: Tensor  # (B,), -1 where the rollout has no peer or never leaves it
    success: Tensor  # (B,) bool
    tokens_per_micro_batch: Tensor  # (), what a micro-batch of one process holds on average

    def pack(self) -> dict[str, Tensor]:
        """The entries of TRL's dictionary, which `unpack` finds again."""
        return dict(vars(self))


@dataclass(frozen=True)
class RolloutBatch:
    """B rollouts of T tokens at most, with their teachers' prompts, as the loss takes them."""

    inputs: RolloutInputs
    loss_mask: Tensor  # (B, T), the completion mask without the tokens of tools
    teacher: TeacherBatch
    advantages: Tensor  # (B,)
    old_logps: Tensor | None  # (B, T)

    @property
    def divergence_mask(self) -> Tensor:
        """(B, T), the loss mask of the rollouts whose teacher has a context."""
        return self.loss_mask * self.teacher.has_context.unsqueeze(-1)

    def targets(self, loss_mean: str) -> Targets:
        """``loss_mean``, "rollout" or "token", as in `hsd.HSDConfig`."""
        mask, over_tokens = self.divergence_mask, loss_mean == "token"
        weights = mask / self.teacher.tokens_per_micro_batch if over_tokens else rollout_weights(mask)
        policy_weights = rollout_weights(self.loss_mask)
        return Targets(self.inputs.completion_ids, weights, policy_weights, self.advantages, self.old_logps)


def collate(
    prompts: Sequence[TeacherPrompt], has_context: Tensor, success: Tensor, tokens_per_micro_batch: Tensor, pad_id: int
) -> TeacherBatch:
    """The teacher's tensors of one prompt a rollout, on the device of ``success``."""
    device = success.device
    ids = [torch.tensor(p.context.prompt_ids) for p in prompts]
    return TeacherBatch(
        pad_sequence(ids, batch_first=True, padding_value=pad_id, padding_side="left").to(device),
        pad_sequence([torch.ones_like(x) for x in ids], batch_first=True, padding_side="left").to(device),
        has_context,
        torch.tensor([-1 if p.tau is None else p.tau for p in prompts], device=device),
        success,
        tokens_per_micro_batch,
    )


def student_inputs(trl: Mapping[str, Any]) -> tuple[RolloutInputs, Tensor]:
    """The rollouts of TRL's batch behind the student's prompts, and their loss mask (B, T)."""
    prompts = {"student": Prompts(trl["prompt_ids"], trl["prompt_mask"])}
    mask = trl["completion_mask"]
    loss_mask = mask * trl["tool_mask"] if "tool_mask" in trl else mask
    return RolloutInputs(prompts, trl["completion_ids"], mask), loss_mask


def unpack(trl: Mapping[str, Any]) -> RolloutBatch:
    """TRL's batch, or a part of it, with the entries of `TeacherBatch.pack`."""
    teacher = TeacherBatch(**{f.name: trl[f.name] for f in fields(TeacherBatch)})
    student, loss_mask = student_inputs(trl)
    prompts = {**student.prompts, "teacher": Prompts(teacher.teacher_prompt_ids, teacher.teacher_prompt_mask)}
    inputs = replace(student, prompts=prompts)
    return RolloutBatch(inputs, loss_mask, teacher, trl["advantages"], trl.get("old_per_token_logps"))


def shuffle_groups(trl: Mapping[str, Any], size: int) -> dict[str, Any]:
    """TRL's batch in which whole groups of ``size`` rows change places. Rows that are not whole groups (a rank's share)
    stay in order.

    The groups' order is that of their first rows in TRL's shuffle of all rows: what is sampled next is the same with
    and without the tree.
    """
    n = len(trl["completion_ids"])
    shuffled = torch.randperm(n)
    order = torch.arange(n)
    if n % size == 0:
        order = order.reshape(-1, size)[list(dict.fromkeys((shuffled // size).tolist()))].flatten()

    def permuted(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[order.to(value.device)] if value.ndim else value
        return [value[i] for i in order.tolist()] if isinstance(value, list) else value

    return {key: permuted(value) for key, value in trl.items()}
