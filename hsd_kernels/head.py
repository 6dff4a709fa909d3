"""A language model's head: how hidden states become logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hsd_kernels.values import check_finite, check_positive


@dataclass(frozen=True, eq=False)
class Head:
    """``logits = cap(logit_scale * (hidden @ weight.T + bias))`` with ``cap(z) = softcap * tanh(z / softcap)``.

    Args:
        weight: (V, D).
        bias: (V,), optional.
        logit_scale: finite (Cohere's ``logit_scale``, Granite's ``1 / logits_scaling``).
        softcap: > 0, None for no cap (Gemma 2's ``final_logit_softcapping``).

    Raises:
        ValueError, TypeError: naming the field. Shapes and dtypes are checked where the head meets hidden states.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        given: dict[str, Any] = {"weight": self.weight, "bias": self.bias}
        for name, t in given.items():
            if not isinstance(t, Tensor) and not (name == "bias" and t is None):
                expected = "a torch.Tensor or None" if name == "bias" else "a torch.Tensor"
                raise TypeError(f"head.{name}: expected {expected}, got {type(t).__name__}")
        check_finite("head.logit_scale", self.logit_scale)
        check_positive("head.softcap", self.softcap, optional=True)

    def with_tensors(self, weight: Tensor, bias: Tensor | None) -> Head:
        """Other tensors, the same scale and cap."""
        return Head(weight, bias, self.logit_scale, self.softcap)


def as_head(name: str, given: Any, like: Head | None = None) -> Head:
    """An argument that is a Head, or a weight of shape (V, D), as a Head. Both sides of a divergence go through one
    scale and cap, ``like``'s: a plain weight takes them, a Head must have them."""
    if isinstance(given, Tensor):
        return Head(given) if like is None else like.with_tensors(given, None)
    if not isinstance(given, Head):
        expected = "a torch.Tensor or a Head" if like is None else "a torch.Tensor, a Head or None"
        raise TypeError(f"{name}: expected {expected}, got {type(given).__name__}")
    for field, mine, theirs in (
        ()
        if like is None
        else (
            ("logit_scale", given.logit_scale, like.logit_scale),
            ("softcap", given.softcap, like.softcap),
        )
    ):
        if mine != theirs:
            raise ValueError(f"{name}.{field}: expected head.{field}, {theirs}, got {mine}")
    return given
