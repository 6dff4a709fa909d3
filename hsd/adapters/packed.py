"""lasgroup/SDPO and verl: the self-distillation loss on packed hidden states, with everything their update logs.

Both unpad a batch to (nnz, D) before the head. `packed_loss` goes where they would make (nnz, V) logits of both sides,
log-softmax them and call `compute_self_distillation_loss`; docs/adapters/verl.md says where.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hsd.adapters.common import ImportanceRatio
from hsd_kernels import Divergence, Head, HSDKLOutput, fused_hsd_kl


class PackedOutput(NamedTuple):
    """``loss`` (scalar) has the gradient; the rest is (nnz,), detached, 0 where a token's weight is 0."""

    loss: Tensor
    per_token_loss: Tensor  # divergence times all weights, before the aggregation
    kl: Tensor  # the divergence alone, nats
    student_logps: Tensor  # of target_ids, at the temperature
    teacher_logps: Tensor
    student_entropy: Tensor
    is_ratio: Tensor  # min(exp(log p - log p_old), is_clip), 1 without a clip


def packed_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    head: Tensor | Head,
    *,
    target_ids: Tensor,
    loss_mask: Tensor,
    teacher_head: Tensor | Head | None = None,
    alpha: float = 1.0,
    temperature: float = 1.0,
    is_clip: float | None = None,
    old_logps: Tensor | None = None,
    rollout_is_weights: Tensor | None = None,
    aggregation: str = "token-mean",
    cu_seqlens: Tensor | None = None,
    normalizer: float | None = None,
    impl: str = "auto",
) -> PackedOutput:
    """Their ``compute_self_distillation_loss`` with ``full_logit_distillation`` and no top-k::

        kl = divergence(softmax(teacher_logits), softmax(student_logits), alpha).sum(-1)               # (nnz,)
        ratio = exp(clamp(student_logps - old_logps, -20, 20)).clamp(max=is_clip)                      # detached
        per_token = kl * ratio * rollout_is_weights
        loss = (per_token * loss_mask).sum() / loss_mask.sum()                                         # token-mean

    Args:
        student_hidden, teacher_hidden: (nnz, D), at the positions that predict ``target_ids`` (nnz,).
        loss_mask: (nnz,), what counts: the response mask times the self-distillation mask, 0 on prompts.
        alpha: theirs and TRL's: 0 is KL(teacher || student), 1 is KL(student || teacher), between them the teacher's
            share of the mixture.
        is_clip, old_logps: both or neither. ``old_logps`` (nnz,) at the same temperature; on-policy training, where
            they would be the student's own, needs neither, for the ratio is then 1 (``is_clip`` >= 1).
        rollout_is_weights: (nnz,), their rollout correction.
        aggregation: "token-mean", "seq-mean-token-sum" or "seq-mean-token-mean", as `agg_loss`; the last two need
            ``cu_seqlens`` (sequences + 1), the sequences' bounds in nnz. A sequence without tokens does not count.
        normalizer: replaces the number of tokens, or of sequences, that the sum is divided by: their
            ``batch_num_tokens`` or ``global_batch_size`` over a global batch.

    Tokens of mask 0 are never projected, so a prompt costs nothing here. There is no factor temperature^2.

    Raises ValueError for a shape that is not (nnz,), an unknown aggregation, or half of a pair.
    """
    options = {
        "target_ids": target_ids,
        "loss_mask": loss_mask,
        "old_logps": old_logps,
        "rollout_is_weights": rollout_is_weights,
    }
    for name, t in options.items():
        if t is not None and t.shape != student_hidden.shape[:1]:
            raise ValueError(f"{name}: expected shape ({student_hidden.shape[0]},), got {tuple(t.shape)}")
    if (is_clip is None) != (old_logps is None):
        raise ValueError(f"is_clip: expected with old_logps or not at all, got is_clip={is_clip}")
    share = _shares(loss_mask.float(), aggregation, cu_seqlens, normalizer)
    weights = share if rollout_is_weights is None else share * rollout_is_weights
    ratio = ImportanceRatio.of(old_logps, is_clip)
    out = fused_hsd_kl(
        student_hidden,
        teacher_hidden,
        head,
        divergence=Divergence("jsd", alpha, temperature),
        teacher_head=teacher_head,
        target_ids=target_ids,
        token_weights=weights,
        token_weight_fn=ratio,
        reduction="sum",
        impl=impl,
        return_stats=True,
    )
    assert isinstance(out, HSDKLOutput)
    stats = out.stats
    assert stats.student_logps is not None and stats.teacher_logps is not None
    ratios = (weights != 0).float() if ratio is None else ratio.values
    per_token = stats.kl * ratios
    if rollout_is_weights is not None:
        per_token = per_token * rollout_is_weights
    return PackedOutput(
        out.loss, per_token, stats.kl, stats.student_logps, stats.teacher_logps, stats.student_entropy, ratios
    )


def response_rows(attention_mask: Tensor, length: int) -> Tensor:
    """(nnz,) bool: which states of a packed batch predict a token of its responses.

    ``attention_mask`` (B, S) is that of the padded batch, prompts left and responses of at most ``length`` tokens
    right, as in verl. The student's and the teacher's prompts differ and their responses do not, so that the states
    so picked are of the same tokens in the same order, those of ``responses[attention_mask[:, -length:].bool()]``.
    """
    predicts = torch.zeros_like(attention_mask, dtype=torch.bool)
    predicts[:, -length - 1 : -1] = attention_mask[:, -length:].bool()
    return predicts[attention_mask.bool()]


def _shares(mask: Tensor, aggregation: str, cu_seqlens: Tensor | None, normalizer: float | None) -> Tensor:
    """(nnz,), what each token's loss counts in the aggregate."""
    if aggregation == "token-mean":
        return mask / (mask.sum().clamp_min(1.0) if normalizer is None else normalizer)
    if aggregation not in ("seq-mean-token-sum", "seq-mean-token-mean"):
        expected = "'token-mean', 'seq-mean-token-sum' or 'seq-mean-token-mean'"
        raise ValueError(f"aggregation: expected {expected}, got {aggregation!r}")
    if cu_seqlens is None:
        raise ValueError(f"cu_seqlens: expected the sequences' bounds with aggregation={aggregation!r}, got None")
    lengths = cu_seqlens.diff()
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=mask.device), lengths.to(mask.device))
    if len(sequence) != len(mask):
        raise ValueError(f"cu_seqlens: expected bounds that end at {len(mask)}, got {int(cu_seqlens[-1])}")
    tokens = torch.zeros(len(lengths), device=mask.device).index_add(0, sequence, mask)
    sequences = (tokens > 0).sum().clamp_min(1) if normalizer is None else normalizer
    share = mask if aggregation.endswith("sum") else mask / tokens.clamp_min(1.0)[sequence]
    return share / sequences
