"""`fused_hsd_kl` as a module that owns the head: what DDP, FSDP2 and torch.compile hook into."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from hsd_kernels.api import HSDKLOutput, fused_hsd_kl
from hsd_kernels.divergence import Divergence
from hsd_kernels.driver import TokenWeightFn
from hsd_kernels.head import Head


class FusedHSDKL(nn.Module):
    """A head and the divergence of what it makes of two hidden states, without (tokens, vocabulary) logits::

        criterion = FusedHSDKL(model.lm_head, divergence=Divergence("jsd", beta=0.3))
        loss = criterion(student_hidden, teacher_hidden, token_weights=mask)

    equals ``fused_hsd_kl(student_hidden, teacher_hidden, Head(head.weight, head.bias, logit_scale, softcap), ...)``
    with the same options, all of which have that function's names, defaults and errors. Tensors are given at each call,
    the other options here once.

    The head is a submodule, the same object as in the model and not a copy: its parameters are in ``parameters()`` and,
    under "head.", in ``state_dict()``. FSDP2 gathers them when this module, or one that contains it, is called; for DDP
    call it within the wrapped module's forward (docs/adapters/torch.md).

    Args:
        head: an nn.Linear (V, D), with or without a bias.
        logit_scale, softcap: as in `Head`.

    Raises:
        TypeError: ``head`` is not an nn.Linear.
    """

    def __init__(
        self,
        head: nn.Linear,
        *,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        divergence: str | Divergence = "forward_kl",
        reference_coef: float = 0.0,
        reduction: str = "mean",
        logits_dtype: torch.dtype | None = None,
        filter_eps: float | str | None = None,
        chunk_bytes: int | None = None,
        impl: str = "auto",
        process_group: Any = None,
        return_stats: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(head, nn.Linear):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"head: expected an nn.Linear, got {type(head).__name__}")
        self.head = head
        self.form: dict[str, Any] = {"logit_scale": logit_scale, "softcap": softcap}
        self.options: dict[str, Any] = {
            "divergence": divergence,
            "reference_coef": reference_coef,
            "reduction": reduction,
            "logits_dtype": logits_dtype,
            "filter_eps": filter_eps,
            "chunk_bytes": chunk_bytes,
            "impl": impl,
            "process_group": process_group,
            "return_stats": return_stats,
        }

    def forward(
        self,
        student_hidden: Tensor,
        teacher_hidden: Tensor,
        *,
        teacher_head: Tensor | Head | None = None,
        reference_hidden: Tensor | None = None,
        reference_head: Tensor | Head | None = None,
        target_ids: Tensor | None = None,
        token_weights: Tensor | None = None,
        token_weight_fn: TokenWeightFn | None = None,
        num_items: float | None = None,
    ) -> Tensor | HSDKLOutput:
        """The loss, or `HSDKLOutput` with ``return_stats``; shapes as in `fused_hsd_kl`."""
        return fused_hsd_kl(
            student_hidden,
            teacher_hidden,
            Head(self.head.weight, self.head.bias, **self.form),
            teacher_head=teacher_head,
            reference_hidden=reference_hidden,
            reference_head=reference_head,
            target_ids=target_ids,
            token_weights=token_weights,
            token_weight_fn=token_weight_fn,
            num_items=num_items,
            **self.options,
        )

    def extra_repr(self) -> str:
        signature = inspect.signature(FusedHSDKL.__init__).parameters
        given = self.form | self.options
        return ", ".join(f"{name}={v!r}" for name, v in given.items() if v != signature[name].default)
