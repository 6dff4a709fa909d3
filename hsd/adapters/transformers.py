"""The HSD loss for a hand-written loop over a transformers model: token ids in, a loss out, no trainer.

    loss = hsd_loss_from_ids(model, student_ids, teacher_ids, lengths).loss
    loss.backward()

(`hsd.train.update.hsd_loss` is the same objective from hidden states.) examples/accelerate_loop.py is a whole loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hsd.adapters.common import check_version, checked_body_and_head, divergence, inside_forward, with_whole_head
from hsd.hindsight.context import check_alignment
from hsd.padding import padded
from hsd.policy.body_and_head import BodyAndHead, hidden_states
from hsd.policy.forward import FrozenStates
from hsd.policy.frozen import in_eval_mode
from hsd.train.update import LossOutput, Objective
from hsd_kernels import RowStats

TESTED = ("5.23", "5.23")
USED = ("divergence", "memory_bytes", "impl")  # of an `Objective`


def hsd_loss_from_ids(
    model: nn.Module,
    student_ids: Sequence[Sequence[int]],
    teacher_ids: Sequence[Sequence[int]],
    lengths: Sequence[int],
    *,
    teacher: nn.Module | None = None,
    objective: Objective | None = None,
) -> LossOutput:
    """Mean over rollouts of the mean over their tokens of the full-vocabulary divergence teacher-student::

        ls = model(student_ids[i]).logits[-n - 1 : -1].log_softmax(-1)             # n = lengths[i]
        lt = teacher(teacher_ids[i]).logits[-n - 1 : -1].log_softmax(-1).detach()
        loss_i = (lt.exp() * (lt - ls)).sum(-1).mean()                             # forward_kl, the default

    but neither logits exist. Scale, softcap and bias of the model's head are kept.

    Args:
        model: a causal LM, a PEFT model, or one of these in DDP or after `fully_shard`. Gets the gradient.
        student_ids: [q ; o_i] for each rollout, lists of any length.
        teacher_ids: [q ; c_i ; o_i]; must end with the same ``lengths[i]`` tokens.
        lengths: tokens of each rollout, at least 1; each prompt has at least one token too.
        teacher: another model with the same vocabulary, logit scale and softcap; None is the model itself, without
            gradient and in eval mode.
        objective: `hsd.train.update.Objective` with a divergence and nothing else; by default KL(teacher || student) at
            temperature 1.

    Returns the loss and statistics per token, packed rollout after rollout, (sum(lengths),).

    Under autocast call it in the context (``with accelerator.autocast():``): a wrapper around ``model.forward`` is not
    passed through.

    Raises ValueError naming the argument for lists that do not fit together, a model without separate body and head, a
    teacher whose logits are made differently, or another term of the objective.
    """
    check_version("transformers", *TESTED)
    objective = objective or Objective()
    plain = Objective()
    for name in (field.name for field in fields(Objective) if field.name not in USED):
        if (value := getattr(objective, name)) != (expected := getattr(plain, name)):
            raise ValueError(f"objective: expected {name}={expected}, got {value}; only {USED} count here")
    _check_lists(student_ids, teacher_ids, lengths)
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    parts = checked_body_and_head(inner)
    other = parts if teacher is None else checked_body_and_head(teacher)
    if (parts.logit_scale, parts.softcap) != (other.logit_scale, other.softcap):
        raise ValueError(
            f"teacher: expected logit scale {parts.logit_scale} and softcap {parts.softcap}, the model's, got "
            f"{other.logit_scale} and {other.softcap}"
        )

    def teacher_states() -> FrozenStates:
        with torch.no_grad(), in_eval_mode(inner) if teacher is None else nullcontext():
            hidden = _states(other, teacher_ids, lengths)
        return FrozenStates(hidden) if teacher is None else with_whole_head(other.head, hidden)

    def loss() -> tuple[Tensor, RowStats]:
        # The teacher first: its activations are gone before the student's are kept.
        frozen = teacher_states() if teacher is None else inside_forward(teacher, teacher, teacher_states)
        hidden = _states(parts, student_ids, lengths)
        counts = torch.tensor(lengths, device=hidden.device)
        out = divergence(
            parts.head,
            hidden,
            frozen,
            divergence=objective.divergence,
            target_ids=torch.cat([torch.tensor(x[len(x) - n :]) for x, n in zip(student_ids, lengths, strict=True)]).to(
                hidden.device
            ),
            token_weights=(1.0 / (counts * len(lengths))).repeat_interleave(counts),
            reduction="sum",
            memory_bytes=objective.memory_bytes,
            impl=objective.impl,
        )
        return out.loss, out.stats  # tuples: FSDP looks for the tensors it must hook in these, not in dataclasses

    return LossOutput(*inside_forward(model, inner, loss))


def _states(parts: BodyAndHead, sequences: Sequence[Sequence[int]], lengths: Sequence[int]) -> Tensor:
    """(sum(lengths), D), the states that predict the last ``lengths[i]`` tokens: the body needs all but the last."""
    ids, mask = padded([x[:-1] for x in sequences])
    device = parts.linear.weight.device
    hidden = hidden_states(parts.body, ids.to(device), mask.to(device))
    ends = [len(x) - 1 for x in sequences]
    return torch.cat([hidden[i, end - n : end] for i, (end, n) in enumerate(zip(ends, lengths, strict=True))])


def _check_lists(student_ids: Any, teacher_ids: Any, lengths: Sequence[int]) -> None:
    for name, lists in (("student_ids", student_ids), ("teacher_ids", teacher_ids)):
        if len(lists) != len(lengths) or not len(lengths):
            raise ValueError(f"{name}: expected one list for each of {len(lengths)} lengths, got {len(lists)}")
    for i, n in enumerate(lengths):
        if n < 1:
            raise ValueError(f"lengths: expected at least one token in every rollout, got {n} at {i}")
        for name, lists in (("student_ids", student_ids), ("teacher_ids", teacher_ids)):
            if len(lists[i]) <= n:
                raise ValueError(f"{name}: expected a prompt before the {n} tokens of rollout {i}, got {len(lists[i])}")
        check_alignment(student_ids[i], teacher_ids[i], student_ids[i][len(student_ids[i]) - n :])
