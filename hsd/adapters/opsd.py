"""siyan-zhao/OPSD's `OPSDTrainer` with `fused_hsd_kl` in place of its `generalized_jsd_loss`: no dense logits.

    class FusedTrainer(FusedOPSD, OPSDTrainer): ...        # and FusedTrainer(...) where OPSDTrainer(...) was

Their conventions, kept: ``beta`` 0 is KL(teacher || student), 1 is KL(student || teacher), between them the teacher's
share of the mixture; ``temperature``, which also samples, divides the logits of both sides; the mean is over the tokens
whose label is not -100; ``jsd_token_clip`` (newer versions) caps each vocabulary summand before the sum, so that the
loss may be negative. Prompts are padded on the right and positions count the padding, as their forward does.

Left to `OPSDTrainer`: ``top_k_loss`` and ``use_thinking_machines_loss``. A batch without tokens gives 0 here, where
theirs divides 0 by 0.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from hsd.adapters.common import check_version, divergence, forward, inside_forward, unwrapped, with_whole_head
from hsd.policy.forward import FrozenStates
from hsd.policy.frozen import is_peft
from hsd_kernels import Divergence

# Theirs pins trl 0.26.0 and transformers 4.57.1: there the adapter was compared with their own class (docs/adapters).
TESTED = {"trl": ("0.26", "1.16"), "transformers": ("4.57", "5.23")}


class FusedOPSD:
    """Goes before `OPSDTrainer` in the bases of a trainer; replaces ``compute_loss`` and nothing else."""

    def compute_loss(
        self: Any, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of their ``compute_loss``; with ``return_outputs`` also an object with ``loss`` alone, as theirs.

        Args:
            inputs: ``student_input_ids``, ``student_attention_mask`` (B, P + T), ``teacher_input_ids``,
                ``teacher_attention_mask`` (B, P' + T), ``labels`` (B, P + T) with -100 where a token does not
                count, and the padded prompts' lengths ``student_prompt_length`` P and ``teacher_prompt_length`` P'.

        Raises ValueError for a model that `hsd.policy.body_and_head` refuses.
        """
        for package, tested in TESTED.items():
            check_version(package, *tested)
        if self.top_k_loss or self.use_thinking_machines_loss:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        policy, parts = unwrapped(self.accelerator, model)

        def states(side: str) -> Tensor:
            hidden = forward(parts, inputs[f"{side}_input_ids"], inputs[f"{side}_attention_mask"])
            return hidden[:, inputs[f"{side}_prompt_length"] - 1 : -1]

        def loss() -> Tensor:
            hidden = states("student")
            with torch.no_grad(), teacher_weights(self, model, policy):
                seen = states("teacher")
                # Averaged weights may include the head; they leave the model again when the context ends.
                teacher = with_whole_head(parts.head, seen) if self.use_ema_teacher else FrozenStates(seen)
            counted = inputs["labels"][:, inputs["student_prompt_length"] :] != -100
            return divergence(
                parts.head,
                hidden,
                teacher,
                divergence=Divergence("jsd", self.beta, self.temperature, getattr(self, "jsd_token_clip", None)),
                token_weights=counted.float(),
            ).loss

        with self.accelerator.autocast():
            total = inside_forward(model, policy, loss)
        return (total, SimpleNamespace(loss=total)) if return_outputs else total


def teacher_weights(trainer: Any, model: nn.Module, policy: Any) -> Any:
    """Their choice of a teacher as a context: averaged weights, the initial policy of a LoRA run, or the live ones."""
    if trainer.use_ema_teacher:
        return trainer._ema_teacher_context(model)
    if trainer.fixed_teacher and is_peft(policy):
        return policy.disable_adapter()
    return nullcontext()
