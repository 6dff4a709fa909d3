"""Liger's fused linear JSD under its own names, on `fused_hsd_kl`: swapping is an import.

    from hsd.adapters.liger import LigerFusedLinearJSD          # for liger_kernel.transformers
    from hsd.adapters.liger import liger_fused_linear_jsd       # for liger_kernel.transformers.functional
    from hsd.adapters.liger import LigerFusedLinearJSDLoss      # for liger_kernel.chunked_loss

Liger's conventions, kept: P is the teacher, Q the student, and ``jsd_beta`` (``beta``) is the teacher's share of the
mixture: 0 is KL(teacher || student), 1 is KL(student || teacher). The sum is divided by the number of labels that are
not ``ignore_index``; the temperature divides the logits of both sides and adds no factor temperature^2. The chunked
loss adds, by default, half a cross-entropy at temperature 1.

Different here: gradients accumulate in fp32 whatever ``accum_dtype`` says, and reach the weight only if it wants one;
a batch without labels gives 0; teacher and student need vocabularies of one size (Liger pads the student's with logits
of 0). Liger itself is not imported.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hsd.adapters.common import check_version
from hsd_kernels import Divergence, Head, fused_hsd_kl

TESTED = ("0.8.5", "0.8.5")


def liger_fused_linear_jsd(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    shift_labels: Tensor | None = None,
    jsd_beta: float = 0.5,
    ignore_index: int = -100,
    temperature: float = 1.0,
    accum_dtype: torch.dtype | None = None,
) -> Tensor:
    """Generalized JSD of two heads, a scalar; `liger_kernel.transformers.functional`'s function of this name.

    Args:
        student_input, teacher_input: (N, H) and (N, H').
        student_weight, teacher_weight: (V, H) and (V, H'). Where they are one tensor, one GEMM serves both sides.
        shift_labels: (N,), used only to leave out the tokens that are ``ignore_index``.
        accum_dtype: None or torch.float32.

    Raises ValueError, naming the argument of `fused_hsd_kl`, for shapes and options that it refuses.
    """
    if accum_dtype not in (None, torch.float32):
        raise ValueError(f"accum_dtype: expected None or torch.float32, got {accum_dtype}")
    counted = None if shift_labels is None else shift_labels != ignore_index
    jsd = Divergence("jsd", beta=jsd_beta, temperature=temperature)
    return _mean(jsd, student_input, Head(student_weight), teacher_input, Head(teacher_weight), counted)


class LigerFusedLinearJSD(nn.Module):
    """Module form of `liger_fused_linear_jsd`, with `liger_kernel.transformers.LigerFusedLinearJSD`'s signatures."""

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        Divergence("jsd", beta=jsd_beta, temperature=temperature)  # checks the two
        self.jsd_beta, self.ignore_index, self.temperature = jsd_beta, ignore_index, temperature
        self.accum_dtype = accum_dtype

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Tensor | None,
    ) -> Tensor:
        return liger_fused_linear_jsd(
            student_input,
            student_weight,
            teacher_input,
            teacher_weight,
            shift_labels,
            self.jsd_beta,
            self.ignore_index,
            self.temperature,
            self.accum_dtype,
        )


class LigerFusedLinearJSDLoss(nn.Module):
    """``weight_hard_loss * CE + weight_soft_loss * JSD``, with `liger_kernel.chunked_loss`'s signatures.

    Mind Liger's default: half of the loss is the cross-entropy with ``true_labels``. For distillation alone pass
    ``weight_hard_loss=0.0, weight_soft_loss=1.0``. The cross-entropy is plain PyTorch over ``chunk_size`` tokens at a
    time, recomputed in the backward; it is skipped where its weight is 0 and it is not returned.

    ``compiled`` has no effect. ``return_soft_hard_loss`` returns (loss, soft, hard), the last two without gradient.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ):
        super().__init__()
        self.weight_hard_loss, self.weight_soft_loss = weight_hard_loss, weight_soft_loss
        self.divergence = Divergence("jsd", beta=beta, temperature=temperature)
        self.ignore_index, self.chunk_size = ignore_index, chunk_size
        self.return_soft_hard_loss = return_soft_hard_loss

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        student, teacher = Head(student_weight, student_bias), Head(teacher_weight, teacher_bias)
        counted = true_labels != self.ignore_index
        soft = _mean(self.divergence, student_input, student, teacher_input, teacher, counted)
        loss, hard = self.weight_soft_loss * soft, torch.zeros_like(soft)
        if self.weight_hard_loss != 0 or self.return_soft_hard_loss:
            hard = self._cross_entropy(student_input, student, true_labels)
            loss = loss + self.weight_hard_loss * hard
        return (loss, soft.detach(), hard.detach()) if self.return_soft_hard_loss else loss

    def _cross_entropy(self, hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
        def chunk(h: Tensor, y: Tensor) -> Tensor:
            logits = F.linear(h, head.weight, head.bias).float()
            return F.cross_entropy(logits, y, ignore_index=self.ignore_index, reduction="sum")

        parts = zip(hidden.split(self.chunk_size), labels.split(self.chunk_size), strict=True)
        total: Any = sum(checkpoint(chunk, h, y, use_reentrant=False) for h, y in parts)
        return total / (labels != self.ignore_index).sum().clamp_min(1)


def _mean(
    divergence: Divergence, student: Tensor, head: Head, teacher: Tensor, teacher_head: Head, counted: Tensor | None
) -> Tensor:
    """The mean over the ``counted`` tokens, (N,) bool; None counts all."""
    check_version("liger-kernel", *TESTED)
    bias = None if teacher_head.bias is None else teacher_head.bias.detach()
    # One head for both sides, biases included, is told by its memory inside: one GEMM then serves both. (Not under
    # autocast, which makes a copy of each.)
    loss = fused_hsd_kl(
        student,
        teacher.detach(),
        head,
        divergence=divergence,
        teacher_head=teacher_head.with_tensors(teacher_head.weight.detach(), bias),
        token_weights=None if counted is None else counted.float(),
    )
    assert isinstance(loss, Tensor)
    return loss
