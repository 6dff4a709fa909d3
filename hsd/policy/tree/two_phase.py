"""The exact gradient of a group of any size in bounded memory: its shared tokens once, its rollouts a few at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hsd.policy.frozen import in_eval_mode
from hsd.policy.tree.forward import KVCache, TreeBatch, forward_nodes, rows_of

Chunk = Sequence[int]
# Student states (with gradient) and teacher states of the chunk's rollouts -> its share of the loss, a scalar.
ChunkLoss = Callable[[Chunk, list[Tensor], list[Tensor]], Tensor]
Teacher = Callable[[Chunk], list[Tensor]]


def two_phase_loss(
    model: nn.Module,
    body: nn.Module,
    tree: TreeBatch,
    chunk_loss: ChunkLoss,
    budget: int,
    *,
    teacher: Teacher | None = None,
    backend: str = "auto",
) -> Tensor:
    """``sum(chunk_loss(chunk, student states, teacher states))``, a scalar whose backward gives the exact gradient.

    Phase one computes the nodes that several rollouts share and detaches their keys, values and states as leaves. Each
    chunk of rollouts is then computed on top and differentiated at once into parameters and leaves. Last, what the
    leaves have gathered goes back through phase one. Memory: the shared nodes, one chunk of at most ``budget`` nodes
    (or one rollout, if a single one is longer), and one more gradient of the parameters, which backward hands over.

    Args:
        model: whose parameters get gradients. Checkpointing must be the non-reentrant one.
        tree: of student and teacher sequences.
        teacher: the teacher's states of a chunk's rollouts; by default under the student's own weights.

    Raises ValueError for a budget below 1, a tree without tokens, and reentrant checkpointing, which knows no leaves.
    """
    if budget < 1:
        raise ValueError(f"budget: expected at least 1 token, got {budget}")
    if not len(tree.trie):
        raise ValueError("tree: expected at least one rollout with tokens, got none")
    _refuse_reentrant(body)
    trie, rollouts = tree.trie, range(len(tree.student))
    visits = trie.visits(rollouts)
    shared = np.flatnonzero(visits > 1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    total: list[Tensor | None] = [None] * len(parameters)

    trunk, keys = forward_nodes(body, trie, shared, keep=shared, backend=backend) if len(shared) else (None, None)
    roots: list[Tensor] = [] if trunk is None or keys is None else [trunk, *_flat(keys)]
    leaves = [t.detach().requires_grad_() for t in roots]
    past = None if keys is None else KVCache(shared, _unflat(keys, leaves[1:]))
    teacher_states = teacher or _live_teacher(model, body, tree, shared, leaves, keys, backend)
    gathered: list[Tensor | None] = [None] * len(leaves)

    value: Tensor | None = None
    for chunk in chunks_of(tree, visits, budget):
        seen = teacher_states(chunk)
        own = np.setdiff1d(trie.nodes_of(chunk), shared)
        parts = [leaves[0]] if leaves else []
        if len(own):
            parts.append(forward_nodes(body, trie, own, past=past, backend=backend)[0])
        states = rows_of(torch.cat(parts), np.concatenate([shared, own]), [tree.student[i] for i in chunk])
        loss = chunk_loss(chunk, states, seen)
        grads = torch.autograd.grad(loss, [*parameters, *leaves], allow_unused=True)
        _add(total, grads[: len(parameters)])
        _add(gathered, grads[len(parameters) :])
        value = loss.detach() if value is None else value + loss.detach()

    reached = [(r, g) for r, g in zip(roots, gathered, strict=True) if g is not None and r.requires_grad]
    if reached and parameters:
        outputs, gradients = zip(*reached, strict=True)
        _add(total, torch.autograd.grad(outputs, parameters, gradients, allow_unused=True))
    assert value is not None
    return _Known.apply(value, total, *parameters)  # type: ignore[return-value]


def _add(sums: list[Tensor | None], terms: Sequence[Tensor | None]) -> None:
    for i, term in enumerate(terms):
        have = sums[i]
        sums[i] = have if term is None else term if have is None else have + term


class _Known(torch.autograd.Function):
    """A scalar whose gradient is known: backward hands it to the parameters, through DDP's hooks and loss scaling."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor | None], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (scale,) = grad_outputs
        return None, None, *(None if g is None else g * scale.to(g.dtype) for g in ctx.gradients)


def chunks_of(tree: TreeBatch, visits: np.ndarray, budget: int) -> list[list[int]]:
    """Rollouts in order, as many together as keep their own nodes, of both sides, within ``budget``.

    One without nodes of its own, as a masked rollout is, never makes a chunk by itself.
    """
    chunks: list[list[int]] = []
    used = 0
    for i in range(len(tree.student)):
        cost = int((visits[tree.trie.path[i]] < 2).sum())
        cost += sum(len(path) for path in tree.trie.path[len(tree.student) + i :: len(tree.student)])
        if not chunks or (cost and used and used + cost > budget):
            chunks.append([])
            used = 0
        chunks[-1].append(i)
        used += cost
    return chunks


def _live_teacher(
    model: nn.Module,
    body: nn.Module,
    tree: TreeBatch,
    shared: np.ndarray,
    leaves: list[Tensor],
    keys: KVCache | None,
    backend: str,
) -> Teacher:
    """Contexts that several rollouts share are computed once, each rollout behind them with its chunk."""
    trie, g = tree.trie, len(tree.student)
    if not tree.teacher:
        return lambda chunk: []
    repeated = np.setdiff1d(np.flatnonzero(trie.visits(range(g, g + len(tree.teacher))) > 1), shared)
    past = None if keys is None else keys.detach()
    hidden = [leaves[0].detach()] if leaves else []
    with torch.no_grad(), in_eval_mode(model):
        if len(repeated):
            new, kept = forward_nodes(body, trie, repeated, past=past, keep=repeated, backend=backend)
            assert kept is not None
            hidden.append(new)
            past = kept if past is None else past.joined(kept)
    known = np.concatenate([shared, repeated])

    def states(chunk: Chunk) -> list[Tensor]:
        rows = [k + i for k in range(0, len(tree.teacher), g) for i in chunk]  # context by context
        own = np.setdiff1d(trie.nodes_of([g + i for i in rows]), known)
        with torch.no_grad(), in_eval_mode(model):
            new = [forward_nodes(body, trie, own, past=past, backend=backend)[0]] if len(own) else []
            parts = [h.to((hidden or new)[0].dtype) for h in [*hidden, *new]]
            return rows_of(torch.cat(parts), np.concatenate([known, own]), [tree.teacher[i] for i in rows])

    return states


def _flat(keys: KVCache) -> list[Tensor]:
    return [t for pair in keys.layers.values() for t in pair]


def _unflat(keys: KVCache, flat: Sequence[Tensor]) -> dict[int, tuple[Tensor, Tensor]]:
    return {layer: (flat[2 * n], flat[2 * n + 1]) for n, layer in enumerate(keys.layers)}


def _refuse_reentrant(body: nn.Module) -> None:
    for module in body.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(module, "gradient_checkpointing", False) and getattr(function, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                "gradient_checkpointing_kwargs: expected use_reentrant=False with a token budget, got True"
            )
