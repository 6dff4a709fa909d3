"""TRL's distillation trainers with `fused_hsd_kl` in place of their divergence: no dense logits, the same loss.

    with patch_trl():
        trainer.train()          # GKDTrainer, SDPOTrainer, SDFTTrainer, DistillationTrainer; theirs again afterwards

TRL's ``beta`` (GKD, Distillation) and ``distillation_alpha`` (SDPO, SDFT) are the ``beta`` of ``divergence="jsd"``:
0 is KL(teacher || student), 1 is KL(student || teacher), between them the teacher's share of the mixture. GKD samples
with its ``temperature`` but compares at 1, as TRL does; the other three compare at ``temperature``.

Left to TRL, with a warning that names the reason: ``distillation_mode`` other than "full_logits",
0 < ``distillation_weight`` < 1 (its policy term needs logits), a teacher whose logit scale or softcap differs from the
student's, and any call that asks for the model's outputs. A model that
`hsd.policy.body_and_head` refuses is an error.

What is used of TRL 1.16 beyond its documentation:

- replaced: ``_chunked_divergence_loss`` of its ``distillation_trainer``, ``GKDTrainer.compute_loss``, and
  ``_compute_teacher_student_logits`` and ``_compute_self_distillation_loss`` of `SDPOTrainer` and `SDFTTrainer`
- called on the last two: ``_get_teacher_context_for_self_distillation``, ``_log_self_distillation_metric``, ``_name``
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from hsd.adapters.common import (
    ImportanceRatio,
    check_version,
    divergence,
    forward,
    inside_forward,
    unwrapped,
    with_whole_head,
)
from hsd.policy.body_and_head import BodyAndHead
from hsd.policy.forward import FrozenStates
from hsd.train.update import rollout_weights
from hsd_kernels import Divergence, Head

TESTED = ("1.16", "1.16")


def patch_trl() -> ExitStack:
    """Put the fused loss into TRL's trainers, those already made included. Undone by ``close()`` or by leaving `with`.

    Raises AttributeError for what an untested TRL lacks, RuntimeError if the patch is on; nothing is patched then.
    """
    check_version("trl", *TESTED)
    sites = [
        (importlib.import_module("trl.trainer.distillation_trainer"), "_chunked_divergence_loss", _distillation),
        (importlib.import_module("trl.experimental.gkd").GKDTrainer, "compute_loss", _gkd),
    ]
    for name in ("sdpo", "sdft"):
        trainer = getattr(importlib.import_module(f"trl.experimental.{name}"), f"{name.upper()}Trainer")
        sites += [
            (trainer, "_compute_teacher_student_logits", _sides),
            (trainer, "_compute_self_distillation_loss", _self_distillation),
        ]
    with ExitStack() as undo:
        for owner, name, make in sites:
            theirs = getattr(owner, name)
            if hasattr(theirs, "patched_by_hsd"):
                raise RuntimeError(f"patch_trl: expected TRL's own {name}, got one that is patched already")
            ours = make(theirs)
            ours.patched_by_hsd = True
            setattr(owner, name, ours)
            undo.callback(setattr, owner, name, theirs)
        return undo.pop_all()


@cache
def _leave(method: str, reason: str) -> None:
    warnings.warn(f"patch_trl: {method} left to TRL, with dense logits: {reason}", stacklevel=4)


def _distillation(theirs: Any) -> Any:
    """DistillationTrainer's loss function is given the hidden states and the heads."""
    signature = inspect.signature(theirs)

    def chunked_divergence_loss(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, sum of the student's entropy, number of tokens), as TRL's function of this name."""
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        scale, cap = given["student_logit_scale"], given["student_final_logit_softcapping"]
        if (scale, cap) != (given["teacher_logit_scale"], given["teacher_final_logit_softcapping"]):
            _leave("_chunked_divergence_loss", "the teacher's logit scale or softcap is not the student's")
            return theirs(*args, **kwargs)
        student = Head(given["student_lm_head_weight"], given["student_lm_head_bias"], scale, cap)
        teacher = Head(given["teacher_lm_head_weight"], given["teacher_lm_head_bias"], scale, cap)
        mask = given["completion_mask"] != 0
        out = divergence(
            student,
            given["student_hidden_states"],
            with_whole_head(teacher, given["teacher_hidden_states"]),
            divergence=Divergence("jsd", given["beta"], given["temperature"]),
            token_weights=mask.float(),
            reduction="sum",
        )
        tokens = mask.sum()
        items = tokens.clamp(min=1) if given["num_items_in_batch"] is None else given["num_items_in_batch"]
        return out.loss / items, out.stats.student_entropy.sum(), tokens

    return chunked_divergence_loss


def _gkd(theirs: Any) -> Any:
    def compute_loss(
        self: Any,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        student_model, student = unwrapped(self.accelerator, model)
        teacher_model, teacher = unwrapped(self.accelerator, self.teacher_model)
        reason = None
        if return_outputs:
            reason = "return_outputs=True"
        elif (student.logit_scale, student.softcap) != (teacher.logit_scale, teacher.softcap):
            reason = "the teacher's logit scale or softcap is not the student's"
        if reason is not None:
            _leave("GKDTrainer.compute_loss", reason)
            return theirs(self, model, inputs, return_outputs, num_items_in_batch)

        self.teacher_model.eval()
        labels = inputs["labels"][:, 1:]

        def states(parts: BodyAndHead) -> Tensor:
            return forward(parts, inputs["input_ids"], inputs["attention_mask"])[:, :-1]

        def teacher_states() -> FrozenStates:
            return with_whole_head(teacher.head, states(teacher))

        def loss() -> Tensor:
            hidden = states(student)
            with torch.no_grad():
                seen = inside_forward(self.teacher_model, teacher_model, teacher_states)
            mask = (labels != -100).float()
            # Temperature 1, whatever self.temperature is: TRL's GKD samples with it and does not pass it to its loss.
            options = {"divergence": Divergence("jsd", self.beta), "reduction": "sum"}
            total = divergence(student.head, hidden, seen, token_weights=mask, **options).loss
            return total / (mask.sum().clamp_min(1) if num_items_in_batch is None else num_items_in_batch)

        with self.accelerator.autocast():
            return inside_forward(model, student_model, loss)

    return compute_loss


@dataclass(frozen=True)
class Deferred:
    """In the place of TRL's `DistillationLogits`: what the forward passes of both sides need when the loss is made."""

    teacher_model: nn.Module
    loss_mask: Tensor  # (B, T)


def _sides(theirs: Any) -> Any:
    def compute_teacher_student_logits(self: Any, model: nn.Module, teacher_model: nn.Module, inputs: Any) -> Any:
        reason = None
        if self.args.distillation_mode != "full_logits":
            reason = f"distillation_mode={self.args.distillation_mode!r}, expected 'full_logits'"
        elif getattr(self.args, "distillation_weight", 1.0) != 1.0:
            reason = f"distillation_weight={self.args.distillation_weight}, the policy term needs the logits"
        if reason is not None:
            _leave(f"{self._name} loss", reason)
            return theirs(self, model, teacher_model, inputs)
        mask = inputs["completion_mask"]
        if inputs.get("self_distillation_mask") is not None:  # SDPO: rollouts without a context
            mask = mask * inputs["self_distillation_mask"].unsqueeze(1)
        skipped = getattr(self, "num_loss_tokens_to_skip", 0)  # SDFT
        return Deferred(teacher_model, mask * (torch.arange(mask.shape[1], device=mask.device) >= skipped))

    return compute_teacher_student_logits


def _self_distillation(theirs: Any) -> Any:
    def compute_self_distillation_loss(self: Any, model: nn.Module, inputs: Any, sides: Any) -> Tensor:
        if not isinstance(sides, Deferred):
            return theirs(self, model, inputs, sides)
        student_model, student = unwrapped(self.accelerator, model)
        teacher_model, teacher = unwrapped(self.accelerator, sides.teacher_model)
        targets, mask = inputs["completion_ids"], sides.loss_mask.float()
        length = targets.shape[1]

        def teacher_states() -> FrozenStates:
            ids, seen = inputs["teacher_input_ids"], inputs["teacher_attention_mask"]
            hidden = forward(teacher, ids, seen)[:, -(length + 1) : -1]
            return FrozenStates(hidden) if teacher.linear is student.linear else with_whole_head(teacher.head, hidden)

        def loss() -> tuple[Tensor, Tensor]:
            ids = torch.cat([inputs["prompt_ids"], targets], 1)
            seen = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
            hidden = forward(student, ids, seen)[:, -(length + 1) : -1]
            with torch.no_grad(), self._get_teacher_context_for_self_distillation():
                if teacher_model is student_model:
                    frozen = teacher_states()
                else:
                    frozen = inside_forward(sides.teacher_model, teacher_model, teacher_states)
            ratio = ImportanceRatio.of(inputs.get("old_per_token_logps"), self.args.distillation_is_clip)
            out = divergence(
                student.head,
                hidden,
                frozen,
                divergence=Divergence("jsd", self.args.distillation_alpha, self.temperature),
                target_ids=targets,
                token_weights=rollout_weights(mask),
                token_weight_fn=ratio,
                reduction="sum",
            )
            per_token = out.stats.kl if ratio is None else out.stats.kl * ratio.values.view_as(mask)
            return out.loss, (per_token * mask).sum() / mask.sum().clamp(min=1.0)

        with self.accelerator.autocast():
            total, mean = inside_forward(model, student_model, loss)
        mode = "train" if model.training else "eval"
        self._log_self_distillation_metric(mode, self.accelerator.gather(mean).mean().item())
        return total

    return compute_self_distillation_loss
