"""The tensors added to TRL's batch dictionary, which TRL splits and shuffles, and the typed batch made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from hsd.hindsight.groups import Member
from hsd.hindsight.teacher_prompts import TeacherPrompt
from hsd.methods.method import Generation
from hsd.methods.term import Stats, scheduled
from hsd.padding import padded
from hsd.policy.forward import Prompts, RolloutInputs
from hsd.train.config import HSDConfig
from hsd.train.update import Targets, rollout_weights
from hsd_kernels import RowStats

COLUMN = "column/"  # before the names of a method's own columns in TRL's dictionary
ROWS = "rows/"  # before the names of `PackedRows`


@dataclass(frozen=True)
class TeacherBatch:
    """What is added to TRL's batch of B rollouts: their verdicts, and the tensors of their teachers' prompts."""

    success: Tensor  # (B,) bool
    has_context: Tensor | None = None  # (B,) bool; a rollout without a teacher's context is left out of the divergence
    divergence_position: Tensor | None = None  # (B,), -1 where the rollout has no peer or never leaves it
    tokens_per_micro_batch: Tensor | None = None  # (), what a micro-batch of one process holds on average
    teacher_prompt_ids: Tensor | None = None  # (B, P), or (B, K, P) for K contexts, padded on the left
    teacher_prompt_mask: Tensor | None = None  # as the ids
    context_weights: Tensor | None = None  # (B, K) for K > 1, 0 or 1
    policy_tokens_per_micro_batch: Tensor | None = None  # (), also of rollouts without a context
    reward: Tensor | None = None  # (B,)
    group_success: Tensor | None = None  # (B,), the success rate of its group
    scored: Tensor | None = None  # (B,) bool, whether it has a verdict
    group_size: Tensor | None = None  # (B,), an evaluation's may be another than the training's

    def pack(self) -> dict[str, Tensor]:
        """The entries of TRL's dictionary, which `unpack` finds again."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class PackedRows:
    """Up to R extra rows of each of B rollouts, as TRL's dictionary holds them: those that are not there have no
    tokens."""

    ids: Tensor  # (B, R, S)
    mask: Tensor  # (B, R, S)
    weight: Tensor  # (B, R)
    rows_per_micro_batch: Tensor  # (), what one of one process holds on average
    teacher_ids: Tensor | None = None  # (B, R, K, P), padded on the left
    teacher_mask: Tensor | None = None

    def pack(self) -> dict[str, Tensor]:
        return {ROWS + name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class ExtraRows:
    """M extra rows, behind the rollouts that they belong to."""

    whole: RolloutInputs  # of rollouts and rows, (B + M, max(T, S))
    ids: Tensor  # (M, S)
    mask: Tensor  # (M, S)
    weights: Tensor  # (M, S), of each token's loss in the mean over all rows of the step
    owner: Tensor  # (M,), the number of its rollout
    slot: Tensor  # (M,)


@dataclass(frozen=True)
class RolloutBatch:
    """B rollouts of T tokens at most, with their teachers' prompts, as the loss takes them."""

    inputs: RolloutInputs
    loss_mask: Tensor  # (B, T), the completion mask without the tokens of tools
    teacher: TeacherBatch
    advantages: Tensor  # (B,)
    old_logps: Tensor | None  # (B, T)
    own: Mapping[str, Tensor] = field(default_factory=dict)  # a method's columns: (B,), (B, T) or ()
    skip_tokens: int = 0  # of each rollout's first, which have no divergence
    extra: ExtraRows | None = None

    @property
    def whole(self) -> RolloutInputs:
        """What goes through the models: the rollouts, and behind them the extra rows."""
        return self.inputs if self.extra is None else self.extra.whole

    @property
    def contexts(self) -> int:
        """K."""
        return 1 if self.teacher.context_weights is None else self.teacher.context_weights.shape[1]

    @property
    def divergence_mask(self) -> Tensor:
        """(B, T), the loss mask of the rollouts whose teacher has a context, without the tokens that are skipped."""
        shown = self.teacher.has_context
        mask = self.loss_mask if shown is None else self.loss_mask * shown.unsqueeze(-1)
        return mask * (self.position >= self.skip_tokens) if self.skip_tokens else mask

    @property
    def position(self) -> Tensor:
        """(1, T): 0, 1, ..."""
        return torch.arange(self.loss_mask.shape[1], device=self.loss_mask.device).unsqueeze(0)

    def targets(self, loss_mean: str, policy_mean: str = "rollout") -> Targets:
        """``loss_mean`` and ``policy_mean`` as in `hsd.HSDConfig`."""
        weights = mean_weights(self.divergence_mask, loss_mean, self.teacher.tokens_per_micro_batch)
        policy_weights = mean_weights(self.loss_mask, policy_mean, self.teacher.policy_tokens_per_micro_batch)
        return Targets(
            self.inputs.completion_ids,
            weights,
            policy_weights,
            self.advantages,
            self.old_logps,
            self.columns,
            self.teacher.context_weights,
        )

    def targets_of_rows(self) -> Targets:
        """Of the extra rows, whose columns are their rollouts'."""
        x = self.extra
        assert x is not None
        of_owner = {n: t[x.owner] if t.ndim else t for n, t in self.columns.items() if t.ndim < 2 or t.shape[1] == 1}
        position = torch.arange(x.ids.shape[1], device=x.ids.device).expand(x.ids.shape)
        own = {"length": x.mask.sum(-1, keepdim=True), "slot": x.slot.unsqueeze(-1), "mask": x.mask}
        return Targets(x.ids, x.weights, x.weights, columns=of_owner | own | {"position": position})

    @property
    def columns(self) -> dict[str, Tensor]:
        """Of `hsd.methods.term.Stats`."""
        t = self.teacher
        found = {"advantages": self.advantages.float(), "success": t.success, "length": self.loss_mask.sum(-1)}
        given = {"has_context": t.has_context, "tau": t.divergence_position, "reward": t.reward}
        given |= {"group_success": t.group_success, "group_size": t.group_size, "scored": t.scored}
        found |= {name: value for name, value in given.items() if value is not None} | dict(self.own)
        if t.context_weights is not None:
            found |= {f"has_context_{k}": column for k, column in enumerate(t.context_weights.unbind(1))}
        found |= {"position": self.position.expand(self.loss_mask.shape), "mask": self.loss_mask}
        return {name: value.unsqueeze(-1) if value.ndim == 1 else value for name, value in found.items()}


def mean_weights(mask: Tensor, mean: str, count: Tensor | None) -> Tensor:
    """(B, T) that sum a token's losses to a mean: over each "rollout" and then over rollouts, over the ``count`` tokens
    of a micro-batch ("token"), or over B times the tokens that fit ("max_length", Dr. GRPO)."""
    if mean == "rollout":
        return rollout_weights(mask)
    assert count is not None
    return mask / count


def collate(
    prompts: Sequence[Sequence[TeacherPrompt]], tokens_per_micro_batch: Tensor, pad_id: int, facts: TeacherBatch
) -> TeacherBatch:
    """``facts`` with the tensors of K teacher prompts a rollout, on its device."""
    device, several = facts.success.device, len(prompts[0]) > 1
    ids, mask = (x.to(device) for x in padded([p.context.prompt_ids for row in prompts for p in row], pad_id, "left"))
    shown = has_contexts(prompts).to(device)
    if several:
        ids, mask = (x.reshape(*shown.shape, -1) for x in (ids, mask))
    return replace(
        facts,
        has_context=shown.any(-1),
        divergence_position=torch.tensor([-1 if row[0].tau is None else row[0].tau for row in prompts], device=device),
        tokens_per_micro_batch=tokens_per_micro_batch,
        teacher_prompt_ids=ids,
        teacher_prompt_mask=mask,
        context_weights=shown.float() if several else None,
    )


def has_contexts(prompts: Sequence[Sequence[TeacherPrompt]]) -> Tensor:
    """(B, K) bool."""
    return torch.tensor([[p.context.kind != "nothing" for p in row] for row in prompts])


def facts_of(
    trl: Mapping[str, Any],
    mine: Sequence[Member],
    success: Tensor,
    prompts: Sequence[Sequence[TeacherPrompt]] | None,
    args: HSDConfig,
    pad_id: int,
    mean_over_ranks: Callable[[Tensor], Tensor],
    steps: int,
) -> TeacherBatch:
    """What the loss takes beside TRL's entries: verdicts, the teacher's prompts, and what a micro-batch of one process
    holds on average, by which the mean over all tokens of a step divides.

    Args:
        mine: This rank's rollouts, the rows of ``trl``.
        prompts: Those of their teacher; None without one.
        steps: Micro-batches that this generation is split into.
    """
    mask = student_inputs(trl)[1]
    if args.mean_of_policy == "max_length":
        assert args.max_completion_length is not None
        policy_tokens = torch.tensor(float(len(mask) * args.max_completion_length), device=mask.device)
    else:
        policy_tokens = mean_over_ranks(mask.sum())
    facts = TeacherBatch(
        success,
        policy_tokens_per_micro_batch=policy_tokens.clamp_min(1.0) / steps,
        reward=torch.tensor([m.rollout.reward for m in mine], device=mask.device),
        group_success=torch.tensor([m.group.success_rate for m in mine], device=mask.device),
        scored=torch.tensor([m.rollout.scored for m in mine], device=mask.device),
        group_size=torch.tensor([len(m.group.rollouts) for m in mine], device=mask.device),
    )
    if prompts is None:
        return facts
    shown = has_contexts(prompts).any(-1).to(mask.device)
    tokens = mean_over_ranks((mask[:, args.skip_tokens :].sum(-1) * shown).sum())
    return collate(prompts, tokens.clamp_min(1.0) / steps, pad_id, facts)


def own_columns(
    trl: Mapping[str, Any],
    rows: RowStats | None,
    args: HSDConfig,
    step: int,
    state: Any,
    gather: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """What the method's `on_batch` makes of a whole generation and of its state: entries of TRL's dictionary."""
    assert args.method_spec.on_batch is not None
    mix = scheduled(args.advantage_mix, step)
    stats = Stats(rows, unpack(trl, args.skip_tokens).columns, args.settings, step, mix)
    found = dict(args.method_spec.on_batch(Generation(stats, gather), state))
    own = {}
    if "advantages" in found:
        own["advantages"] = found.pop("advantages").to(trl["advantages"].dtype)
    return own | {COLUMN + name: value for name, value in found.items()}


def student_inputs(trl: Mapping[str, Any]) -> tuple[RolloutInputs, Tensor]:
    """The rollouts of TRL's batch behind the student's prompts, and their loss mask (B, T)."""
    prompts = {"student": Prompts(trl["prompt_ids"], trl["prompt_mask"])}
    mask = trl["completion_mask"]
    loss_mask = mask * trl["tool_mask"] if "tool_mask" in trl else mask
    return RolloutInputs(prompts, trl["completion_ids"], mask), loss_mask


def unpack(trl: Mapping[str, Any], skip_tokens: int = 0) -> RolloutBatch:
    """TRL's batch, or a part of it, with the entries of `TeacherBatch.pack`."""
    teacher = TeacherBatch(**{f.name: trl.get(f.name) for f in fields(TeacherBatch)})  # type: ignore[arg-type]
    inputs, loss_mask = student_inputs(trl)
    ids, prompt_mask = teacher.teacher_prompt_ids, teacher.teacher_prompt_mask
    if ids is not None and prompt_mask is not None:
        both = [x.transpose(0, 1).flatten(0, 1) if x.ndim == 3 else x for x in (ids, prompt_mask)]
        inputs = replace(inputs, prompts={**inputs.prompts, "teacher": Prompts(*both)})
    own = {name.removeprefix(COLUMN): value for name, value in trl.items() if name.startswith(COLUMN)}
    old = trl.get("old_per_token_logps")
    packed = {name.removeprefix(ROWS): value for name, value in trl.items() if name.startswith(ROWS)}
    extra = _extra(inputs, PackedRows(**packed)) if packed else None
    return RolloutBatch(inputs, loss_mask, teacher, trl["advantages"], old, own, skip_tokens, extra)


def _extra(inputs: RolloutInputs, p: PackedRows) -> ExtraRows | None:
    owner, slot = p.mask.any(-1).nonzero(as_tuple=True)
    if not len(owner):
        return None
    ids, mask = p.ids[owner, slot], p.mask[owner, slot]
    weights = p.weight[owner, slot].unsqueeze(-1) * mask / mask.sum(-1, keepdim=True) / p.rows_per_micro_batch
    student = inputs.prompts["student"]
    prompts = {"student": Prompts(*(torch.cat([x, x[owner]]) for x in (student.ids, student.mask)))}
    if p.teacher_ids is not None and p.teacher_mask is not None:
        t, size = inputs.prompts["teacher"], len(inputs.completion_ids)
        of_rows = [x[owner, slot].transpose(0, 1) for x in (p.teacher_ids, p.teacher_mask)]  # (K, M, P)
        of_rollouts = [x.reshape(-1, size, x.shape[-1]) for x in (t.ids, t.mask)]  # (K, B, P)
        both = [_beside(a, b, left=True).flatten(0, 1) for a, b in zip(of_rollouts, of_rows, strict=True)]
        prompts["teacher"] = Prompts(*both)
    completion = [_beside(a, b) for a, b in ((inputs.completion_ids, ids), (inputs.completion_mask, mask))]
    return ExtraRows(RolloutInputs(prompts, *completion), ids, mask, weights, owner, slot)


def _beside(a: Tensor, b: Tensor, *, left: bool = False) -> Tensor:
    """(.., A, L) and (.., B, L') -> (.., A + B, max(L, L')), padded with 0, which is masked."""
    longest = max(a.shape[-1], b.shape[-1])
    wide = [pad(x, (longest - x.shape[-1], 0) if left else (0, longest - x.shape[-1])) for x in (a, b.to(a.dtype))]
    return torch.cat(wide, -2)


def shuffle_groups(trl: Mapping[str, Any], size: int) -> dict[str, Any]:
    """TRL's batch in which whole groups of ``size`` rows change places. Rows that are not whole groups (a rank's share)
    stay in order.

    The groups' order is that of their first rows in TRL's shuffle of all rows: what is sampled next is the same with
    and without the tree.
    """
    n = len(trl["completion_ids"])
    shuffled = torch.randperm(n)
    order = torch.arange(n)
    if n % size == 0:
        order = order.reshape(-1, size)[list(dict.fromkeys((shuffled // size).tolist()))].flatten()
    return some_rows(trl, order)


def some_rows(trl: Mapping[str, Any], index: Tensor) -> dict[str, Any]:
    """Some rows of TRL's batch, in the order of ``index``."""

    def some(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[index.to(value.device)] if value.ndim else value
        return [value[i] for i in index.tolist()] if isinstance(value, list) else value

    return {key: some(value) for key, value in trl.items()}
