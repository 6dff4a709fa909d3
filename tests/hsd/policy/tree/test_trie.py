"""The trie by property, on random sequences over small alphabets, where they share a lot."""

from itertools import pairwise

import numpy as np
import pytest

from hsd.policy.tree.trie import build_trie


def random_sequences(rng):
    count, alphabet = rng.integers(1, 9), rng.integers(1, 4)
    return [rng.integers(0, alphabet, rng.integers(0, 9)).tolist() for _ in range(count)]


@pytest.mark.parametrize("seed", range(60))
def test_trie_of_random_sequences(seed):
    rng = np.random.default_rng(seed)
    sequences = random_sequences(rng)
    trie = build_trie(sequences)
    prefixes = {tuple(s[:n]) for s in sequences for n in range(1, len(s) + 1)}
    assert len(trie) == len(prefixes)
    parent = {}
    for s, path in zip(sequences, trie.path, strict=True):
        assert trie.ids[path].tolist() == s
        assert trie.pos[path].tolist() == list(range(len(s)))
        assert (np.diff(path) > 0).all()
        for above, below in pairwise(path):
            assert parent.setdefault(below, above) == above  # one parent only
    for q in range(len(trie)):
        ancestors, k = {q}, q
        while k in parent:
            k = parent[k]
            ancestors.add(k)
        assert {k for k in range(len(trie)) if k <= q < trie.end[k]} == ancestors
    assert [n for _, a, b in trie.runs for n in range(a, b)] == list(range(len(trie)))
    for i, start, stop in trie.runs:
        assert set(range(start, stop)) <= set(trie.path[i].tolist())


@pytest.mark.parametrize("seed", range(20))
def test_a_limit_on_what_may_be_shared(seed):
    """Deeper than its limit a sequence has its own nodes; above, the nodes of the full trie."""
    rng = np.random.default_rng(seed)
    sequences = random_sequences(rng)
    limit = int(rng.integers(0, 5))
    trie = build_trie(sequences, [limit] * len(sequences))
    shared = {tuple(s[:n]) for s in sequences for n in range(1, min(len(s), limit) + 1)}
    assert len(trie) == len(shared) + sum(max(len(s) - limit, 0) for s in sequences)
    for s, path in zip(sequences, trie.path, strict=True):
        assert trie.ids[path].tolist() == s
    assert (trie.visits(range(len(sequences)))[trie.pos >= limit] == 1).all()


def test_the_shared_prefix_ends_at_the_first_differing_token():
    """Also when the text goes on alike: [1, 2, 9] and [1, 7, 9] share one token."""
    trie = build_trie([[1, 2, 9], [1, 7, 9]])
    assert len(trie) == 5
    assert trie.visits([0, 1]).tolist() == [2, 1, 1, 1, 1]
    assert trie.nodes_of([1]).tolist() == [0, 3, 4]


def test_bad_input_is_named():
    with pytest.raises(TypeError, match="sequence 1"):
        build_trie([[1, 2], [1.5]])
    with pytest.raises(ValueError, match="shareable"):
        build_trie([[1, 2], [3]], [1])
