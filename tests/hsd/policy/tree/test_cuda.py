"""The backends for CUDA: their index bookkeeping on a CPU, the kernels themselves where there is a GPU."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hsd.policy.tree import cuda
from hsd.policy.tree.attention import choose_backend, enable_tree, gather_attention, masked_attention, visible
from hsd.policy.tree.forward import KVCache, make_view, tree_hidden_states
from hsd.policy.tree.trie import build_trie
from hsd.policy.tree.view import Scores


def segment_by_segment(q, k, v, q_starts, k_starts, longest_q, longest_k, scaling, left):
    """What the kernels compute, one sequence at a time: causal from the bottom right, ``left`` keys to the left."""
    assert q_starts.dtype == k_starts.dtype == torch.int32
    out = []
    for (a, b), (c, d) in zip(pairwise(q_starts.tolist()), pairwise(k_starts.tolist()), strict=True):
        assert b - a <= longest_q and d - c <= longest_k
        at = torch.arange(d - c - (b - a), d - c)[:, None]
        key = torch.arange(d - c)[None]
        mask = (key <= at) & ((at - key <= left) | torch.tensor(left < 0))
        args = (x.transpose(0, 1) for x in (q[a:b], k[c:d], v[c:d]))
        out.append(F.scaled_dot_product_attention(*args, attn_mask=mask, scale=scaling, enable_gqa=True))
    return torch.cat(out, 1).transpose(0, 1)


def random_view(seed, device="cpu"):
    """A view with a past: the nodes of two sequences first, the rest on top."""
    rng = np.random.default_rng(seed)
    trie = build_trie([rng.integers(0, 2, rng.integers(1, 12)).tolist() for _ in range(6)])
    before = trie.nodes_of([0, 1])
    nodes = np.setdiff1d(np.arange(len(trie)), before)
    return make_view(trie, nodes, KVCache(rng.permutation(before), {}), None, device)


def qkv(view, seed, device="cpu", dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    n, m = len(view.node), len(view.key_node)
    sizes = ((1, 4, n, 16), (1, 2, m, 16), (1, 2, m, 16))
    return [torch.randn(s, generator=g, dtype=torch.float64).to(device, dtype) for s in sizes]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("window", [None, 1, 3])
def test_varlen_and_gather_agree_with_the_definition(seed, window, monkeypatch):
    monkeypatch.setattr(cuda, "varlen_kernel", lambda: segment_by_segment)
    view = random_view(seed)
    assert len(view.node) > 0
    q, k, v = qkv(view, seed)
    expected = masked_attention(q, k, v, visible(view, window), Scores(0.3))
    torch.testing.assert_close(cuda.varlen_attention(view, q, k, v, Scores(0.3, window)), expected)
    torch.testing.assert_close(gather_attention(view, q, k, v, Scores(0.3, window)), expected)


@pytest.mark.parametrize("window", [None, 2])
def test_the_flex_rule_is_the_definition(window):
    view = random_view(11)
    see = cuda.mask_mod(view, window)
    n, m = len(view.node), len(view.key_node)
    got = see(0, 0, torch.arange(n)[:, None], torch.arange(m)[None])
    assert torch.equal(got, visible(view, window))


def test_gather_in_blocks(monkeypatch):
    """Runs longer than a block, with soft cap and sinks."""
    monkeypatch.setattr("hsd.policy.tree.attention.BLOCK", 3)
    view = random_view(1)
    q, k, v = qkv(view, 1)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    for window, cap, sink in ((None, None, None), (4, None, None), (None, 2.0, None), (2, 2.0, sinks)):
        expected = masked_attention(q, k, v, visible(view, window), Scores(0.3, None, cap, sink))
        torch.testing.assert_close(gather_attention(view, q, k, v, Scores(0.3, window, cap, sink)), expected)


def test_which_backend_auto_takes(monkeypatch):
    def chosen(device, dtype, softcap=None, sinks=False):  # a run of 6 queries and two of 2, of 10 keys in all
        return choose_backend(device, dtype, [6, 2, 2], [6, 8, 8], 10, softcap, sinks)

    assert chosen("cuda", torch.bfloat16) == "varlen"
    assert chosen("cuda", torch.bfloat16, softcap=30.0) == "flex"
    assert chosen("cuda", torch.bfloat16, sinks=True) == "dense"
    assert chosen("cuda", torch.float32) == chosen("cpu", torch.float32) == "dense"  # a small tree
    monkeypatch.setattr("hsd.policy.tree.attention.SMALL", 0)
    assert chosen("cuda", torch.float32) == chosen("cpu", torch.bfloat16) == "gather"


def test_the_kernels_get_one_dtype_under_autocast():
    mixed = torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert {t.dtype for t in cuda.half(*mixed)} == {torch.bfloat16}
    assert cuda.half(*mixed)[0] is mixed[0]


def test_the_kernels_refuse_what_they_cannot_do():
    view = random_view(2)
    q, k, v = qkv(view, 2)
    with pytest.raises(ValueError, match="soft cap"):
        cuda.varlen_attention(view, q, k, v, Scores(0.3, softcap=30.0))
    with pytest.raises(ValueError, match="sinks"):
        cuda.flex_attention(view, q, k, v, Scores(0.3, sinks=torch.zeros(4)))


@pytest.mark.cuda
@pytest.mark.parametrize("backend", ["varlen", "flex"])
@pytest.mark.parametrize("window", [None, 3])
def test_kernels_on_a_gpu(backend, window):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    view = random_view(3, "cuda")
    q, k, v = qkv(view, 3, "cuda", torch.bfloat16)
    run = cuda.varlen_attention if backend == "varlen" else cuda.flex_attention
    expected = masked_attention(*(x.double() for x in (q, k, v)), visible(view, window), Scores(0.3))
    torch.testing.assert_close(run(view, q, k, v, Scores(0.3, window)).double(), expected, rtol=3e-2, atol=3e-2)


@pytest.mark.cuda
@pytest.mark.parametrize("backend", ["varlen", "flex"])
def test_a_model_on_a_gpu(backend, build, group):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    model = build("mistral", head_dim=16).to("cuda", torch.bfloat16)
    enable_tree(model)
    dense = tree_hidden_states(model, *group(7), backend="dense")
    got = tree_hidden_states(model, *group(7), backend=backend)
    for a, b in zip(got, dense, strict=True):
        torch.testing.assert_close(torch.cat(a), torch.cat(b), rtol=6e-2, atol=6e-2)
