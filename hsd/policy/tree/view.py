"""What the attention of one forward pass through a trie needs to know."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

KeysValues = tuple[Tensor, Tensor]  # (1, H_kv, m, d) each, after rotary embedding


class Scores(NamedTuple):
    """How a layer makes scores of queries and keys."""

    scaling: float
    window: int | None = None  # by depth in the tree, not by place in the batch
    softcap: float | None = None
    sinks: Tensor | None = None  # (H,)


class TreeView:
    """What attention needs to know in one forward over n nodes, m - n of whose keys come from an earlier forward.

    No dataclass: FSDP2 rebuilds every dataclass that it finds among a layer's arguments (torch 2.13:
    ``collect_grad_tensors``, and ``_apply_to_tensors`` under mixed precision), and what a copy notes down is lost.

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
        cache: masks, built once a forward and shared by its layers.
    """

    def __init__(
        self,
        node: Tensor,
        pos: Tensor,
        key_node: Tensor,
        key_pos: Tensor,
        key_end: Tensor,
        key_index: Tensor,
        query_starts: list[int],
        key_starts: list[int],
        past: dict[int, KeysValues],
        keep: Tensor | None,
    ):
        self.node, self.pos = node, pos
        self.key_node, self.key_pos, self.key_end, self.key_index = key_node, key_pos, key_end, key_index
        self.query_starts, self.key_starts = query_starts, key_starts
        self.past, self.keep = past, keep
        self.kept: dict[int, KeysValues] | None = {}
        self.backend = "auto"
        self.served: set[int] = set()
        self.cache: dict[Any, Any] = {}
