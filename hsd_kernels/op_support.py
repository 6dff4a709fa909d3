"""What the operators and their loops share: gradients, live rows, dtypes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Gradients(NamedTuple):
    """Of the student's hidden states (T, D), its head's weight (V, D) and bias (V,); None where there is none."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class Wanted(NamedTuple):
    """Which of the `Gradients` to make."""

    hidden: bool
    weight: bool
    bias: bool


NOTHING = Wanted(False, False, False)


def wide_dtype(like: Tensor) -> torch.dtype:
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def storage_dtype(like: Tensor) -> torch.dtype:
    """fp16 gradients wait for the upstream gradient, often a loss scale of 65,536, in fp32."""
    return torch.float32 if like.dtype == torch.float16 else like.dtype


def stored(made: Gradients, student_hidden: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """``made`` times ``scale`` in the storage dtype, an empty tensor for None: an operator returns tensors."""

    def finish(g: Tensor | None) -> Tensor:
        if g is None:
            return student_hidden.new_empty(0)
        return in_dtype(g if scale == 1.0 else g.mul_(scale), storage_dtype(student_hidden))

    return finish(made.hidden), finish(made.weight), finish(made.bias)


def stored_fake(tensors: Gradients, wanted: Wanted) -> tuple[Tensor, Tensor, Tensor]:
    """What `stored` returns of the gradients of ``tensors``, without numbers."""

    def like(x: Tensor | None, made: bool) -> Tensor:
        assert tensors.hidden is not None
        return x.new_empty(x.shape, dtype=storage_dtype(x)) if made and x is not None else tensors.hidden.new_empty(0)

    return like(tensors.hidden, wanted.hidden), like(tensors.weight, wanted.weight), like(tensors.bias, wanted.bias)


def wants(t: Tensor | None) -> bool:
    """Whether ``t`` gets a gradient."""
    return torch.is_grad_enabled() and t is not None and t.requires_grad


def live_rows(token_weights: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """Positions (R,) and weights (R,) of the tokens that count. One host synchronization if weights are given."""
    tokens, wide = like.shape[0], wide_dtype(like)
    if token_weights is None:
        return torch.arange(tokens, device=like.device), torch.ones(tokens, device=like.device, dtype=wide)
    w = token_weights.to(wide)
    live, bad = torch.stack([w.count_nonzero(), (~w.isfinite()).count_nonzero()]).tolist()
    if bad:
        raise ValueError(f"token_weights: expected finite numbers, got {bad} that are NaN or infinite")
    rows = torch.nonzero_static(w, size=live).squeeze(-1)
    return rows, w[rows]


def checked_targets(ids: Tensor, rows: Tensor, vocab: int | None) -> Tensor:
    """As int64. On CUDA a check would synchronize: there the log-probs of an id out of range are NaN. So they are
    where the vocabulary is divided over ranks, ``vocab`` None."""
    ids = ids.long()  # first: torch has no minimum of unsigned numbers of 16 bits or more
    live = ids[rows]
    if vocab is not None and not ids.is_cuda and live.numel():
        low, high = int(live.min()), int(live.max())
        if low < 0 or high >= vocab:
            raise ValueError(f"target_ids: expected values in [0, {vocab}), got {low} to {high}")
    return ids


def in_dtype(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t.to(dtype)``, without a call where it is: a small problem is bound by its calls."""
    return t if t.dtype == dtype else t.to(dtype)


def times(weights: Tensor, values: Tensor) -> Tensor:
    """0 where the weight is 0, also where the value is infinite or NaN (0 log 0 = 0). A NaN weight stays."""
    return torch.where(weights == 0, 0.0, weights * values)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Operands are in the right dtype here: autocast would run the GEMMs of upcast operands in bf16 (CPU)."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def autocast_to(first: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """Under autocast a linear layer runs in the autocast dtype; so does the head here."""
    # The meta device has no autocast.
    if not isinstance(first, Tensor) or (kind := first.device.type) == "meta" or not torch.is_autocast_enabled(kind):  # pyright: ignore[reportUnnecessaryIsInstance]
        return first, *others
    dtype = torch.get_autocast_dtype(kind)
    low = (torch.float32, torch.bfloat16, torch.float16)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype in low else t for t in (first, *others))


def rows_of(x: Tensor, here: slice) -> Tensor:
    """``x[here]``, without a call where that is all of it: a small problem is bound by its calls."""
    return x if here.start == 0 and here.stop >= x.shape[0] else x[here]
