"""A trie over token ids: every prefix that several sequences share becomes one node, computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Trie:
    """Nodes in depth-first preorder. Node q sees node k when ``k <= q < end[k]``: k is q itself or above it.

    Attributes:
        ids: (N,) token ids.
        pos: (N,) depth, the position for rotary embeddings and windows.
        end: (N,) one past the last node of the subtree.
        path: for each sequence, as given, its nodes from the root on.
        runs: (sequence, start, stop): nodes start..stop-1 were added by that sequence, each the child of the one
            before. The runs cover all nodes in order, so there are at most as many as sequences.
    """

    ids: np.ndarray
    pos: np.ndarray
    end: np.ndarray
    path: tuple[np.ndarray, ...]
    runs: tuple[tuple[int, int, int], ...]

    def __len__(self) -> int:
        return len(self.ids)

    def nodes_of(self, sequences: Sequence[int]) -> np.ndarray:
        """Ascending nodes on the paths of these sequences: closed under ancestors."""
        return np.flatnonzero(self.visits(sequences))

    def visits(self, sequences: Sequence[int]) -> np.ndarray:
        """(N,) how many of these sequences pass through each node."""
        count = np.zeros(len(self), dtype=np.int64)
        for i in sequences:
            count[self.path[i]] += 1
        return count


def build_trie(sequences: Sequence[Sequence[int]], shareable: Sequence[int] | None = None) -> Trie:
    """The trie of ``sequences``, of one group or of several.

    In sorted order a sequence shares with all before it exactly what it shares with its predecessor, so sorting gives
    the trie and its preorder at once.

    Args:
        sequences: token ids; may repeat, may be empty, may be prefixes of each other.
        shareable: how many leading tokens of each sequence may be shared; all of them by default.

    Raises:
        TypeError: a token id is not an integer.
        ValueError: ``shareable`` has another length than ``sequences``.
    """
    if shareable is not None and len(shareable) != len(sequences):
        raise ValueError(f"shareable: expected {len(sequences)} numbers, one a sequence, got {len(shareable)}")
    arrays = [_token_array(i, s) for i, s in enumerate(sequences)]
    limits = [len(a) for a in arrays] if shareable is None else list(shareable)
    order = sorted(range(len(arrays)), key=lambda i: arrays[i].tolist())

    total = sum(map(len, arrays))
    ids, pos, end = (np.empty(total, dtype=np.int64) for _ in range(3))
    paths: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * len(arrays)
    runs: list[tuple[int, int, int]] = []
    size, last = 0, None
    for i in order:
        common = 0
        if last is not None:
            common = min(_common_prefix(arrays[last], arrays[i]), limits[last], limits[i])
            end[paths[last][common:]] = size
        new = np.arange(size, size + len(arrays[i]) - common)
        ids[new] = arrays[i][common:]
        pos[new] = np.arange(common, len(arrays[i]))
        paths[i] = np.concatenate([paths[last][:common], new]) if last is not None else new
        if len(new):
            runs.append((i, size, size + len(new)))
        size, last = size + len(new), i
    if last is not None:
        end[paths[last]] = size
    return Trie(ids[:size].copy(), pos[:size].copy(), end[:size].copy(), tuple(paths), tuple(runs))


def _token_array(i: int, sequence: Sequence[int]) -> np.ndarray:
    array = np.asarray(sequence)
    if array.size == 0:
        return np.empty(0, dtype=np.int64)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"sequences: expected lists of integer token ids, got {array.dtype} in sequence {i}")
    return array.astype(np.int64)


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n
