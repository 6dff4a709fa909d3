"""Credit on real rollouts: what the peer teacher and the answer-only teacher say, by rollout and token by token.

The teacher has the student's weights and sees a privileged context. `measure_credit` takes the statistics of the paper
on failing rollouts, `read_tokens` everything that the credit page shows, `coverage_by_difficulty` how many rollouts
fail and have a peer.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hsd.hindsight.context import ContextTemplate, build_context, tokenize_prompt
from hsd.hindsight.credit import credit, credit_mass, credit_profile, divergence_position
from hsd.hindsight.groups import Group
from hsd.hindsight.peers import choose_peers
from hsd.policy.body_and_head import Split, split_model
from hsd.policy.frozen import in_eval_mode
from hsd.train.update import head_of, read_rollouts
from hsd_kernels import HSDKLOutput, RowStats, fused_hsd_kl

WINDOWS = (2, 4, 8, 16, 32)
DIFFICULTY = (0.2, 0.5, 0.8)  # pass rates between the bins; below 0.2 is the paper's "hard", above 0.5 its "easy"
TOKEN_BUDGET = 16_384
TOP_CHUNK = 256  # tokens whose full logits exist at once: 156 MB in fp32 at V = 151,936

Peers = list[list[int | None]]


@dataclass(frozen=True)
class MeasuredCredit:
    """Failing rollouts that have a peer, with A_{i,t} (B, T) in nats under two privileged contexts."""

    groups: list[Group]
    rollout: list[int]  # index within its group
    peer: list[int]
    with_peer: Tensor
    answer_only: Tensor
    mask: Tensor
    tau: Tensor  # (B,), -1 where the rollout never leaves its peer

    def profile(self, which: str, before: int = 16, after: int = 32) -> tuple[list[int], list[float], list[int]]:
        offsets, mean_abs, count = credit_profile(getattr(self, which), self.mask, self.tau, before, after)
        return offsets.tolist(), mean_abs.tolist(), count.tolist()

    def mass(self, which: str) -> list[float]:
        return credit_mass(getattr(self, which), self.mask, self.tau, WINDOWS).tolist()

    def rollout_abs(self, which: str) -> list[float]:
        """|A| averaged over the tokens of each rollout, nats."""
        a = getattr(self, which).abs()
        return ((a * self.mask).sum(-1) / self.mask.sum(-1)).tolist()

    def mean_abs(self, which: str) -> float:
        """Rollout-averaged |A|, nats."""
        values = self.rollout_abs(which)
        return sum(values) / len(values)


@dataclass(frozen=True)
class Top:
    """The k likeliest tokens at each position: ids (T, k) and probabilities (T, k), falling."""

    ids: Tensor
    probs: Tensor


@dataclass(frozen=True)
class TokenCredit:
    """One rollout of T tokens, read by the student and by two teachers. Natural logarithms, on the CPU.

    ``credit`` and ``kl`` = KL(teacher || student) belong to the teacher that training uses: shown the peer, or, without
    one, the answer alone.
    """

    group: int  # index in the groups that were read
    rollout: int  # index within its group
    peer: int | None
    tau: int | None
    credit: Tensor  # (T,)
    answer_only: Tensor  # (T,) credit of the teacher that sees the answer alone
    kl: Tensor  # (T,)
    student_logps: Tensor  # (T,) of the rollout's tokens
    student_top: Top
    teacher_top: Top


@dataclass(frozen=True)
class CoverageBin:
    """Groups whose question has a pass rate in (low, high]: their rollouts' success, and coverage, as shares of all."""

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


@torch.no_grad()
def measure_credit(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    groups: Sequence[Group],
    template: ContextTemplate,
    *,
    seed: int = 0,
    token_budget: int = TOKEN_BUDGET,
) -> MeasuredCredit | None:
    """Credit of every failing rollout with a successful peer (`draw_peers`), teacher = the same weights.

    None if there is no such rollout. Several rollouts are read at once as long as their tokens, padded, stay within
    ``token_budget``.
    """
    peers = draw_peers(tokenizer, groups, seed)
    found = [
        (group, i, peer)
        for group, drawn in zip(groups, peers, strict=True)
        for i, peer in enumerate(drawn)
        if peer is not None and i in group.failures
    ]
    if not found:
        return None
    split = split_model(model)
    columns: dict[str, list[Tensor]] = {"with_peer": [], "answer_only": [], "mask": []}
    with in_eval_mode(model):
        for start, stop in _within_budget([len(g.rollouts[i].token_ids) for g, i, _ in found], token_budget):
            part = found[start:stop]
            rollouts = [group.rollouts[i].token_ids for group, i, _ in part]
            student, ids, live = _hidden(split, tokenizer, _plain_prompts(tokenizer, part), rollouts)
            for name in ("with_peer", "answer_only"):
                shown = part if name == "with_peer" else [(group, i, None) for group, i, _ in part]
                prompts = _teacher_prompts(tokenizer, shown, template)
                teacher, _, _ = _hidden(split, tokenizer, prompts, rollouts)
                columns[name] += _credit(_compare(split, student, teacher, ids, live))
            columns["mask"] += live.cpu()
    tau = [divergence_position(g.rollouts[i].token_ids, g.rollouts[peer].token_ids) for g, i, peer in found]
    pad = torch.nn.utils.rnn.pad_sequence
    return MeasuredCredit(
        groups=[g for g, _, _ in found],
        rollout=[i for _, i, _ in found],
        peer=[peer for _, _, peer in found],
        **{name: pad(rows, batch_first=True) for name, rows in columns.items()},
        tau=torch.tensor([-1 if t is None else t for t in tau]),
    )


@torch.no_grad()
def read_tokens(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    groups: Sequence[Group],
    peers: Peers,
    template: ContextTemplate,
    *,
    top_k: int = 5,
    token_budget: int = TOKEN_BUDGET,
) -> list[TokenCredit]:
    """Every rollout of ``groups``, successes too, in order, beside its peer in ``peers`` (`draw_peers`).

    Rollouts are batched as in `measure_credit`. The full logits that the likeliest tokens need exist for `TOP_CHUNK`
    tokens at a time.
    """
    if top_k < 1:
        raise ValueError(f"top_k: expected at least 1, got {top_k}")
    split = split_model(model)
    every = [(group, i, peers[g][i]) for g, group in enumerate(groups) for i in range(len(group.rollouts))]
    places = [(g, i) for g, group in enumerate(groups) for i in range(len(group.rollouts))]
    read: list[TokenCredit] = []
    with in_eval_mode(model):
        for start, stop in _within_budget([len(g.rollouts[i].token_ids) for g, i, _ in every], token_budget):
            part = every[start:stop]
            rollouts = [group.rollouts[i].token_ids for group, i, _ in part]
            alone = [(group, i, None) for group, i, _ in part]
            student, ids, live = _hidden(split, tokenizer, _plain_prompts(tokenizer, part), rollouts)
            teacher, _, _ = _hidden(split, tokenizer, _teacher_prompts(tokenizer, part, template), rollouts)
            silent, _, _ = _hidden(split, tokenizer, _teacher_prompts(tokenizer, alone, template), rollouts)
            out = _compare(split, student, teacher, ids, live)
            a, a_silent = _credit(out), _credit(_compare(split, student, silent, ids, live))
            kl, logps = out.kl.cpu(), out.student_logps.cpu()  # type: ignore[union-attr]
            for b, (group, _, peer) in enumerate(part):
                own, n = rollouts[b], len(rollouts[b])
                read.append(
                    TokenCredit(
                        *places[start + b],
                        peer=peer,
                        tau=None if peer is None else divergence_position(own, group.rollouts[peer].token_ids),
                        credit=a[b, :n],
                        answer_only=a_silent[b, :n],
                        kl=kl[b, :n],
                        student_logps=logps[b, :n],
                        student_top=_top(split, student[b, :n], out.student_lse[b, :n], top_k),
                        teacher_top=_top(split, teacher[b, :n], out.teacher_lse[b, :n], top_k),
                    )
                )
    return read


def coverage_by_difficulty(
    first: Sequence[Group], second: Sequence[Group], edges: Sequence[float] = DIFFICULTY
) -> list[CoverageBin]:
    """Coverage, the share of all rollouts that fail and have a successful peer, in bins of the question's pass rate.

    Each question has two independent groups. One says how hard the question is, the other is measured, and then they
    change places. Were one group used for both, coverage would follow from the pass rate: whenever it is not 0, every
    failure has a peer. Within a bin, coverage lies below ``f(success, G)`` of `hsd.hindsight.credit.coverage` as far as
    the bin's questions still differ, because f is concave.

    Returns:
        One entry for each bin that has a group, from hard to easy.

    Raises:
        ValueError: ``first`` and ``second`` hold different questions.
    """
    if [g.prompt for g in first] != [g.prompt for g in second]:
        raise ValueError("second: expected one group for each question of first, in the same order")
    bounds = [-math.inf, *edges, math.inf]
    bins = []
    for low, high in itertools.pairwise(bounds):
        pairs = [*zip(first, second, strict=True), *zip(second, first, strict=True)]
        chosen = [measured for grading, measured in pairs if low < _success_rate(grading) <= high]
        if not chosen:
            continue
        share = [1 - _success_rate(g) if g.successes else 0.0 for g in chosen]
        mean = sum(share) / len(share)
        spread = math.sqrt(sum((s - mean) ** 2 for s in share) / (len(share) - 1)) if len(share) > 1 else math.nan
        bins.append(
            CoverageBin(
                low=max(low, 0.0),
                high=min(high, 1.0),
                groups=len(chosen),
                success=sum(map(_success_rate, chosen)) / len(chosen),
                coverage=mean,
                error=spread / math.sqrt(len(share)),
            )
        )
    return bins


def _success_rate(group: Group) -> float:
    return len(group.successes) / len(group.rollouts)


def _plain_prompts(tokenizer: Any, part: Sequence[tuple[Group, int, int | None]]) -> list[Sequence[int]]:
    return [tokenize_prompt(tokenizer, group.prompt) for group, _, _ in part]


def _teacher_prompts(
    tokenizer: Any, part: Sequence[tuple[Group, int, int | None]], template: ContextTemplate
) -> list[Sequence[int]]:
    return [
        build_context(
            tokenizer, group.prompt, group.answer, None if j is None else group.rollouts[j].token_ids, template
        ).prompt_ids
        for group, _, j in part
    ]


def _hidden(
    split: Split, tokenizer: Any, prompts: Sequence[Sequence[int]], rollouts: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """(states that predict the rollouts' tokens (B, T, D), those tokens (B, T), mask (B, T)), on the model's device."""
    device = split.weight.device
    left, length = max(map(len, prompts)), max(map(len, rollouts))
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    rows, mask = [], []
    for p, o in zip(prompts, rollouts, strict=True):
        rows.append([pad_id] * (left - len(p)) + list(p) + list(o) + [pad_id] * (length - len(o)))
        mask.append([0] * (left - len(p)) + [1] * (len(p) + len(o)) + [0] * (length - len(o)))
    ids, mask_t = torch.tensor(rows, device=device), torch.tensor(mask, device=device)
    return read_rollouts(split, ids, mask_t, length), ids[:, left:], mask_t[:, left:]


def _compare(split: Split, student: Tensor, teacher: Tensor, ids: Tensor, live: Tensor) -> RowStats:
    out = fused_hsd_kl(student, teacher, head_of(split), target_ids=ids, token_weights=live, return_stats=True)
    assert isinstance(out, HSDKLOutput)
    return out.stats


def _credit(out: RowStats) -> Tensor:
    assert out.teacher_logps is not None and out.student_logps is not None
    return credit(out.teacher_logps, out.student_logps).cpu()


def _top(split: Split, hidden: Tensor, lse: Tensor, k: int) -> Top:
    """Of (T, D) states and the log-normalizers (T,) that the fused pass returned for them."""
    ids, probs = [], []
    for h, z in zip(hidden.split(TOP_CHUNK), lse.split(TOP_CHUNK), strict=True):
        logits = split.logits(h)
        best = logits.topk(min(k, logits.shape[-1]))
        ids.append(best.indices.cpu())
        probs.append((best.values - z[:, None]).exp().clamp_max(1.0).cpu())
    return Top(torch.cat(ids), torch.cat(probs))


def _within_budget(lengths: Sequence[int], budget: int) -> Iterator[tuple[int, int]]:
    """Consecutive ranges whose padded size stays within the budget; a rollout above it goes alone."""
    start = 0
    for stop in range(1, len(lengths) + 1):
        if stop == len(lengths) or max(lengths[start : stop + 1]) * (stop + 1 - start) > budget:
            yield start, stop
            start = stop
