"""Weights that a distributed engine keeps in pieces: how to tell them, and how to have them whole for a while."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

SHARDED: dict[str, Callable[[Tensor], bool]] = {
    "DTensor": lambda t: hasattr(t, "device_mesh"),
    # DeepSpeed gives a partitioned parameter a ds_id and, while it is in pieces, no elements.
    "ZeRO-3 partitioned parameter": lambda t: hasattr(t, "ds_id") and t.numel() == 0,
}


@contextmanager
def gathered(weight: Tensor) -> Generator[Tensor, None, None]:
    """The whole of a head's weight or bias, for the length of the context::

        with gathered(model.lm_head.weight) as weight:
            loss = fused_hsd_kl(student_hidden, teacher_hidden, weight)

    A DTensor becomes its ``full_tensor()``. Its gradient goes back to the pieces as the mean over the mesh: what FSDP2
    does with every other parameter, and right as well under tensor parallelism, where all ranks compute the same loss.
    (A plain ``full_tensor()`` would keep of each rank's own gradient only its own rows.) A ZeRO-3 parameter is gathered
    by DeepSpeed. A plain tensor passes through.

    Raises:
        ImportError: a ZeRO-3 parameter where deepspeed cannot be imported.
    """
    if SHARDED["DTensor"](weight):
        sharded: Any = weight
        partial = importlib.import_module("torch.distributed.tensor").Partial("avg")
        yield sharded.full_tensor(grad_placements=[partial] * sharded.device_mesh.ndim)
    elif SHARDED["ZeRO-3 partitioned parameter"](weight):
        zero = importlib.import_module("deepspeed.zero")
        with zero.GatheredParameters([weight]):
            yield weight
    else:
        yield weight
