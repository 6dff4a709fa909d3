"""Credit on real rollouts under the peer teacher and the answer-only teacher, by rollout and token by token.

The teacher has the student's weights and sees a privileged context. `measure` makes the forward passes, `credit_tables`
the tables behind the paper's statistics, `coverage_by_difficulty` tells how many rollouts fail and have a peer.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hsd.hindsight.context import ContextTemplate, build_context, tokenize_prompt
from hsd.hindsight.credit import around_tau, credit, credit_mass, credit_profile, divergence_position
from hsd.hindsight.groups import Group
from hsd.hindsight.peers import choose_peers
from hsd.padding import padded
from hsd.policy.body_and_head import BodyAndHead, body_and_head
from hsd.policy.forward import Prompts, RolloutInputs
from hsd.policy.frozen import in_eval_mode
from hsd.tasks.task import Policy
from hsd_kernels import HSDKLOutput, RowStats, fused_hsd_kl

WINDOWS = (2, 4, 8, 16, 32)
DIFFICULTY = (0.2, 0.5, 0.8)  # pass rates between the bins; below 0.2 is the paper's "hard", above 0.5 its "easy"
TOKEN_BUDGET = 16_384
TOP_K = 5
TOP_CHUNK = 256  # tokens whose full logits exist at once: 156 MB in fp32 at V = 151,936

Peers = list[list[int | None]]
Place = tuple[int, int]  # index of a group, and of a rollout in it


@dataclass(frozen=True)
class Top:
    """The `TOP_K` likeliest tokens at each position: ids (T, k) and probabilities (T, k), falling."""

    ids: Tensor
    probs: Tensor


@dataclass(frozen=True)
class TokenCredit:
    """One rollout of T tokens under the student and two teachers. Natural logarithms, on the CPU.

    ``credit`` and ``kl`` = KL(teacher || student) belong to the teacher that training uses: shown the peer, or, without
    one, the answer alone.
    """

    group: int  # index in the groups that were measured
    rollout: int  # index within its group
    peer: int | None
    tau: int | None
    credit: Tensor  # (T,)
    answer_only: Tensor  # (T,) credit of the teacher that sees the answer alone
    kl: Tensor  # (T,)
    student_logps: Tensor  # (T,) of the rollout's tokens
    student_top: Top | None = None  # where it is shown
    teacher_top: Top | None = None


@dataclass(frozen=True)
class CreditTable:
    """A_{i,t} of one teacher on B failing rollouts, in nats."""

    credit_BT: Tensor
    mask_BT: Tensor
    tau_B: Tensor  # -1 where the rollout never leaves its peer
    group_B: Tensor  # index of the rollout's group

    def profile(self, before: int = 16, after: int = 32) -> tuple[list[int], list[float], list[int]]:
        """(offsets from tau, mean |A|, number of rollouts) of `hsd.hindsight.credit.credit_profile`."""
        offsets, mean_abs, count = credit_profile(self.credit_BT, self.mask_BT, self.tau_B, before, after)
        return offsets.tolist(), mean_abs.tolist(), count.tolist()

    def profile_error(self, before: int = 16, after: int = 32) -> list[float]:
        """Standard error of each mean of `profile`, over the groups: rollouts of a question have peers in common.

        NaN where fewer than two groups have a token. The formula is that of a cluster-robust standard error:
        ``sqrt(G / (G - 1) * sum_g (sum_i in g (a_i - mean))^2) / N``.
        """
        _, abs_BO, has_token_BO = around_tau(self.credit_BT, self.mask_BT, self.tau_B, before, after)
        count_O = has_token_BO.sum(0)
        residual_BO = (abs_BO - abs_BO.sum(0) / count_O).where(has_token_BO, 0.0)
        of_group = self.group_B.unique(return_inverse=True)[1]
        sums = torch.zeros(int(of_group.max()) + 1, residual_BO.shape[1], dtype=residual_BO.dtype)
        groups_O = (sums.index_add(0, of_group, has_token_BO.to(sums.dtype)) > 0).sum(0)
        squares_O = sums.index_add(0, of_group, residual_BO).square().sum(0)
        error_O = (squares_O * groups_O / (groups_O - 1)).sqrt() / count_O
        return error_O.where(groups_O > 1, torch.nan).tolist()

    def mass(self) -> list[float]:
        """Share of |A| within each of `WINDOWS` of tau."""
        return credit_mass(self.credit_BT, self.mask_BT, self.tau_B, WINDOWS).tolist()

    def rollout_abs(self) -> list[float]:
        """|A| averaged over the tokens of each rollout."""
        return ((self.credit_BT.abs() * self.mask_BT).sum(-1) / self.mask_BT.sum(-1)).tolist()

    def mean_abs(self) -> float:
        """Rollout-averaged |A|."""
        values = self.rollout_abs()
        return sum(values) / len(values)


@dataclass(frozen=True)
class CoverageBin:
    """Groups whose question has a pass rate in (low, high]: their rollouts' success, and coverage, as shares."""

    low: float
    high: float
    groups: int
    success: float
    coverage: float
    error: float  # standard error of `coverage` over the groups; NaN with a single group


def draw_peers(tokenizer: Any, groups: Sequence[Group], seed: int) -> Peers:
    """A peer for every rollout, drawn uniformly. None without one, or where the peer is only end tokens and white
    space: that is no demonstration, its context would be the answer alone."""
    rng = random.Random(seed)

    def says_something(ids: Sequence[int]) -> bool:
        return bool(tokenizer.decode(list(ids), skip_special_tokens=True).strip())

    return [
        [None if j is None or not says_something(g.rollouts[j].token_ids) else j for j in choose_peers(g, rng=rng)]
        for g in groups
    ]


def failing_with_peer(groups: Sequence[Group], peers: Peers) -> list[Place]:
    places = [(g, i) for g, drawn in enumerate(peers) for i, peer in enumerate(drawn) if peer is not None]
    return [(g, i) for g, i in places if i in groups[g].failures]


@torch.no_grad()
def measure(
    policy: Policy,
    groups: Sequence[Group],
    peers: Peers,
    template: ContextTemplate,
    places: Sequence[Place],
    *,
    shown: Collection[int] = (),
) -> list[TokenCredit]:
    """The rollouts at ``places``, in order, each beside its peer (`draw_peers`); teacher = the same weights.

    Three forward passes a rollout: the prompt alone, the context of its peer, the context of the answer alone. Several
    rollouts share a batch as long as what one forward pass reads, prompts included and padded, stays within
    `TOKEN_BUDGET`. The `TOP_K` likeliest tokens are kept for the groups in ``shown``; their full logits exist for
    `TOP_CHUNK` tokens at a time.
    """
    model, tokenizer = policy
    parts = body_and_head(model)
    pad_id = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)  # masked
    measured: list[TokenCredit] = []
    all_rollouts = [groups[g].rollouts[i].token_ids for g, i in places]
    all_prompts = {
        "student": [tokenize_prompt(tokenizer, groups[g].prompt) for g, _ in places],
        "with_peer": [_teacher_prompt(tokenizer, groups[g], peers[g][i], template) for g, i in places],
        "answer_only": [_teacher_prompt(tokenizer, groups[g], None, template) for g, _ in places],
    }
    longest = [max(map(len, three)) for three in zip(*all_prompts.values(), strict=True)]
    with in_eval_mode(model):
        for start, stop in _within_budget(longest, [len(ids) for ids in all_rollouts]):
            part, rollouts = places[start:stop], all_rollouts[start:stop]
            prompts = {who: asked[start:stop] for who, asked in all_prompts.items()}
            inputs = _inputs(prompts, rollouts, pad_id, parts.linear.weight.device)
            student_BTD = inputs.forward(parts, "student")
            teacher_BTD = inputs.forward(parts, "with_peer")
            out = _compare(parts, student_BTD, teacher_BTD, inputs)
            alone = _compare(parts, student_BTD, inputs.forward(parts, "answer_only"), inputs)
            a_BT, alone_BT = _credit(out), _credit(alone)
            kl_BT, logps_BT = out.kl.cpu(), out.student_logps.cpu()  # type: ignore[union-attr]
            for b, (g, i) in enumerate(part):
                n, peer = len(rollouts[b]), peers[g][i]
                tau = None if peer is None else divergence_position(rollouts[b], groups[g].rollouts[peer].token_ids)
                here = TokenCredit(g, i, peer, tau, a_BT[b, :n], alone_BT[b, :n], kl_BT[b, :n], logps_BT[b, :n])
                if g in shown:
                    student_top = _top(parts, student_BTD[b, :n], out.student_lse[b, :n])
                    teacher_top = _top(parts, teacher_BTD[b, :n], out.teacher_lse[b, :n])
                    here = replace(here, student_top=student_top, teacher_top=teacher_top)
                measured.append(here)
    return measured


def credit_tables(measured: Sequence[TokenCredit]) -> dict[str, CreditTable]:
    """The credit of each teacher on the rollouts of ``measured``, at least one."""
    pad = partial(pad_sequence, batch_first=True)
    mask_BT = pad([torch.ones_like(r.credit, dtype=torch.long) for r in measured])
    tau_B = torch.tensor([-1 if r.tau is None else r.tau for r in measured])
    group_B = torch.tensor([r.group for r in measured])
    credits = {"with_peer": [r.credit for r in measured], "answer_only": [r.answer_only for r in measured]}
    return {name: CreditTable(pad(rows), mask_BT, tau_B, group_B) for name, rows in credits.items()}


def coverage_by_difficulty(first: Sequence[Group], second: Sequence[Group]) -> list[CoverageBin]:
    """Coverage, the share of rollouts that fail and have a successful peer, in bins of the question's pass rate. Shares
    are of the rollouts with a verdict.

    Each question has two independent groups. One says how hard the question is, the other is measured, and then they
    change places. Were one group used for both, coverage would follow from the pass rate: whenever it is not 0, every
    failure has a peer. Within a bin, coverage lies below ``f(success, G)`` of `hsd.hindsight.credit.coverage` as far as
    the bin's questions still differ, because f is concave. A question is left out where a group has no verdict.

    Returns:
        One entry for each bin that has a group, from hard to easy.

    Raises:
        ValueError: ``first`` and ``second`` hold different questions.
    """
    if [g.prompt for g in first] != [g.prompt for g in second]:
        raise ValueError("second: expected one group for each question of first, in the same order")
    bounds = [-math.inf, *DIFFICULTY, math.inf]
    both = [pair for pair in zip(first, second, strict=True) if all(g.successes or g.failures for g in pair)]
    pairs = both + [pair[::-1] for pair in both]
    bins = []
    for low, high in itertools.pairwise(bounds):
        chosen = [measured for grading, measured in pairs if low < grading.success_rate <= high]
        if not chosen:
            continue
        share = [1 - g.success_rate if g.successes else 0.0 for g in chosen]
        mean = sum(share) / len(share)
        spread = math.sqrt(sum((s - mean) ** 2 for s in share) / (len(share) - 1)) if len(share) > 1 else math.nan
        bins.append(
            CoverageBin(
                low=max(low, 0.0),
                high=min(high, 1.0),
                groups=len(chosen),
                success=sum(g.success_rate for g in chosen) / len(chosen),
                coverage=mean,
                error=spread / math.sqrt(len(share)),
            )
        )
    return bins


def _teacher_prompt(tokenizer: Any, group: Group, peer: int | None, template: ContextTemplate) -> Sequence[int]:
    shown = None if peer is None else group.rollouts[peer].token_ids
    return build_context(tokenizer, group.prompt, group.answer, shown, template).prompt_ids


def _inputs(
    prompts: Mapping[str, Sequence[Sequence[int]]],
    rollouts: Sequence[Sequence[int]],
    pad_id: int,
    device: torch.device,
) -> RolloutInputs:
    """The rollouts behind each of the prompts, on the model's device."""
    ids_BT, mask_BT = padded(rollouts, pad_id)
    behind = {who: [t.to(device) for t in padded(ids, pad_id, "left")] for who, ids in prompts.items()}
    return RolloutInputs({who: Prompts(*t) for who, t in behind.items()}, ids_BT.to(device), mask_BT.to(device))


def _compare(parts: BodyAndHead, student_BTD: Tensor, teacher_BTD: Tensor, inputs: RolloutInputs) -> RowStats:
    out = fused_hsd_kl(
        student_BTD,
        teacher_BTD,
        parts.head,
        target_ids=inputs.completion_ids,
        token_weights=inputs.completion_mask,
        return_stats=True,
    )
    assert isinstance(out, HSDKLOutput)
    return out.stats


def _credit(out: RowStats) -> Tensor:
    assert out.teacher_logps is not None and out.student_logps is not None
    return credit(out.teacher_logps, out.student_logps).cpu()


def _top(parts: BodyAndHead, hidden: Tensor, lse: Tensor) -> Top:
    """Of (T, D) states and the log-normalizers (T,) that the fused pass returned for them."""
    ids, probs = [], []
    for h, z in zip(hidden.split(TOP_CHUNK), lse.split(TOP_CHUNK), strict=True):
        logits = parts.logits(h)
        best = logits.topk(min(TOP_K, logits.shape[-1]))
        ids.append(best.indices.cpu())
        probs.append((best.values - z[:, None]).exp().clamp_max(1.0).cpu())
    return Top(torch.cat(ids), torch.cat(probs))


def _within_budget(prompts: Sequence[int], rollouts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Consecutive ranges, of these lengths, whose padded size stays within `TOKEN_BUDGET`; what is above it goes
    alone. Prompts and rollouts are padded apart."""
    start = 0
    for stop in range(1, len(rollouts) + 1):
        some = slice(start, stop + 1)
        if stop == len(rollouts) or (max(prompts[some]) + max(rollouts[some])) * (stop + 1 - start) > TOKEN_BUDGET:
            yield start, stop
            start = stop
