"""What the ranks of a run make of their tensors together. All of them call these, in the same order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def mean_over_ranks(accelerator: Any, value: Tensor) -> Tensor:
    return accelerator.reduce(value.float(), reduction="mean")


def of_all_ranks(accelerator: Any, values: Tensor) -> Tensor:
    """The values (n,) of each rank, one rank after the other; NaN is left out."""
    gathered = accelerator.gather(accelerator.pad_across_processes(values.float(), pad_index=float("nan")))
    return gathered[~gathered.isnan()]


def means(accelerator: Any, values: Mapping[str, Tensor | float]) -> dict[str, float]:
    """Over the ranks, ignoring NaN (nothing to measure); one collective for all of them."""
    device = accelerator.device
    mine = torch.stack([torch.as_tensor(v, dtype=torch.float32, device=device) for v in values.values()])
    of_ranks = accelerator.gather(mine.unsqueeze(0)).nanmean(0).tolist()
    return dict(zip(values, of_ranks, strict=True))
