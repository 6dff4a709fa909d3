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
from hsd.policy.forward import FrozenStates, RolloutInputs
from hsd.policy.frozen import in_eval_mode
from hsd.policy.tree.batch import pad_states, pays, tree_of
from hsd.policy.tree.forward import TreeBatch, forward_frozen, forward_live_teacher, forward_student, rows_of
from hsd.policy.tree.two_phase import two_phase_loss
from hsd.train.batch import RolloutBatch
from hsd.train.diagnostics import overlap
from hsd.train.teachers import FrozenPolicies
from hsd.train.update import LossOutput, Objective, Targets, method_loss, zero_of
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


@dataclass(frozen=True)
class Passes:
    """The sequences of a micro-batch that go through the models at a step: those that a term reads."""

    inputs: RolloutInputs
    which: range  # their numbers in `RolloutBatch.whole`
    contexts: int  # of the teacher; 0 where nothing reads it
    reference: bool


def _loss(states: States, head: Head, targets: Targets, objective: Objective) -> LossOutput:
    teachers = states.teachers if objective.reads_teacher else ()
    return method_loss(states.student, head, teachers, states.reference, targets, objective)


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
        if objective.over_rows() is None:
            batch = replace(batch, extra=None)
        passes = self.passes(batch, objective)
        if not passes.which:
            # Of each weight, whose gradient DDP waits for.
            return LossOutput(zero_of(p for p in policy.parameters() if p.requires_grad), None)
        tree, budget = self.tree(passes), self.token_budget
        if tree is not None and budget is not None and len(tree.trie) > budget and torch.is_grad_enabled():
            return self._in_chunks(policy, batch, passes, tree, budget, objective)
        states = self._one_by_one(policy, passes) if tree is None else self._through(tree, policy, passes)
        head = body_and_head(policy).head
        out = self._of(states, head, batch, objective, passes.which)
        if not (self.diagnostics and out.stats is not None):
            return out
        size, length = batch.loss_mask.shape
        mine = states.at(range(size), length)
        temperature = objective.divergence.temperature
        return replace(out, overlap=overlap(mine.student, mine.teachers[0], head, batch.divergence_mask, temperature))

    def passes(self, batch: RolloutBatch, objective: Objective) -> Passes:
        """What the objective reads of a batch at its step."""
        over_rows = None if batch.extra is None else objective.over_rows()
        taught = objective.reads_teacher or (over_rows is not None and over_rows.reads_teacher)
        inputs, first = batch.whole, 0 if objective.reads_rollouts else len(batch.loss_mask)
        if not taught:
            inputs = replace(inputs, prompts={"student": inputs.prompts["student"]})
        which = range(first, len(inputs.completion_ids))
        inputs = inputs.rows(which) if first else inputs
        contexts = batch.contexts if "teacher" in inputs.prompts else 0
        return Passes(inputs, which, contexts, objective.reference_coef != 0.0)

    def _of(
        self, states: States, head: Head, batch: RolloutBatch, objective: Objective, which: Sequence[int]
    ) -> LossOutput:
        """The loss of some rollouts and extra rows, by their numbers in ``batch.whole``, whose states these are."""
        targets, over_rows = batch.targets(self.loss_mean, self.policy_mean), objective.over_rows()
        size = len(targets.ids)
        mine = [n for n in which if n < size]
        if len(mine) < size or batch.extra is not None:
            states_of_mine = states.at([k for k, n in enumerate(which) if n < size], targets.ids.shape[1])
            targets = targets.rows(torch.tensor(mine, dtype=torch.long, device=targets.ids.device))
        else:
            states_of_mine = states
        parts = [LossOutput(zero_of([states.student]), None)]
        if mine:
            parts = [_loss(states_of_mine, head, targets, objective)]
        at = [k for k, n in enumerate(which) if n >= size]
        if at and over_rows is not None:
            rows = batch.targets_of_rows()
            some = torch.tensor([which[k] - size for k in at], device=rows.ids.device)
            parts.append(_loss(states.at(at, rows.ids.shape[1]), head, rows.rows(some), over_rows))
        return parts[0] if len(parts) == 1 else replace(parts[0], loss=parts[0].loss + parts[1].loss)

    @torch.no_grad()
    def stats(self, policy: Any, batch: RolloutBatch, objective: Objective) -> RowStats:
        """Of student and teacher, per token (B, T), nothing minimised: what a batch is scored by."""
        # No term, no extra row.
        measured = replace(objective, terms=(), reference_coef=0.0, importance_cap=None, measure=True)
        stats = replace(self, token_budget=None, diagnostics=False)(policy, batch, measured).stats
        assert stats is not None
        return stats

    def tree(self, passes: Passes) -> TreeBatch | None:
        """None where every sequence goes by itself."""
        if self.sharing == "none":
            return None
        inputs, live = passes.inputs, self._is_live(passes)
        tree = tree_of(inputs, self.sharing)
        wanted = self.always or pays(tree, inputs, live)
        wanted = wanted and len(tree.trie) > 0  # a batch whose rollouts are all masked has no nodes
        held = self.frozen.held
        if held.gathers:  # the same forward passes in the same order on every rank, or a gather mixes their weights
            wanted = wanted and not (live and not len(tree.teacher_only))
            wanted = held.agree(wanted, inputs.completion_ids.device)
        return tree if wanted else None

    def _is_live(self, passes: Passes) -> bool:
        return self.frozen.live and passes.contexts > 0

    def _one_by_one(self, policy: Any, passes: Passes) -> States:
        def forward(parts: BodyAndHead, prompts: Sequence[str]) -> list[Tensor]:
            return [passes.inputs.forward(parts, who) for who in prompts]

        parts, read = body_and_head(policy), {"teacher": passes.contexts > 0, "reference": passes.reference}
        with torch.no_grad(), in_eval_mode(policy):  # no dropout noise in the target
            frozen, reference = self.frozen.forward(policy, forward, **read)
            live = FrozenStates(forward(parts, ["teacher"])[0]) if self._is_live(passes) else None
        student = forward(parts, ["student"])[0]
        return States(student, self._teachers(passes, live, frozen, parts.head), reference)

    def _teachers(
        self, passes: Passes, live: FrozenStates | None, frozen: FrozenStates | None, head: Head
    ) -> tuple[FrozenStates, ...]:
        """One for each context, from the states (K B, T, D) of all."""
        states = self.frozen.combine(live, frozen, head)
        if states is None:
            return ()
        return tuple(FrozenStates(part, states.head) for part in states.hidden.chunk(passes.contexts))

    def _through(self, tree: TreeBatch, policy: Any, passes: Passes) -> States:
        """One forward for the student; the teacher, live, takes the question's keys and values from it."""
        length, parts, is_live = passes.inputs.length, body_and_head(policy), self._is_live(passes)
        hidden, cache = forward_student(parts.body, tree, live_teacher=is_live)
        student = pad_states(parts, rows_of(hidden, tree.student_nodes, tree.student), length)
        frozen, reference = self._frozen(tree, policy, passes)
        live = None
        if is_live:
            with in_eval_mode(policy):
                live = FrozenStates(pad_states(parts, forward_live_teacher(parts.body, tree, hidden, cache), length))
        return States(student, self._teachers(passes, live, frozen, parts.head), reference)

    @torch.no_grad()
    def _frozen(self, tree: TreeBatch, policy: Any, passes: Passes) -> tuple[FrozenStates | None, FrozenStates | None]:
        def forward(parts: BodyAndHead, prompts: Sequence[str]) -> list[Tensor]:
            both = forward_frozen(parts.body, tree, student="student" in prompts, teacher="teacher" in prompts)
            return [pad_states(parts, states, passes.inputs.length) for states in both if states]

        with in_eval_mode(policy):
            return self.frozen.forward(policy, forward, teacher=passes.contexts > 0, reference=passes.reference)

    def _in_chunks(
        self, policy: Any, batch: RolloutBatch, passes: Passes, tree: TreeBatch, budget: int, objective: Objective
    ) -> LossOutput:
        """The same loss and gradient for a tree over the budget. Frozen policies share within a chunk only."""
        parts, is_live = body_and_head(policy), self._is_live(passes)
        outs: list[LossOutput] = []

        def chunk_loss(chunk: Sequence[int], student: list[Tensor], live: list[Tensor]) -> Tensor:
            part = tree_of(passes.inputs.rows(chunk), self.sharing)
            frozen, reference = self._frozen(part, policy, passes)
            seen = FrozenStates(pad_states(parts, live, passes.inputs.length)) if is_live else None
            teachers = self._teachers(passes, seen, frozen, parts.head)
            states = States(pad_states(parts, student, passes.inputs.length), teachers, reference)
            outs.append(self._of(states, parts.head, batch, objective, [passes.which[i] for i in chunk]))
            return outs[-1].loss

        elsewhere = None if is_live else lambda chunk: []
        loss = two_phase_loss(policy, parts.body, tree, chunk_loss, budget, teacher=elsewhere)
        references = [out.reference for out in outs if out.reference is not None]
        return LossOutput(loss, joined([out.stats for out in outs if out.stats is not None]), joined(references))


def joined(tables: list[RowStats]) -> RowStats | None:
    """Of consecutive rollouts; None of none."""
    if not tables:
        return None
    columns: list[Any] = [None if column[0] is None else torch.cat(column) for column in zip(*tables, strict=True)]
    return RowStats(*columns)
