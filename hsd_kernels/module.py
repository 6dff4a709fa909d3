"""`fused_hsd_kl` as a module that owns the head: what DDP, FSDP2 and torch.compile hook into."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from hsd_kernels.api import HSDKLOutput, fused_hsd_kl
from hsd_kernels.driver import TokenWeightFn


class FusedHSDKL(nn.Module):
    """A head and the divergence of what it makes of two hidden states, without (tokens, vocabulary) logits::

        criterion = FusedHSDKL(model.lm_head, divergence="jsd", beta=0.3)
        loss = criterion(student_hidden, teacher_hidden, token_weights=mask)

    equals ``fused_hsd_kl(student_hidden, teacher_hidden, head.weight, head.bias, ...)`` with the same options; all of
    them have that function's names, defaults and errors. Tensors are given at each call, the other options here once.

    The head is a submodule, the same object as in the model and not a copy: its parameters are in ``parameters()`` and,
    under "head.", in ``state_dict()``. FSDP2 gathers them when this module, or one that contains it, is called; for DDP
    call it within the wrapped module's forward (docs/adapters/torch.md).

    Args:
        head: an nn.Linear (V, D), with or without a bias.

    Raises:
        TypeError: ``head`` is not an nn.Linear.
    """

    def __init__(
        self,
        head: nn.Linear,
        *,
        reference_coef: float = 0.0,
        divergence: str = "forward_kl",
        beta: float = 0.5,
        temperature: float = 1.0,
        kl_clip: float | None = None,
        kl_clip_form: str = "opsd",
        reduction: str = "mean",
        logit_scale: float = 1.0,
        softcap: float | None = None,
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
        self.options: dict[str, Any] = {
            "reference_coef": reference_coef,
            "divergence": divergence,
            "beta": beta,
            "temperature": temperature,
            "kl_clip": kl_clip,
            "kl_clip_form": kl_clip_form,
            "reduction": reduction,
            "logit_scale": logit_scale,
            "softcap": softcap,
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
        teacher_weight: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        reference_hidden: Tensor | None = None,
        reference_weight: Tensor | None = None,
        reference_bias: Tensor | None = None,
        target_ids: Tensor | None = None,
        token_weights: Tensor | None = None,
        token_weight_fn: TokenWeightFn | None = None,
        num_items: float | None = None,
    ) -> Tensor | HSDKLOutput:
        """The loss, or `HSDKLOutput` with ``return_stats``; shapes as in `fused_hsd_kl`."""
        return fused_hsd_kl(
            student_hidden,
            teacher_hidden,
            self.head.weight,
            self.head.bias,
            teacher_weight=teacher_weight,
            teacher_bias=teacher_bias,
            reference_hidden=reference_hidden,
            reference_weight=reference_weight,
            reference_bias=reference_bias,
            target_ids=target_ids,
            token_weights=token_weights,
            token_weight_fn=token_weight_fn,
            num_items=num_items,
            **self.options,
        )

    def extra_repr(self) -> str:
        signature = inspect.signature(FusedHSDKL.__init__).parameters
        return ", ".join(f"{name}={v!r}" for name, v in self.options.items() if v != signature[name].default)
