"""The contract of the sampled token's losses: the clipped policy gradient, k3 towards a reference, the log-probs alone.

No (tokens, vocabulary) tensor: chunks of logits, and the gradient made while they are at hand.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from hsd_kernels.checks import (
    REDUCTIONS,
    check_head_shape,
    check_hidden_shape,
    check_not_transformed,
    check_operand,
    check_per_token,
    check_range,
    check_reference,
)
from hsd_kernels.head import Head, as_head
from hsd_kernels.op_support import autocast_to, wants
from hsd_kernels.token_ops import Options, Tensors, call
from hsd_kernels.values import check_choice, check_not_negative, check_positive


class TokenLossOutput(NamedTuple):
    loss: Tensor  # () or, for reduction "none", (...); the only one with a gradient
    logps: Tensor  # (...), nats, 0 where a token's weight is 0


def fused_token_loss(
    hidden: Tensor,
    head: Tensor | Head,
    target_ids: Tensor,
    *,
    advantages: Tensor | None = None,
    old_logps: Tensor | None = None,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    dual_clip: float | None = None,
    reference_logps: Tensor | None = None,
    reference_coef: float = 0.0,
    token_weights: Tensor | None = None,
    temperature: float = 1.0,
    reduction: str = "mean",
    num_items: float | None = None,
    memory_bytes: int | None = None,
) -> TokenLossOutput:
    """GRPO's clipped surrogate and its k3 estimate of KL(policy || reference), in one pass over the head.

    Equivalent, in fp32 and without a mask, to::

        logps = (F.linear(hidden, head).float() / temperature).log_softmax(-1).gather(-1, target_ids[..., None])[..., 0]
        ratio = (logps - old_logps).exp()
        loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - epsilon_low, 1 + epsilon_high) * advantages)
        loss = loss + reference_coef * ((reference_logps - logps).exp() - (reference_logps - logps) - 1)
        loss = loss.mean()

    Both exponentials are continued by their tangent from 20 nats on, so that value and gradient stay finite.

    Args:
        hidden: (..., D), fp32, bf16, fp16 or fp64. Gets a gradient.
        head: a `Head` or its weight (V, D). Weight and bias get a gradient if they require one, summed in fp32.
        target_ids: (...), integers in [0, V) wherever the weight is not 0.
        advantages: (...), one a token; a coefficient of the policy gradient belongs into them. None leaves it out.
        old_logps: (...), of the policy that sampled, at ``temperature``. None: the current policy sampled, the ratio is
            1 and carries the gradient ``-A grad log p``. So does any estimator whose weight is detached: pass
            ``weight * A`` (a sequence's ratio as in GSPO, a truncated importance weight as in CISPO).
        epsilon_low, epsilon_high: the clip, >= 0.
        dual_clip: > 1; where the advantage is negative the loss is at most ``dual_clip * |A|``.
        reference_logps, reference_coef: (...) and >= 0, both or neither: adds ``reference_coef * k3``.
        token_weights: (...), finite, without gradient. Tokens of weight 0 are not computed. One host synchronization.
        temperature: divides the logits, > 0.
        reduction: "mean" over the tokens of nonzero weight (or ``num_items``), "sum" or "none".
        memory_bytes: of the logits at hand at once, by default 256 MiB.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
        RuntimeError: for ``create_graph=True`` in a backward, and for tensors with a forward-mode tangent.

    Source: DeepSeekMath (GRPO), arXiv 2402.03300, equations 3 and 4; dual clip: arXiv 1912.09729.
    """
    check_not_negative("epsilon_low", epsilon_low)
    check_not_negative("epsilon_high", epsilon_high)
    check_positive("dual_clip", dual_clip, optional=True)
    if dual_clip is not None and dual_clip <= 1.0:
        raise ValueError(f"dual_clip: expected None or a number > 1, got {dual_clip}")
    check_reference("reference_logps", reference_logps, reference_coef)
    if advantages is None and reference_logps is None:
        raise ValueError("advantages: expected a tensor where there are no reference_logps, got None")
    if advantages is None and old_logps is not None:
        raise ValueError("old_logps: expected None without advantages, got a tensor")
    per_token = {"token_weights": token_weights, "advantages": advantages}
    per_token |= {"old_logps": old_logps, "reference_logps": reference_logps}
    options = {"epsilon_low": epsilon_low, "epsilon_high": epsilon_high, "dual_clip": dual_clip}
    options |= {"reference_coef": reference_coef, "reduction": reduction, "num_items": num_items}
    return _loss(hidden, head, target_ids, per_token, temperature, memory_bytes, **options)


def fused_token_logps(
    hidden: Tensor,
    head: Tensor | Head,
    target_ids: Tensor,
    *,
    token_weights: Tensor | None = None,
    temperature: float = 1.0,
    memory_bytes: int | None = None,
) -> Tensor:
    """``log p(target_ids)`` (...), nats, for any loss of them that PyTorch differentiates; 0 where the weight is 0.

    ``token_weights`` is a mask: nonzero weights count alike. U = 2 N D V without gradient, 2U with a frozen head, 4U
    with a backward through it. All else as in `fused_token_loss`.
    """
    per_token = {"token_weights": token_weights}
    return _loss(hidden, head, target_ids, per_token, temperature, memory_bytes, logps_only=True).loss


def _loss(
    hidden: Tensor,
    head: Tensor | Head,
    target_ids: Tensor,
    per_token: dict[str, Tensor | None],
    temperature: float,
    memory_bytes: int | None,
    reduction: str = "none",
    num_items: float | None = None,
    **options: Any,
) -> TokenLossOutput:
    head = as_head("head", head)
    check_choice("reduction", reduction, REDUCTIONS)
    check_positive("temperature", temperature)
    check_positive("num_items", num_items, optional=True)
    check_positive("memory_bytes", memory_bytes, optional=True, integer=True)
    hidden, weight, bias = autocast_to(hidden, head.weight, head.bias)
    check_operand("hidden", hidden, hidden, "hidden", trained=True)
    check_operand("head.weight", weight, hidden, "hidden", trained=True)
    if bias is not None:
        check_operand("head.bias", bias, hidden, "hidden", trained=True)
    check_head_shape("head", weight, bias)
    check_hidden_shape("hidden", hidden, weight.shape[1])
    if not isinstance(target_ids, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"target_ids: expected a torch.Tensor, got {type(target_ids).__name__}")
    check_per_token("target_ids", target_ids, hidden, "hidden", integers=True)
    for name, t in per_token.items():
        check_per_token(name, t, hidden, "hidden")
    check_not_transformed("fused_token_loss", hidden, weight, bias, *per_token.values())
    given = Options(
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        temperature=temperature,
        train_hidden=wants(hidden),
        train_weight=wants(weight),
        train_bias=wants(bias),
        memory_bytes=memory_bytes,
        reduction=reduction,
        num_items=num_items,
        **options,
    )
    check_range("temperature", given.spec, hidden)
    shape = hidden.shape[:-1]
    tokens = math.prod(shape)
    flat: dict[str, Any] = dict.fromkeys(Tensors._fields)
    flat |= {name: None if t is None else t.reshape(tokens) for name, t in per_token.items()}
    flat |= {"hidden": hidden.reshape(tokens, hidden.shape[-1]), "weight": weight, "bias": bias}
    out = call(Tensors(**flat | {"target_ids": target_ids.reshape(tokens)}), given)
    loss = out.loss.reshape(shape) if reduction == "none" else out.loss
    return TokenLossOutput(loss, out.logps.reshape(shape))
