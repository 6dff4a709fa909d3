"""Losses on the sampled token: the clipped policy gradient and the k3 estimate of the reference KL, without logits.

GRPO's surrogate needs ``log p(o_t)`` of one token a position. Like the fused divergence it is computed in chunks of
tokens with the gradient made in the forward (3U FLOPs, U = 2 N D V), so that no (tokens, vocabulary) tensor exists.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hsd.policy.body_and_head import Split
from hsd_kernels import Head, gemm

CHUNK_BYTES = 256 << 20  # of logits

# (log-probs (C,) that require a gradient, positions (C,) in the flat batch) -> loss of each token (C,)
TokenLoss = Callable[[Tensor, Tensor], Tensor]


def clipped_surrogate(
    logps: Tensor, old_logps: Tensor | None, advantages: Tensor, epsilon_low: float = 0.2, epsilon_high: float = 0.2
) -> Tensor:
    """GRPO's token loss ``-min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A)`` with ``r = pi / pi_old``.

    Without ``old_logps`` the rollouts are the current policy's: r is 1 and carries the gradient ``-A grad log p``.
    """
    ratio = (logps - (logps.detach() if old_logps is None else old_logps)).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1.0 - epsilon_low, 1.0 + epsilon_high) * advantages)


def k3(logps: Tensor, reference_logps: Tensor) -> Tensor:
    """``exp(d) - d - 1`` with ``d = log p_reference(o_t) - log p(o_t)``, as in GRPO: an estimate of
    KL(student || reference), unbiased for tokens drawn from the student."""
    d = reference_logps - logps
    return d.exp() - d - 1.0


def sampled_loss(
    hidden: Tensor,
    head: Split | Head,
    target_ids: Tensor,
    weights: Tensor,
    token_loss: TokenLoss,
    *,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """``(sum(weights * token_loss(log p(target_ids))), log p)``; the log-probs are detached and 0 where the weight is.

    Equivalent to ``logps = log_softmax(head(hidden) / temperature)[target_ids]`` with the head's scale and cap.

    Args:
        hidden: (B, T, D), gets a gradient, as do the head's weight and bias.
        target_ids, weights: (B, T); positions of weight 0 are not computed.
        token_loss: differentiated with respect to its first argument only.
    """
    shape = target_ids.shape
    dtype = _compute_dtype(hidden)
    flat = hidden.reshape(-1, hidden.shape[-1]).to(dtype)
    rows = weights.reshape(-1).nonzero().squeeze(-1)
    loss, logps = _SampledLoss.apply(
        flat[rows],
        head.weight.to(dtype),
        None if head.bias is None else head.bias.to(dtype),
        target_ids.reshape(-1)[rows],
        weights.reshape(-1)[rows],
        rows,
        token_loss,
        (head.logit_scale, head.softcap, temperature),
    )  # type: ignore[misc]
    return loss, torch.zeros(shape.numel(), dtype=logps.dtype, device=logps.device).index_put((rows,), logps).view(
        shape
    )


@torch.no_grad()
def sampled_logps(
    hidden: Tensor, head: Split | Head, target_ids: Tensor, mask: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """log p(target_ids) (B, T) where ``mask`` is not 0, else 0; no gradient."""
    weights = (mask != 0).float()
    return sampled_loss(hidden, head, target_ids, weights, lambda logps, _: logps, temperature=temperature)[1]


class _SampledLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        weights: Tensor,
        rows: Tensor,
        token_loss: TokenLoss,
        form: tuple[float, float | None, float],
    ) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            loss, logps, grads = _chunks(hidden, weight, bias, targets, weights, rows, token_loss, form, ctx)
        ctx.grads = grads
        ctx.mark_non_differentiable(logps)
        return loss, logps

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        scale = grad_outputs[0]
        return *(None if g is None else g * scale.to(g.dtype) for g in ctx.grads), None, None, None, None, None


def _chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    weights: Tensor,
    rows: Tensor,
    token_loss: TokenLoss,
    form: tuple[float, float | None, float],
    ctx: Any,
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    scale, softcap, temperature = form
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    wanted = ctx.needs_input_grad[:3]
    n, vocab = hidden.shape[0], weight.shape[0]
    d_hidden = torch.zeros_like(hidden) if wanted[0] else None
    d_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if wanted[1] else None
    d_bias = torch.zeros(vocab, dtype=wide, device=weight.device) if wanted[2] else None
    logps = torch.zeros(n, dtype=wide, device=hidden.device)
    loss = torch.zeros((), dtype=wide, device=hidden.device)
    step = max(1, CHUNK_BYTES // (vocab * logps.element_size()))
    for start in range(0, n, step):
        at = slice(start, start + step)
        z = torch.empty((len(targets[at]), vocab), dtype=wide, device=hidden.device)
        gemm.project_out(hidden[at], weight, z)
        if bias is not None:
            z += bias.to(wide)
        z *= scale
        slope: Any = scale / temperature
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
            slope = slope * (1.0 - (z / softcap) ** 2)
        z /= temperature
        chosen = targets[at].unsqueeze(-1)
        logps[at] = z.gather(-1, chosen).squeeze(-1) - z.logsumexp(-1)
        with torch.enable_grad():
            leaf = logps[at].detach().requires_grad_()
            value = (token_loss(leaf, rows[at]) * weights[at]).sum()
            (g,) = torch.autograd.grad(value, leaf)
        loss += value.detach()
        if not any(wanted):
            continue
        dz = z.softmax(-1).neg_()
        dz.scatter_add_(-1, chosen, torch.ones_like(chosen, dtype=wide))
        dz = (dz * g.to(wide).unsqueeze(-1) * slope).to(hidden.dtype)  # of the loss by h W^T + b
        if d_hidden is not None:
            d_hidden[at] = gemm.backproject(dz, weight, wide).to(hidden.dtype)
        if d_weight is not None:
            gemm.accumulate_(d_weight, dz, hidden[at], first=False)
        if d_bias is not None:
            d_bias += dz.sum(0, dtype=wide)
    grads = [d_hidden, d_weight, d_bias]
    likes = (hidden, weight, bias)
    return loss, logps, [None if g is None else g.to(x.dtype) for g, x in zip(grads, likes, strict=True)]  # type: ignore[union-attr]


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
