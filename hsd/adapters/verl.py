"""verl 0.9.1: the divergence as what its FSDP engine reads from a model's forward, and as a distillation loss by name.

The engine takes ``output.fused_linear_aux`` where ``use_fused_kernels`` and ``distillation_use_topk`` are set, unpads
it to responses, and hands it to the loss that the configuration names. `fused_linear_aux` makes it, `register` names
the loss "hsd"; docs/adapters/verl.md has the forward that calls the first.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hsd_kernels import Divergence, Head, fused_hsd_kl

NAME = "hsd"


class FusedLinearAux(NamedTuple):
    """Each (1, nnz), as verl squeezes it; 0 where no response token is predicted. The masses are 1, of a whole
    vocabulary."""

    distillation_losses: Tensor  # with gradient
    student_mass: Tensor
    teacher_mass: Tensor


def fused_linear_aux(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    head: Tensor | Head,
    rows: Tensor,
    *,
    divergence: Divergence | None = None,
    teacher_head: Tensor | Head | None = None,
    impl: str = "auto",
) -> FusedLinearAux:
    """The divergence of each response token, where verl's engine looks for it::

        losses = zeros(nnz)
        losses[rows] = divergence(softmax(teacher_logits), softmax(student_logits[rows])).sum(-1)

    Args:
        student_hidden: (nnz, D), of the packed batch.
        teacher_hidden: (n, D), detached, of the same response tokens behind the teacher's prompts.
        head: (V, D), the student's and, without ``teacher_head``, the teacher's.
        rows: (nnz,) bool with n true: the states that predict a response token (`hsd.adapters.packed.response_rows`).
        divergence: by default KL(teacher || student), in nats.

    Raises ValueError where ``rows`` does not pick as many states as the teacher has.
    """
    if rows.shape != student_hidden.shape[:1] or int(rows.sum()) != len(teacher_hidden):
        raise ValueError(
            f"rows: expected ({len(student_hidden)},) with {len(teacher_hidden)} true, as teacher_hidden has rows, got "
            f"{tuple(rows.shape)} with {int(rows.sum())}"
        )
    losses = fused_hsd_kl(
        student_hidden[rows],
        teacher_hidden,
        head,
        divergence=Divergence("forward_kl") if divergence is None else divergence,
        teacher_head=teacher_head,
        reduction="none",
        impl=impl,
    )
    assert isinstance(losses, Tensor)
    packed = losses.new_zeros(len(rows)).index_put((rows.nonzero().squeeze(-1),), losses)
    mass = torch.ones_like(packed).detach()
    return FusedLinearAux(*(t.unsqueeze(0) for t in (packed, mass, mass)))


def register() -> None:
    """Make ``distillation.distillation_loss.loss_mode: hsd`` known to verl; once in each process, a second call does
    nothing.

    Unlike "forward_kl_topk" it keeps a clipped divergence's negative sums, and logs no top-k masses.
    """
    from verl.trainer.distillation.losses import (  # pyright: ignore[reportMissingImports]
        DISTILLATION_LOSS_REGISTRY,
        DistillationLossSettings,
        register_distillation_loss,
    )
    from verl.workers.utils.padding import no_padding_2_padding  # pyright: ignore[reportMissingImports]

    if NAME in DISTILLATION_LOSS_REGISTRY:
        return

    def loss(config: Any, distillation_config: Any, model_output: dict[str, Any], data: Any) -> tuple[Tensor, dict]:
        return no_padding_2_padding(model_output["distillation_losses"], data), {}

    register_distillation_loss(DistillationLossSettings(names=[NAME], use_topk=True))(loss)
