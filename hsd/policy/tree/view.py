"""What the attention of one forward pass through a trie needs to know."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

KeysValues = tuple[Tensor, Tensor]  # (1, H_kv, m, d) each, after rotary embedding


class Scores(NamedTuple):
    """How a layer makes scores of queries and keys."""

    scaling: float
    window: int | None = None  # by depth in the tree, not by place in the batch
    softcap: float | None = None
    sinks: Tensor | None = None  # (H,)


@dataclass
class TreeView:
    """What attention needs to know in one forward over n nodes, m - n of whose keys come from an earlier forward.

    Attributes:
        node, pos: (n,) preorder index and depth of each computed node, in preorder.
        key_node, key_pos, key_end: (m,) of each key: those of ``past`` first, then the computed nodes.
        key_index: along the path of each run of queries, root first, where its keys are; runs one after the other.
        query_starts, key_starts: (runs + 1) where each run begins, in the n queries and in ``key_index``.
        past: keys and values of the earlier forward, by layer, (1, H_kv, m - n, d) each, after rotary embedding.
        keep: (k,) which of the computed nodes' keys and values to leave in ``kept``, by layer.
        kept: None once the forward is over. A checkpointed layer comes by again in backward, and its graph holds the
            view: a view that held the graph would keep both alive.
        served: the layers that came by. A layer that did not has ignored the tree.
    """

    node: Tensor
    pos: Tensor
    key_node: Tensor
    key_pos: Tensor
    key_end: Tensor
    key_index: Tensor
    query_starts: list[int]
    key_starts: list[int]
    past: dict[int, KeysValues] = field(default_factory=dict)
    keep: Tensor | None = None
    kept: dict[int, KeysValues] | None = field(default_factory=dict)
    backend: str = "auto"
    served: set[int] = field(default_factory=set)
    cache: dict[Any, Any] = field(default_factory=dict)  # masks, built once a forward and shared by its layers
