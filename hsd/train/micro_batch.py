"""One micro-batch: the forward passes of student, teacher and reference, and the loss over their hidden states.

Sequences go through the models one by one, or through the tree that shares their prefixes, and a tree over the token
budget is differentiated a few rollouts at a time. Loss and gradient are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hsd.policy.body_and_head import BodyAndHead, body_and_head
from hsd.policy.forward import FrozenStates
from hsd.policy.frozen import in_eval_mode
from hsd.policy.tree.batch import pad_states, pays, tree_of
from hsd.policy.tree.forward import TreeBatch, forward_frozen, forward_live_teacher, forward_student, rows_of
from hsd.policy.tree.two_phase import two_phase_loss
from hsd.train.batch import RolloutBatch
from hsd.train.diagnostics import overlap
from hsd.train.teachers import FrozenPolicies
from hsd.train.update import LossOutput, Objective, Targets, method_loss
from hsd_kernels import Head, RowStats


@dataclass(frozen=True)
class States:
    """Of the rollouts' tokens; the student's (B, T, D) with gradient."""

    student: Tensor
    teachers: tuple[FrozenStates, ...]  # of each context; none for a method without a teacher
    reference: FrozenStates | None

    def at(self, rows: Sequence[int], length: int) -> States:
        """Of some rows, and their first ``length`` tokens."""

        def some(x: FrozenStates) -> FrozenStates:
            return FrozenStates(x.hidden[list(rows), :length], x.head)

        reference = None if self.reference is None else some(self.reference)
        return States(self.student[list(rows), :length], tuple(map(some, self.teachers)), reference)


def _loss(states: States, head: Head, targets: Targets, objective: Objective) -> LossOutput:
    return method_loss(states.student, head, states.teachers, states.reference, targets, objective)


@dataclass(frozen=True)
class MicroBatchLoss:
    """The loss of a micro-batch under a policy.

    Args:
        frozen: The policies of teacher and reference beside the live one.
        sharing: "tree", "prompt" or "none", as in `hsd.policy.tree.forward.make_tree_batch`.
        loss_mean, policy_mean: As in `hsd.HSDConfig`.
        always: Share prefixes also where that saves little.
        token_budget: Tokens of a tree above which it is differentiated in chunks.
        diagnostics: Whether to compare the likeliest tokens of student and teacher; not of a batch in chunks.
    """

    frozen: FrozenPolicies
    sharing: str
    loss_mean: str
    policy_mean: str = "rollout"
    always: bool = False
    token_budget: int | None = None
    diagnostics: bool = False

    def __call__(self, policy: Any, batch: RolloutBatch, objective: Objective) -> LossOutput:
        over_rows = objective.over_rows()
        if over_rows is None:
            batch = replace(batch, extra=None)
        tree, budget = self.tree(batch), self.token_budget
        if tree is not None and budget is not None and len(tree.trie) > budget and torch.is_grad_enabled():
            return self._in_chunks(policy, batch, tree, budget, objective)
        states = self._one_by_one(policy, batch) if tree is None else self._through(tree, policy, batch)
        head = body_and_head(policy).head
        out = self._of(states, head, batch, objective, range(len(batch.whole.completion_ids)))
        if not (self.diagnostics and states.teachers):
            return out
        size, length = batch.loss_mask.shape
        mine = states.at(range(size), length)
        temperature = objective.divergence.temperature
        return replace(out, overlap=overlap(mine.student, mine.teachers[0], head, batch.divergence_mask, temperature))

    def _of(
        self, states: States, head: Head, batch: RolloutBatch, objective: Objective, which: Sequence[int]
    ) -> LossOutput:
        """The loss of some rollouts and extra rows, by their numbers in ``batch.whole``, whose states these are."""
        targets = batch.targets(self.loss_mean, self.policy_mean)
        size = len(targets.ids)
        mine = [n for n in which if n < size]
        if len(mine) < size or batch.extra is not None:
            states_of_mine = states.at([k for k, n in enumerate(which) if n < size], targets.ids.shape[1])
            targets = targets.rows(torch.tensor(mine, dtype=torch.long, device=targets.ids.device))
        else:
            states_of_mine = states
        parts = [LossOutput(states.student.sum() * 0.0, None)]
        if mine:
            parts = [_loss(states_of_mine, head, targets, objective)]
        over_rows = objective.over_rows()
        at = [k for k, n in enumerate(which) if n >= size]
        if at and over_rows is not None:
            rows = batch.targets_of_rows()
            some = torch.tensor([which[k] - size for k in at], device=rows.ids.device)
            parts.append(_loss(states.at(at, rows.ids.shape[1]), head, rows.rows(some), over_rows))
        return parts[0] if len(parts) == 1 else replace(parts[0], loss=parts[0].loss + parts[1].loss)

    @torch.no_grad()
    def stats(self, policy: Any, batch: RolloutBatch, objective: Objective) -> RowStats:
        """Of student and teacher, per token (B, T), nothing minimised: what a batch is scored by."""
        measured = replace(objective, terms=(), reference_coef=0.0, importance_cap=None)  # no term, no extra row
        stats = replace(self, token_budget=None, diagnostics=False)(policy, batch, measured).stats
        assert stats is not None
        return stats

    def tree(self, batch: RolloutBatch) -> TreeBatch | None:
        """None where every sequence goes by itself."""
        if self.sharing == "none":
            return None
        tree = tree_of(batch.whole, self.sharing)
        wanted = self.always or pays(tree, batch.whole, self.frozen.live)
        wanted = wanted and len(tree.trie) > 0  # a batch whose rollouts are all masked has no nodes
        held = self.frozen.held
        if held.gathers:  # the same forward passes in the same order on every rank, or a gather mixes their weights
            wanted = wanted and not (self.frozen.live and not len(tree.teacher_only))
            wanted = held.agree(wanted, batch.inputs.completion_ids.device)
        return tree if wanted else None

    def _one_by_one(self, policy: Any, batch: RolloutBatch) -> States:
        def forward(parts: BodyAndHead, prompts: Sequence[str]) -> list[Tensor]:
            return [batch.whole.forward(parts, who) for who in prompts]

        parts = body_and_head(policy)
        with torch.no_grad(), in_eval_mode(policy):  # no dropout noise in the target
            frozen, reference = self.frozen.forward(policy, forward)
            live = FrozenStates(forward(parts, ["teacher"])[0]) if self.frozen.live else None
        student = forward(parts, ["student"])[0]
        return States(student, self._teachers(batch, live, frozen, parts.head), reference)

    def _teachers(
        self, batch: RolloutBatch, live: FrozenStates | None, frozen: FrozenStates | None, head: Head
    ) -> tuple[FrozenStates, ...]:
        """One for each context, from the states (K B, T, D) of all."""
        states = self.frozen.combine(live, frozen, head)
        if states is None:
            return ()
        return tuple(FrozenStates(part, states.head) for part in states.hidden.chunk(batch.contexts))

    def _through(self, tree: TreeBatch, policy: Any, batch: RolloutBatch) -> States:
        """One forward for the student; the teacher, live, takes the question's keys and values from it."""
        length, parts = batch.whole.length, body_and_head(policy)
        hidden, cache = forward_student(parts.body, tree, live_teacher=self.frozen.live)
        student = pad_states(parts, rows_of(hidden, tree.student_nodes, tree.student), length)
        frozen, reference = self._frozen(tree, policy, length)
        live = None
        if self.frozen.live:
            with in_eval_mode(policy):
                live = FrozenStates(pad_states(parts, forward_live_teacher(parts.body, tree, hidden, cache), length))
        return States(student, self._teachers(batch, live, frozen, parts.head), reference)

    @torch.no_grad()
    def _frozen(self, tree: TreeBatch, policy: Any, length: int) -> tuple[FrozenStates | None, FrozenStates | None]:
        def forward(parts: BodyAndHead, prompts: Sequence[str]) -> list[Tensor]:
            both = forward_frozen(parts.body, tree, student="student" in prompts, teacher="teacher" in prompts)
            return [pad_states(parts, states, length) for states in both if states]

        with in_eval_mode(policy):
            return self.frozen.forward(policy, forward)

    def _in_chunks(
        self, policy: Any, batch: RolloutBatch, tree: TreeBatch, budget: int, objective: Objective
    ) -> LossOutput:
        """The same loss and gradient for a tree over the budget. Frozen policies share within a chunk only."""
        length, parts = batch.whole.length, body_and_head(policy)
        outs: list[LossOutput] = []

        def chunk_loss(chunk: Sequence[int], student: list[Tensor], live: list[Tensor]) -> Tensor:
            part = tree_of(batch.whole.rows(chunk), self.sharing)
            frozen, reference = self._frozen(part, policy, length)
            seen = FrozenStates(pad_states(parts, live, length)) if self.frozen.live else None
            teachers = self._teachers(batch, seen, frozen, parts.head)
            states = States(pad_states(parts, student, length), teachers, reference)
            outs.append(self._of(states, parts.head, batch, objective, chunk))
            return outs[-1].loss

        elsewhere = None if self.frozen.live else lambda chunk: []
        loss = two_phase_loss(policy, parts.body, tree, chunk_loss, budget, teacher=elsewhere)
        references = [out.reference for out in outs if out.reference is not None]
        return LossOutput(loss, joined([out.stats for out in outs if out.stats is not None]), joined(references))


def joined(tables: list[RowStats]) -> RowStats | None:
    """Of consecutive rollouts; None of none."""
    if not tables:
        return None
    columns: list[Any] = [None if column[0] is None else torch.cat(column) for column in zip(*tables, strict=True)]
    return RowStats(*columns)
