"""Forward passes through a trie: what student and teacher share is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hsd.policy.body_and_head import body_and_head
from hsd.policy.frozen import in_eval_mode
from hsd.policy.tree.attention import is_enabled
from hsd.policy.tree.trie import Trie, build_trie
from hsd.policy.tree.view import KeysValues, TreeView

SHARING = ("tree", "prompt")
TokenLists = Sequence[Sequence[int]]


@dataclass(frozen=True)
class TreeBatch:
    """The joint trie of the sequences ``[q ; o_i]`` and ``[q ; c_i ; o_i]`` of one or several groups.

    The last token of a rollout predicts nothing that is asked for, so it is not in the trie.

    Attributes:
        student, teacher: for each rollout, the nodes that predict its tokens; of the teacher's contexts one after
            the other.
        student_nodes, teacher_nodes: all nodes on the paths of either side, ascending.
    """

    trie: Trie
    student: tuple[np.ndarray, ...]
    teacher: tuple[np.ndarray, ...]
    student_nodes: np.ndarray
    teacher_nodes: np.ndarray

    @property
    def teacher_only(self) -> np.ndarray:
        return np.setdiff1d(self.teacher_nodes, self.student_nodes, assume_unique=True)


@dataclass(frozen=True)
class KVCache:
    """Keys and values that a forward left for a later one, by layer, of these nodes in this order."""

    nodes: np.ndarray
    layers: dict[int, KeysValues]

    def detach(self) -> KVCache:
        return KVCache(self.nodes, {i: (k.detach(), v.detach()) for i, (k, v) in self.layers.items()})

    def joined(self, other: KVCache | None) -> KVCache:
        if other is None:
            return self
        both = {
            i: (torch.cat([k, other.layers[i][0]], 2), torch.cat([v, other.layers[i][1]], 2))
            for i, (k, v) in self.layers.items()
        }
        return KVCache(np.concatenate([self.nodes, other.nodes]), both)


def make_tree_batch(
    prompts: TokenLists, rollouts: TokenLists, teacher_prompts: TokenLists = (), *, sharing: str = "tree"
) -> TreeBatch:
    """The tree of rollouts ``o_i`` after ``prompts[i]`` and, if given, ``teacher_prompts[i]`` (``[q ; c_i]``), and with
    K contexts a rollout after ``teacher_prompts[k * len(rollouts) + i]`` of each.

    ``sharing="tree"`` shares every common prefix, "prompt" only what lies within the first ``len(prompts[i])`` tokens.

    Raises ValueError for lists of different lengths, an empty prompt, or an unknown ``sharing``.
    """
    if sharing not in SHARING:
        raise ValueError(f"sharing: expected one of {SHARING}, got {sharing!r}")
    g = len(rollouts)
    starts = range(0, len(teacher_prompts), max(1, g))
    sides = [("prompts", prompts), *(("teacher_prompts", teacher_prompts[k : k + g]) for k in starts)]
    sequences: list[list[int]] = []
    for name, side in sides:
        if len(side) != len(rollouts):
            got = len(prompts if name == "prompts" else teacher_prompts)
            raise ValueError(f"{name}: expected {len(rollouts)} token lists, one a rollout, got {got}")
        for i, (prompt, rollout) in enumerate(zip(side, rollouts, strict=True)):
            if not len(prompt):
                raise ValueError(
                    f"{name}: expected at least one token, which predicts the rollout's first, got none at {i}"
                )
            sequences.append([*prompt, *rollout[:-1]] if len(rollout) else [])
    limits = None if sharing == "tree" else [len(p) for p in prompts] * len(sides)
    trie = build_trie(sequences, limits)
    ends = [
        path[len(path) - len(rollouts[i % g]) :] if len(rollouts[i % g]) else path for i, path in enumerate(trie.path)
    ]
    return TreeBatch(
        trie,
        tuple(ends[:g]),
        tuple(ends[g:]),
        trie.nodes_of(range(g)),
        trie.nodes_of(range(g, len(sequences))),
    )


def forward_nodes(
    body: nn.Module,
    trie: Trie,
    nodes: np.ndarray,
    *,
    past: KVCache | None = None,
    keep: np.ndarray | None = None,
    backend: str = "auto",
) -> tuple[Tensor, KVCache | None]:
    """Hidden states (n, D) of ``nodes`` (ascending), whose ancestors are among them or in ``past``.

    With ``keep``, some of ``nodes``, also their keys and values, still on the autograd graph.

    Raises ValueError when the body's attention is not `hsd.policy.tree.attention`'s, and RuntimeError when a layer
    passed the tree by.
    """
    if not is_enabled(body):
        raise ValueError(
            "body: expected attention that takes a tree, call hsd.policy.tree.attention.enable_tree(model) first"
        )
    device = next(body.parameters()).device
    view = make_view(trie, nodes, past, keep, device)
    view.backend = backend
    # A mask with four dimensions is passed through as it is: no mask is built, and no packed sequences are detected.
    marker = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
    ids = torch.from_numpy(trie.ids[nodes]).to(device)
    out = body(
        input_ids=ids[None], attention_mask=marker, position_ids=view.pos[None], use_cache=False, tree=view
    ).last_hidden_state[0]
    layers = body.config.get_text_config().num_hidden_layers  # type: ignore[union-attr]
    if view.served != set(range(layers)):
        raise RuntimeError(f"body: expected {layers} attention layers to take the tree, got {sorted(view.served)}")
    kept, view.kept = view.kept, None
    return out, None if keep is None or kept is None else KVCache(keep, kept)


def make_view(
    trie: Trie, nodes: np.ndarray, past: KVCache | None, keep: np.ndarray | None, device: torch.device | str
) -> TreeView:
    """Where the keys of each node are. The nodes of a run that are computed together must be consecutive."""
    before = past.nodes if past is not None else np.empty(0, dtype=np.int64)
    key_nodes = np.concatenate([before, nodes])
    place = np.full(len(trie), -1)
    place[key_nodes] = np.arange(len(key_nodes))
    index, query_starts, key_starts = [], [0], [0]
    for sequence, start, stop in trie.runs:
        mine = nodes[np.searchsorted(nodes, start) : np.searchsorted(nodes, stop)]
        if not len(mine):
            continue
        path = place[trie.path[sequence][: trie.pos[mine[-1]] + 1]]
        assert (path >= 0).all() and mine[-1] - mine[0] + 1 == len(mine)
        index.append(path)
        query_starts.append(query_starts[-1] + len(mine))
        key_starts.append(key_starts[-1] + len(path))

    def to(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    return TreeView(
        node=to(nodes),
        pos=to(trie.pos[nodes]),
        key_node=to(key_nodes),
        key_pos=to(trie.pos[key_nodes]),
        key_end=to(trie.end[key_nodes]),
        key_index=to(np.concatenate(index) if index else np.empty(0, dtype=np.int64)),
        query_starts=query_starts,
        key_starts=key_starts,
        past={} if past is None else past.layers,
        keep=None if keep is None else to(np.searchsorted(nodes, keep)),
    )


def rows_of(hidden: Tensor, nodes: np.ndarray, wanted: Sequence[np.ndarray]) -> list[Tensor]:
    """The rows of ``hidden``, which belong to ``nodes`` in this order, for each array of wanted nodes."""
    flat = np.concatenate([*wanted, np.empty(0, dtype=np.int64)])
    place = np.zeros(max(nodes.max(initial=-1), flat.max(initial=-1)) + 1, dtype=np.int64)
    place[nodes] = np.arange(len(nodes))
    index = torch.from_numpy(place[flat]).to(hidden.device)
    return list(hidden.index_select(0, index).split([len(w) for w in wanted]))


def ancestors_in(trie: Trie, nodes: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Those of ``among`` that are above some node of ``nodes`` (ascending)."""
    first = np.searchsorted(nodes, among)
    return among[np.searchsorted(nodes, trie.end[among]) > first]


def forward_student(
    body: nn.Module, tree: TreeBatch, *, live_teacher: bool = True, backend: str = "auto"
) -> tuple[Tensor, KVCache | None]:
    """Hidden states of the student's nodes, and the keys and values, detached, that a live teacher needs from them."""
    keep = ancestors_in(tree.trie, tree.teacher_only if live_teacher else tree.teacher_only[:0], tree.student_nodes)
    hidden, keys = forward_nodes(body, tree.trie, tree.student_nodes, keep=keep if len(keep) else None, backend=backend)
    return hidden, None if keys is None else keys.detach()


@torch.no_grad()
def forward_live_teacher(
    body: nn.Module, tree: TreeBatch, student_hidden: Tensor, keys: KVCache | None, *, backend: str = "auto"
) -> list[Tensor]:
    """The teacher's states per rollout under the student's own weights: computed where the student's pass has none."""
    mine = tree.teacher_only
    hidden, nodes = student_hidden.detach(), tree.student_nodes
    if len(mine):
        new, _ = forward_nodes(body, tree.trie, mine, past=keys, backend=backend)
        hidden, nodes = torch.cat([hidden, new.to(hidden.dtype)]), np.concatenate([nodes, mine])
    return rows_of(hidden, nodes, tree.teacher)


@torch.no_grad()
def forward_frozen(
    body: nn.Module, tree: TreeBatch, *, student: bool, teacher: bool, backend: str = "auto"
) -> tuple[list[Tensor], list[Tensor]]:
    """States under other weights: of the student's sequences, of the teacher's, or of both in one forward."""
    parts = [tree.student_nodes] * student + [tree.teacher_nodes] * teacher
    nodes = np.unique(np.concatenate(parts))
    hidden, _ = forward_nodes(body, tree.trie, nodes, backend=backend)
    return (
        rows_of(hidden, nodes, tree.student) if student else [],
        rows_of(hidden, nodes, tree.teacher) if teacher else [],
    )


def tree_hidden_states(
    model: Any,
    prompts: TokenLists,
    rollouts: TokenLists,
    teacher_prompts: TokenLists,
    *,
    sharing: str = "tree",
    backend: str = "auto",
) -> tuple[list[Tensor], list[Tensor]]:
    """Hidden states that predict the rollouts' tokens: the student's with gradient, the teacher's without.

    Equal, up to rounding, to a forward pass of each sequence by itself::

        student[i] = body([prompts[i] ; rollouts[i]])[len(prompts[i]) - 1 : -1]              # (len(o_i), D)
        teacher[i] = body([teacher_prompts[i] ; rollouts[i]])[len(teacher_prompts[i]) - 1 : -1].detach()

    Args:
        model: a transformers causal LM (or PEFT around one) after `hsd.policy.tree.attention.enable_tree`, in which
            `hsd.policy.tree.check.why_not` finds nothing.
        prompts, rollouts, teacher_prompts: token ids, one list for each rollout; several groups may be in one call.
        sharing: "tree", or "prompt" for the question only.
        backend: "auto", or one of `hsd.policy.tree.attention.BACKENDS`.

    Raises ValueError for bad lists and for a model whose attention does not take a tree.
    """
    body = body_and_head(model).body
    tree = make_tree_batch(prompts, rollouts, teacher_prompts, sharing=sharing)
    hidden, keys = forward_student(body, tree, backend=backend)
    with in_eval_mode(model):
        teacher = forward_live_teacher(body, tree, hidden, keys, backend=backend)
    return rows_of(hidden, tree.student_nodes, tree.student), teacher
