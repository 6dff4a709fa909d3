"""A divergence in the argument order of cut-cross-entropy's `linear_cross_entropy`.

    linear_cross_entropy(e, c, targets, bias, softcap=..., shift=1)      # there
    linear_divergence(e, c, teacher_e, targets, bias, softcap=..., shift=1)      # here

The targets say only which tokens count: the divergence runs over the whole vocabulary. Two defaults differ from
`linear_cross_entropy` on purpose: ``filter_eps`` is None, exact, where CCE filters gradients below 2^-12, and ``impl``
is `fused_hsd_kl`'s.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hsd_kernels import Head, fused_hsd_kl


def linear_divergence(
    e: Tensor,
    c: Tensor,
    teacher_e: Tensor,
    targets: Tensor | None = None,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: bool | int = 0,
    **options: Any,
) -> Tensor:
    """KL(teacher || student) between ``e c^T`` and ``teacher_e c^T``, or another divergence by ``options``.

    Args:
        e, teacher_e: (..., T, D) embeddings of student and teacher for the same tokens; the first gets a gradient.
        c: (V, D) classifier; gets one if it requires it.
        targets: (..., T); tokens whose target is ``ignore_index`` do not count. None counts all.
        shift: as in CCE: e[..., t, :] is compared where targets[..., t + shift] counts; the last ``shift`` positions
            do not.
        options: of `hsd_kernels.fused_hsd_kl`, such as ``divergence`` or ``teacher_head``.

    Returns a scalar, or (..., T - shift) with ``reduction="none"``.

    Raises ValueError for ``targets`` of another shape than the tokens', and what `fused_hsd_kl` raises.
    """
    if targets is not None and targets.shape != e.shape[:-1]:
        raise ValueError(f"targets: expected shape {tuple(e.shape[:-1])}, got {tuple(targets.shape)}")
    shift = int(shift)
    length = e.shape[-2]
    if not 0 <= shift < length:
        raise ValueError(f"shift: expected a number of tokens in [0, {length}), got {shift}")
    counted = None if targets is None else (targets[..., shift:] != ignore_index).to(torch.float32)
    loss = fused_hsd_kl(
        e[..., : length - shift, :],
        teacher_e[..., : length - shift, :],
        Head(c, bias, softcap=softcap),
        reduction=reduction,
        token_weights=counted,
        **options,
    )
    assert isinstance(loss, Tensor)
    return loss
