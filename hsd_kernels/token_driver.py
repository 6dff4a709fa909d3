"""The chunk loop of the sampled token's losses: logits, log-probs, whatever slope a loss has in them, gradients.

Chunks of token rows, and no (tokens, vocabulary) tensor: U for the log-probs, U each for dH and dW, U = 2 N D V.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hsd_kernels import gemm
from hsd_kernels.divergence import RowSpec
from hsd_kernels.head import Head
from hsd_kernels.op_support import Gradients, Wanted, storage_dtype, wide_dtype, without_autocast
from hsd_kernels.rows import eager

CHUNK_BYTES = 256 << 20  # of logits


@dataclass(frozen=True)
class Problem:
    """Validated, flat inputs, detached."""

    hidden: Tensor  # (T, D)
    head: Head
    target_ids: Tensor  # (T,)
    spec: RowSpec
    memory_bytes: int | None


def run(p: Problem, rows: Tensor, slopes_of: Callable[[Tensor, Tensor], Tensor], wanted: Wanted) -> Gradients:
    """Gradients of the sum of ``slope * log p`` over the token positions ``rows`` (R,).

    ``slopes_of`` is called once per chunk with positions (C,) and their log-probs (C,), NaN where a target is not in
    the vocabulary, and returns the slopes (C,). Rows left out are never read.
    """
    hidden, weight = p.hidden, p.head.weight
    wide, vocab, kappa = wide_dtype(hidden), len(weight), p.spec.scales[1]
    is_fp16 = hidden.dtype == torch.float16
    made = Gradients(
        hidden.new_zeros(hidden.shape, dtype=storage_dtype(hidden)) if wanted.hidden else None,
        weight.new_zeros(weight.shape, dtype=wide) if wanted.weight else None,
        weight.new_zeros(vocab, dtype=wide) if wanted.bias else None,
    )
    step = max(1, (p.memory_bytes or CHUNK_BYTES) // (vocab * wide.itemsize))
    with without_autocast(hidden.device):
        for start in range(0, rows.numel(), step):
            at = rows[start : start + step]
            h = hidden[at]
            y = torch.empty(len(at), vocab, dtype=wide, device=hidden.device)
            gemm.project_out(h, weight, y)
            y = eager.formed(y, p.head.bias, p.spec)
            normalizer = eager.normalizer(y, kappa)
            given = p.target_ids[at].unsqueeze(-1)
            targets = given.clamp(0, vocab - 1)
            logps = normalizer.log_probs(y.gather(-1, targets), kappa).masked_fill(targets != given, float("nan"))
            slopes = slopes_of(at, logps.squeeze(-1)).unsqueeze(-1)
            if not any(wanted):
                continue
            # d log p / d z = onehot - p, at the target -expm1(log p).
            dz = normalizer.log_probs(y, kappa).exp_().neg_().scatter_(-1, targets, -torch.expm1(logps))
            dz *= slopes * p.spec.chain
            if p.spec.softcap is not None:
                dz *= 1.0 - y.square()
            if made.bias is not None:
                made.bias.add_(dz.sum(0))
            # A slope may leave fp16's range, and may be so large that beside it the other tokens' would vanish there.
            unit = _units(dz) if is_fp16 else None
            dz = (dz if unit is None else dz / unit).to(hidden.dtype)
            if made.hidden is not None:
                part = gemm.backproject(dz, weight, made.hidden.dtype)
                made.hidden[at] = part if unit is None else part * unit
            if made.weight is None:
                continue
            if unit is None:
                gemm.accumulate_(made.weight, dz, h, first=start == 0)
            else:
                largest, into = unit.amax(), torch.empty_like(made.weight)
                gemm.accumulate_(into, dz, (h * (unit / largest)).to(h.dtype), first=True)
                made.weight.add_(into * largest)
    return made


def _units(dz: Tensor) -> Tensor:
    """(C, 1), the power of two below the largest magnitude of each row; one row's NaN and size are no other's."""
    largest = dz.abs().amax(-1, keepdim=True)
    largest = largest.masked_fill(~largest.isfinite(), 0.0).clamp_min(torch.finfo(dz.dtype).tiny)
    return torch.exp2(torch.frexp(largest).exponent.to(dz.dtype) - 1.0)
