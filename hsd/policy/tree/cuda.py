"""Tree attention for CUDA: variable-length kernels and FlexAttention."""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from hsd.policy.tree.view import Scores, TreeView


def varlen_attention(tree: TreeView, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
    """One variable-length call: each run of queries with the keys on its path, causal from the bottom right.

    Uses `torch.nn.attention.varlen` (torch >= 2.10) or flash-attn. Half precision only, as both kernels are.
    Raises ValueError for a soft cap or sinks, ImportError when neither kernel is there.
    """
    scaling, window, softcap, sinks = scores
    if softcap is not None or sinks is not None:
        raise ValueError("backend: expected 'flex' (soft cap) or 'dense' (sinks) for this layer, got 'varlen'")
    if "varlen" not in tree.cache:
        starts = [torch.tensor(s, dtype=torch.int32, device=query.device) for s in (tree.query_starts, tree.key_starts)]
        longest = [max(b - a for a, b in pairwise(s)) for s in (tree.query_starts, tree.key_starts)]
        tree.cache["varlen"] = (*starts, *longest)
    query, key, value = half(query, key, value)
    # (tokens, heads, dim); a left window of w - 1 is a window of w
    q = query[0].transpose(0, 1)
    k, v = (x[0].transpose(0, 1).index_select(0, tree.key_index) for x in (key, value))
    left = -1 if window is None else window - 1
    out = varlen_kernel()(q, k, v, *tree.cache["varlen"], scaling, left)
    return out.transpose(0, 1).unsqueeze(0)


def half(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast the rotated queries and keys are fp32 and the values are not; these kernels do not cast."""
    kind = tensors[0].device.type
    return tuple(t.to(torch.get_autocast_dtype(kind)) for t in tensors) if torch.is_autocast_enabled(kind) else tensors


def varlen_kernel() -> Any:
    """``f(q, k, v, query_starts, key_starts, longest_query, longest_key, scaling, left)``."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

        def flash(q, k, v, q_starts, k_starts, longest_q, longest_k, scaling, left):
            return flash_attn_varlen_func(
                q, k, v, q_starts, k_starts, longest_q, longest_k,
                softmax_scale=scaling, causal=True, window_size=(left, 0),
            )  # fmt: skip

        return flash

    takes_groups = "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch 2.11 has no such argument

    def native(q, k, v, q_starts, k_starts, longest_q, longest_k, scaling, left):
        groups = q.shape[1] // k.shape[1]
        if groups > 1 and not takes_groups:
            k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        return varlen_attn(
            q, k, v, q_starts, k_starts, longest_q, longest_k, scale=scaling, window_size=(left, 0),
            **({"enable_gqa": groups > 1} if takes_groups else {}),
        )  # fmt: skip

    return native


def flex_attention(tree: TreeView, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
    """FlexAttention on the visibility rule itself; the block mask is built once a forward and window.

    Raises ValueError for sinks. FlexAttention has no backward on a CPU.
    """
    scaling, window, softcap, sinks = scores
    if sinks is not None:
        raise ValueError("backend: expected 'dense' for a layer with attention sinks, got 'flex'")
    from torch.nn.attention.flex_attention import create_block_mask

    if ("flex", window) not in tree.cache:
        size = (len(tree.node), len(tree.key_node))
        tree.cache["flex", window] = create_block_mask(
            mask_mod(tree, window), None, None, *size, device=str(query.device), _compile=True
        )

    query, key, value = half(query, key, value)
    return _compiled_flex()(
        query,
        key,
        value,
        score_mod=None if softcap is None else capped(softcap),
        block_mask=tree.cache["flex", window],
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def capped(softcap: float) -> Any:
    return lambda score, b, h, q, k: softcap * torch.tanh(score / softcap)


def mask_mod(tree: TreeView, window: int | None) -> Any:
    node, pos, key_node, key_pos, key_end = tree.node, tree.pos, tree.key_node, tree.key_pos, tree.key_end

    def see(b, h, q, k):
        seen = (key_node[k] <= node[q]) & (node[q] < key_end[k])
        return seen if window is None else seen & (pos[q] - key_pos[k] < window)

    return see


_flex: Any = None


def _compiled_flex() -> Any:
    global _flex
    if _flex is None:
        from torch.nn.attention.flex_attention import flex_attention as plain

        _flex = torch.compile(plain, dynamic=True)
    return _flex
