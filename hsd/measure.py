"""Credit on real rollouts: what the peer teacher and the answer-only teacher say about the same failures."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hsd.body import split_model
from hsd.context import ContextTemplate, build_context, tokenize_prompt
from hsd.credit import credit, credit_mass, credit_profile, divergence_position
from hsd.groups import Group
from hsd.loss import read_rollouts
from hsd.peers import choose_peers
from hsd_kernels import HSDKLOutput, fused_hsd_kl

WINDOWS = (2, 4, 8, 16, 32)


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

    def mean_abs(self, which: str) -> float:
        """Rollout-averaged |A|, nats."""
        a = getattr(self, which).abs()
        return ((a * self.mask).sum(-1) / self.mask.sum(-1)).mean().item()


@torch.no_grad()
def measure_credit(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    groups: Sequence[Group],
    template: ContextTemplate,
    *,
    seed: int = 0,
    batch_size: int = 32,
) -> MeasuredCredit | None:
    """Credit of every failing rollout with a successful peer (drawn uniformly), teacher = the same weights.

    None if there is no such rollout.
    """
    rng = random.Random(seed)
    found = [
        (group, i, peer)
        for group in groups
        for i, peer in enumerate(choose_peers(group, "uniform", rng=rng))
        if peer is not None and i in group.failures and _says_something(tokenizer, group.rollouts[peer].token_ids)
    ]
    if not found:
        return None
    was_training = model.training
    model.eval()
    columns: dict[str, list[Tensor]] = {"with_peer": [], "answer_only": [], "mask": []}
    for start in range(0, len(found), batch_size):
        part = found[start : start + batch_size]
        rollouts = [group.rollouts[i].token_ids for group, i, _ in part]
        plain = [tokenize_prompt(tokenizer, group.prompt) for group, _, _ in part]
        student, mask = _log_probs(model, tokenizer, plain, rollouts)
        shown = {
            "with_peer": [group.rollouts[peer].token_ids for group, _, peer in part],
            "answer_only": [None] * len(part),
        }
        for name, demonstrations in shown.items():
            prompts = [
                build_context(tokenizer, group.prompt, group.answer, demonstration, template).prompt_ids
                for (group, _, _), demonstration in zip(part, demonstrations, strict=True)
            ]
            teacher, _ = _log_probs(model, tokenizer, prompts, rollouts)
            columns[name] += credit(teacher, student)
        columns["mask"] += mask
    model.train(was_training)
    tau = [divergence_position(g.rollouts[i].token_ids, g.rollouts[peer].token_ids) for g, i, peer in found]
    pad = torch.nn.utils.rnn.pad_sequence
    return MeasuredCredit(
        groups=[g for g, _, _ in found],
        rollout=[i for _, i, _ in found],
        peer=[peer for _, _, peer in found],
        **{name: pad(rows, batch_first=True) for name, rows in columns.items()},
        tau=torch.tensor([-1 if t is None else t for t in tau]),
    )


def _says_something(tokenizer: Any, ids: Sequence[int]) -> bool:
    """A peer of only end tokens and white space is no demonstration: its context would be the answer alone."""
    return bool(tokenizer.decode(list(ids), skip_special_tokens=True).strip())


def _log_probs(model, tokenizer, prompts, rollouts) -> tuple[Tensor, Tensor]:
    """(log-prob of each rollout token (B, T), mask (B, T)), on the CPU."""
    split = split_model(model)
    device = split.weight.device
    left, length = max(map(len, prompts)), max(map(len, rollouts))
    pad_id = tokenizer.pad_token_id
    rows, mask = [], []
    for p, o in zip(prompts, rollouts, strict=True):
        rows.append([pad_id] * (left - len(p)) + list(p) + list(o) + [pad_id] * (length - len(o)))
        mask.append([0] * (left - len(p)) + [1] * (len(p) + len(o)) + [0] * (length - len(o)))
    ids, mask_t = torch.tensor(rows, device=device), torch.tensor(mask, device=device)
    hidden = read_rollouts(split, ids, mask_t, length)
    live = mask_t[:, left:]
    out = fused_hsd_kl(
        hidden,
        hidden,
        split.weight,
        split.bias,
        target_ids=ids[:, left:],
        token_weights=live,
        logit_scale=split.logit_scale,
        softcap=split.softcap,
        return_stats=True,
    )
    assert isinstance(out, HSDKLOutput) and out.student_logps is not None
    return out.student_logps.cpu(), live.cpu()
