"""Attention over the nodes of a trie, registered with transformers; without a tree it is the model's own attention.

A body is called with ``tree=TreeView(...)``; every layer hands that to `tree_attention`. `enable_tree` sets the
registered name on the model's config. It stays set: a checkpointed layer looks at the config again in backward.
"""

from __future__ import annotations

import math
import sys
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hsd.policy.frozen import inner_model
from hsd.policy.tree import cuda
from hsd.policy.tree.view import Scores, TreeView

PREFIX = "hsd_tree_"
BACKENDS = ("auto", "dense", "gather", "varlen", "flex")
BLOCK = 256  # query rows per SDPA call: few enough to skip most of the masked triangle
SMALL = 5_000  # masked scores that cost about as much as one more SDPA call on a CPU
# What layers pass besides and what does not change attention here: positions are in the rotated keys already.
HARMLESS = frozenset({"position_ids", "use_cache", "cache_position", "position_embeddings", "output_attentions"})


def enable_tree(model: Any) -> None:
    """Let ``model`` (transformers, or PEFT around one) accept ``tree=``; ordinary batches are computed as before.

    Raises ValueError for a model whose own attention is neither SDPA nor eager.
    """
    inner = inner_model(model)
    base = inner.config._attn_implementation
    if base.startswith(PREFIX):
        return
    if base not in ("eager", "sdpa"):  # transformers looks up flash kernels by the very name that is replaced here
        raise ValueError(
            f"attn_implementation: expected 'sdpa' or 'eager', got {base!r}; the tree brings its own kernels on CUDA"
        )
    name = PREFIX + base
    AttentionInterface.register(name, partial(tree_attention, base=base))
    # Without a mask function of the same name, padding would be lost on ordinary batches.
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    inner.set_attn_implementation(name)
    if not is_enabled(model):
        raise ValueError(f"model: {type(inner).__name__} does not take an attention implementation")


def disable_tree(model: Any) -> None:
    """Undo `enable_tree`."""
    inner = inner_model(model)
    if is_enabled(model):
        inner.set_attn_implementation(inner.config._attn_implementation.removeprefix(PREFIX))


def is_enabled(model: Any) -> bool:
    return (model.config.get_text_config()._attn_implementation or "").startswith(PREFIX)


def tree_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    base: str,
    tree: TreeView | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """As every function of transformers' `AttentionInterface`: (1, H, n, d) -> (1, n, H, d_value).

    Honours ``scaling``, ``sliding_window`` (by depth in the tree, not by place in the pack), ``softcap``, attention
    sinks (``s_aux``) and grouped heads; raises ValueError for any other argument that a layer passes.
    """
    if tree is None:
        plain = sys.modules[type(module).__module__].eager_attention_forward if base == "eager" else None
        call = ALL_ATTENTION_FUNCTIONS.get_interface(base, plain)  # type: ignore[arg-type]
        return call(module, query, key, value, attention_mask, *args, **kwargs)
    scaling, dropout = (*args, *(kwargs.pop(k, None) for k in ("scaling", "dropout")[len(args) :]))
    window, softcap = kwargs.pop("sliding_window", None), kwargs.pop("softcap", None)
    sinks = kwargs.pop("s_aux", None)
    if dropout:
        raise ValueError(f"dropout: expected 0 in a tree, got {dropout}")
    if kwargs.pop("is_causal", None) is False or getattr(module, "is_causal", True) is False:
        raise ValueError(f"is_causal: expected causal attention in a tree, got {type(module).__name__}")
    other = [k for k, v in kwargs.items() if v is not None and v is not False and k not in HARMLESS]
    if other:
        raise ValueError(f"attention: {type(module).__name__} passes {sorted(other)}, which the tree does not know")

    layer = module.layer_idx
    if tree.keep is not None:
        pair = (key.index_select(2, tree.keep), value.index_select(2, tree.keep))
        if tree.kept is not None:
            tree.kept[layer] = pair
    tree.served.add(layer)
    if tree.past:
        past_key, past_value = tree.past[layer]
        key, value = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = Scores(scaling, window, softcap, sinks)
    return _attend(tree, query, key, value, scores).transpose(1, 2).contiguous(), None


def _attend(tree: TreeView, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
    """(1, H, n, d), (1, H_kv, m, d), (1, H_kv, m, d_value) -> (1, H, n, d_value), as all backends."""
    backend = tree.backend
    if backend == "auto":
        rows, paths = _lengths(tree.query_starts), _lengths(tree.key_starts)
        some = (scores.softcap, scores.sinks is not None)
        backend = choose_backend(query.device.type, query.dtype, rows, paths, len(tree.key_node), *some)
    if backend == "dense":
        at = ("added", scores.window, query.dtype)
        if at not in tree.cache:
            tree.cache[at] = _added(~visible(tree, scores.window), query)
        return masked_attention(query, key, value, tree.cache[at], scores)
    if backend == "gather":
        return gather_attention(tree, query, key, value, scores)
    if backend == "varlen":
        return cuda.varlen_attention(tree, query, key, value, scores)
    if backend == "flex":
        return cuda.flex_attention(tree, query, key, value, scores)
    raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")


def choose_backend(
    device: str,
    dtype: torch.dtype,
    rows: list[int],
    paths: list[int],
    keys: int,
    softcap: float | None,
    has_sinks: bool,
) -> str:
    """On CUDA in half precision varlen, FlexAttention for a soft cap, dense for sinks; else gather, dense if small.

    ``rows`` and ``paths``, (runs,) each, are the queries of a run and the keys on its path, ``keys`` those of the tree.
    """
    if device == "cuda" and (torch.is_autocast_enabled(device) or dtype in (torch.bfloat16, torch.float16)):
        return "dense" if has_sinks else "varlen" if softcap is None else "flex"
    gathered = sum(r * p for r, p in zip(rows, paths, strict=True))
    return "dense" if sum(rows) * keys <= gathered + SMALL * len(rows) else "gather"


def _lengths(starts: list[int]) -> list[int]:
    return [b - a for a, b in pairwise(starts)]


def visible(tree: TreeView, window: int | None) -> Tensor:
    """(n, m) True where a query may see a key. The definition; the other backends must agree with it."""
    q, k = tree.node[:, None], tree.key_node[None, :]
    mask = (k <= q) & (q < tree.key_end)
    return mask if window is None else mask & (tree.pos[:, None] - tree.key_pos < window)


def gather_attention(tree: TreeView, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
    """Run by run: the keys on its path, gathered in order of depth, then plain causal attention at the path's end."""
    rows, paths = _lengths(tree.query_starts), _lengths(tree.key_starts)
    sizes = [min(BLOCK, r - a) for r in rows for a in range(0, r, BLOCK)]
    queries = iter(query.split(sizes, 2))
    keys = key.index_select(2, tree.key_index).split(paths, 2)
    values = value.index_select(2, tree.key_index).split(paths, 2)
    out = []
    for r, length, k, v in zip(rows, paths, keys, values, strict=True):
        for a in range(length - r, length, BLOCK):
            b = min(a + BLOCK, length)
            low = 0 if scores.window is None else max(0, a - scores.window + 1)
            mask = _band(tree, b - a, a - low, scores.window, query)
            out.append(masked_attention(next(queries), k[:, :, low:b], v[:, :, low:b], mask, scores))
    return torch.cat(out, 2)


def _band(tree: TreeView, rows: int, before: int, window: int | None, like: Tensor) -> Tensor:
    """(rows, before + rows), to be added: causal, with ``before`` keys ahead of the first query's own."""
    at = (rows, before, window, like.dtype)
    if at not in tree.cache:
        hidden = torch.ones(rows, before + rows, dtype=torch.bool, device=like.device).triu(before + 1)
        if window is not None:
            hidden |= torch.ones_like(hidden).tril(before - window)
        tree.cache[at] = _added(hidden, like)
    return tree.cache[at]


def _added(hidden: Tensor, like: Tensor) -> Tensor:
    """A mask to be added to scores. SDPA would convert a bool one anew in every call."""
    return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, -math.inf)


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, form: Scores) -> Tensor:
    """(1, H, n, d), mask (n, m) bool or added to the scores: SDPA, or plain mathematics with a soft cap or sinks. The
    mask has the window in it."""
    scaling, _, softcap, sinks = form
    groups = query.shape[1] // key.shape[1]
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=groups > 1)
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = query @ key.mT * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if sinks is not None:  # one more column that takes probability and gives no value
        column = sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        return torch.cat([scores, column], -1).softmax(-1)[..., :-1].to(value.dtype) @ value
    return scores.softmax(-1).to(value.dtype) @ value
