"""Token ids of different lengths as one tensor and its mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def padded(
    sequences: Sequence[Sequence[int]], pad_id: int = 0, side: Literal["left", "right"] = "right"
) -> tuple[Tensor, Tensor]:
    """Ids (B, longest), int64, with ``pad_id`` on ``side``, and their mask, 1 on the tokens. On the CPU."""
    rows = [torch.tensor(ids, dtype=torch.long) for ids in sequences]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side=side)
    return ids, pad_sequence([torch.ones_like(x) for x in rows], batch_first=True, padding_side=side)
