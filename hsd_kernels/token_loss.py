"""Losses of the sampled token's log-prob: the clipped policy gradient, k3 towards a reference, or the log-probs alone.

No (tokens, vocabulary) tensor: chunks of logits, and the gradient made while they are at hand (3U, U = 2 N D V). A
per-token loss has an upstream gradient per row; its backward makes the chunks' logits again (4U).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hsd_kernels import gemm
from hsd_kernels.checks import check_head_shape, check_hidden_shape, check_no_tangent, check_operand, check_per_token
from hsd_kernels.divergence import Divergence, RowSpec
from hsd_kernels.head import Head, as_head
from hsd_kernels.op_support import (
    NOTHING,
    Gradients,
    Wanted,
    autocast_to,
    checked_targets,
    finished,
    first_order_only,
    live_rows,
    register_autograd,
    stored,
    stored_fake,
    times,
    wide_dtype,
    without_autocast,
)
from hsd_kernels.rows import eager
from hsd_kernels.schema import Packer, option_arguments, tensor_arguments
from hsd_kernels.upstream import times_upstream
from hsd_kernels.values import check_choice, check_not_negative, check_positive

CHUNK_BYTES = 256 << 20  # of logits
REDUCTIONS = ("none", "sum", "mean")
MAX_LOG_RATIO = 20.0  # nats; from there on exp is continued by its tangent: e^89 is infinite in fp32


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
    check_not_negative("reference_coef", reference_coef)
    if reference_coef > 0.0 if reference_logps is None else reference_coef == 0.0:
        expected = "a tensor with reference_coef > 0, None without"
        got = "None" if reference_logps is None else "a tensor"
        raise ValueError(f"reference_logps: expected {expected}, got {got} and reference_coef={reference_coef}")
    if advantages is None and reference_logps is None:
        raise ValueError("advantages: expected a tensor where there are no reference_logps, got None")
    if advantages is None and old_logps is not None:
        raise ValueError("old_logps: expected None without advantages, got a tensor")
    per_token = {"token_weights": token_weights, "advantages": advantages}
    per_token |= {"old_logps": old_logps, "reference_logps": reference_logps}
    options = {"epsilon_low": epsilon_low, "epsilon_high": epsilon_high, "dual_clip": dual_clip}
    options |= {"reference_coef": reference_coef, "reduction": reduction, "num_items": num_items}
    return _call(hidden, head, target_ids, per_token, temperature, memory_bytes, **options)


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

    ``token_weights`` is a mask: nonzero weights count alike. U without gradient, 4U with a backward. All else as in
    `fused_token_loss`.
    """
    mask = None if token_weights is None else (token_weights != 0).float()
    return _call(hidden, head, target_ids, {"token_weights": mask}, temperature, memory_bytes, logps_only=True).loss


class Tensors(NamedTuple):
    """The operators' positional arguments, flat: (T, D), (V, D), (V,) and (T,)."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    target_ids: Tensor
    token_weights: Tensor | None  # in the backward d loss / d log p
    advantages: Tensor | None
    old_logps: Tensor | None
    reference_logps: Tensor | None


@dataclass(frozen=True)
class Options:
    """The operators' keyword-only arguments."""

    logit_scale: float
    softcap: float | None
    temperature: float
    train_hidden: bool
    train_weight: bool
    train_bias: bool
    memory_bytes: int | None
    reduction: str = "none"
    num_items: float | None = None
    logps_only: bool = False  # the loss is the log-prob itself
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    dual_clip: float | None = None
    reference_coef: float = 0.0

    @property
    def wanted(self) -> Wanted:
        return Wanted(self.train_hidden, self.train_weight, self.train_bias)

    @property
    def made(self) -> Wanted:
        """What the forward makes."""
        return NOTHING if self.reduction == "none" else self.wanted

    @property
    def spec(self) -> RowSpec:
        return RowSpec(Divergence(temperature=self.temperature), self.logit_scale, self.softcap)


class Outputs(NamedTuple):
    loss: Tensor  # () or (T,)
    logps: Tensor  # (T,)
    slopes: Tensor  # (T,), d (weight * token loss) / d log p
    grad_hidden: Tensor  # (0,) where not made
    grad_weight: Tensor
    grad_bias: Tensor


_OPTIONS = Packer(Options)
_arguments = f"{tensor_arguments(Tensors)}, *, {option_arguments(Options)}"
_library = torch.library.Library("hsd_kernels", "FRAGMENT")
_library.define(f"fused_token_loss({_arguments}) -> ({tensor_arguments(Outputs)})")
_library.define(f"fused_token_loss_backward({_arguments}) -> ({tensor_arguments(Gradients).replace('?', '')})")


def _call(
    hidden: Tensor,
    head: Tensor | Head,
    target_ids: Tensor,
    per_token: dict[str, Tensor | None],
    temperature: float,
    memory_bytes: int | None,
    **options: Any,
) -> TokenLossOutput:
    head = as_head("head", head)
    check_choice("reduction", options.get("reduction", "none"), REDUCTIONS)
    check_positive("temperature", temperature)
    check_positive("num_items", options.get("num_items"), optional=True)
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
    check_no_tangent("fused_token_loss", hidden, weight, bias, *per_token.values())
    shape = hidden.shape[:-1]
    tokens = math.prod(shape)

    def flat(name: str) -> Tensor | None:
        t = per_token.get(name)
        return None if t is None else t.reshape(tokens)

    def wanted(t: Tensor | None) -> bool:
        return torch.is_grad_enabled() and t is not None and t.requires_grad

    tensors = Tensors(
        hidden=hidden.reshape(tokens, hidden.shape[-1]),
        weight=weight,
        bias=bias,
        target_ids=target_ids.reshape(tokens),
        token_weights=flat("token_weights"),
        advantages=flat("advantages"),
        old_logps=flat("old_logps"),
        reference_logps=flat("reference_logps"),
    )
    given = Options(
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        temperature=temperature,
        train_hidden=wanted(hidden),
        train_weight=wanted(weight),
        train_bias=wanted(bias),
        memory_bytes=memory_bytes,
        **options,
    )
    out = Outputs(*torch.ops.hsd_kernels.fused_token_loss(*tensors, **_OPTIONS.pack(given)))
    loss = out.loss.reshape(shape) if given.reduction == "none" else out.loss
    return TokenLossOutput(loss, out.logps.reshape(shape))


# The loss of one token and its slope in log p.


def _token_loss(logps: Tensor, at: Tensor, t: Tensors, o: Options) -> tuple[Tensor, Tensor]:
    """(value, d value / d logps) of the tokens ``at``, (C,) each."""
    if o.logps_only:
        return logps, torch.ones_like(logps)
    value, slope = torch.zeros_like(logps), torch.zeros_like(logps)
    if t.advantages is not None:
        gain = t.advantages[at].to(logps)
        rise = torch.zeros_like(logps) if t.old_logps is None else logps - t.old_logps[at].to(logps)
        ratio, ratio_slope = _bounded_exp(rise)
        clipped = ratio.clamp(1.0 - o.epsilon_low, 1.0 + o.epsilon_high) * gain
        value, slope = -torch.minimum(ratio * gain, clipped), -ratio_slope * gain
        slope = slope.masked_fill(ratio * gain > clipped, 0.0)
        if o.dual_clip is not None:
            most = -o.dual_clip * gain
            over = (gain < 0) & (value > most)
            value, slope = torch.where(over, most, value), slope.masked_fill(over, 0.0)
    if t.reference_logps is not None:
        gap = t.reference_logps[at].to(logps) - logps
        near = torch.expm1(gap.clamp_max(MAX_LOG_RATIO))  # not exp - 1: k3 is gap^2 / 2 near 0
        tangent = (near + 1.0) * (gap - MAX_LOG_RATIO).clamp_min(0.0)
        value, slope = value + o.reference_coef * (near + tangent - gap), slope - o.reference_coef * near
    return value, slope


def _bounded_exp(x: Tensor) -> tuple[Tensor, Tensor]:
    """exp(x) and its slope; from MAX_LOG_RATIO on the tangent there."""
    slope = x.clamp_max(MAX_LOG_RATIO).exp()
    return slope * (1.0 + (x - MAX_LOG_RATIO).clamp_min(0.0)), slope


# The chunks.


class _Chunk(NamedTuple):
    at: Tensor  # (C,), positions in the flat batch
    hidden: Tensor  # (C, D)
    y: Tensor  # (C, V), `RowSpec.scales`
    normalizer: eager.Normalizer
    targets: Tensor  # (C, 1), within the vocabulary
    logps: Tensor  # (C,), NaN where the target is not


def _chunks(t: Tensors, o: Options, rows: Tensor, target_ids: Tensor) -> Iterator[_Chunk]:
    wide, vocab = wide_dtype(t.hidden), t.weight.shape[0]
    step = max(1, (o.memory_bytes or CHUNK_BYTES) // (vocab * wide.itemsize))
    kappa = o.spec.scales[1]
    for at in rows.split(step):
        hidden = t.hidden[at]
        y = torch.empty(len(at), vocab, dtype=wide, device=hidden.device)
        gemm.project_out(hidden, t.weight, y)
        y = eager.formed(y, t.bias, o.spec)
        normalizer = eager.normalizer(y, kappa)
        targets = target_ids[at].unsqueeze(-1)
        valid = targets.clamp(0, vocab - 1)
        logps = normalizer.log_probs(y.gather(-1, valid), kappa).masked_fill(targets != valid, float("nan"))
        yield _Chunk(at, hidden, y, normalizer, valid, logps.squeeze(-1))


class _Sums:
    """The gradients of the chunks seen so far: of sum(slopes * log p)."""

    def __init__(self, t: Tensors, o: Options, wanted: Wanted) -> None:
        wide = wide_dtype(t.hidden)
        narrow = torch.float32 if t.hidden.dtype == torch.float16 else t.hidden.dtype
        self.t, self.o, self.any, self.first = t, o, any(wanted), True
        self.hidden = torch.zeros_like(t.hidden, dtype=narrow) if wanted.hidden else None
        self.weight = torch.zeros_like(t.weight, dtype=wide) if wanted.weight else None
        self.bias = t.weight.new_zeros(t.weight.shape[0], dtype=wide) if wanted.bias else None

    def add(self, c: _Chunk, slopes: Tensor) -> None:
        """``slopes`` (C,), of the loss in each log-prob. d log p / d z = onehot - p, at the target -expm1(log p)."""
        if not self.any:
            return
        t, kappa = self.t, self.o.spec.scales[1]
        dz = c.normalizer.log_probs(c.y, kappa).exp_().neg_()
        dz.scatter_(-1, c.targets, -torch.expm1(c.logps).unsqueeze(-1))
        dz *= (slopes * self.o.spec.chain).unsqueeze(-1)
        if self.o.softcap is not None:
            dz *= 1.0 - c.y.square()
        if self.bias is not None:
            self.bias += dz.sum(0)
        unit: Any = 1.0
        if t.hidden.dtype == torch.float16:  # whose range a slope may leave
            unit = dz.abs().amax().clamp_min(torch.finfo(dz.dtype).tiny)
            dz = dz / unit
        dz = dz.to(t.hidden.dtype)
        if self.hidden is not None:
            self.hidden[c.at] = (gemm.backproject(dz, t.weight, self.hidden.dtype) * unit).to(self.hidden.dtype)
        if self.weight is not None and t.hidden.dtype == torch.float16:
            part = torch.empty_like(self.weight)
            gemm.accumulate_(part, dz, c.hidden, first=True)
            self.weight += part * unit
        elif self.weight is not None:
            gemm.accumulate_(self.weight, dz, c.hidden, first=self.first)
        self.first = False

    @property
    def gradients(self) -> Gradients:
        return Gradients(self.hidden, self.weight, self.bias)


def _forward(*tensors: Tensor, **given: Any) -> tuple[Tensor, ...]:
    t, o = Tensors(*tensors), _OPTIONS.unpack(given)
    rows, weights = live_rows(t.token_weights, t.hidden)
    target_ids = checked_targets(t.target_ids, rows, t.weight.shape[0])
    scale = 1.0
    if o.reduction == "mean":
        scale = 1.0 / (max(rows.numel(), 1) if o.num_items is None else o.num_items)
    before = 1.0 if t.hidden.dtype == torch.float16 else scale  # no room for so small a dz
    full = torch.zeros(t.hidden.shape[0], dtype=weights.dtype, device=weights.device)
    logps, terms, slopes = full.clone(), full.clone(), full.clone()
    full[rows] = weights
    sums = _Sums(t, o, o.made)
    with without_autocast(t.hidden.device):
        for c in _chunks(t, o, rows, target_ids):
            value, slope = _token_loss(c.logps, c.at, t, o)
            logps[c.at], terms[c.at], slopes[c.at] = c.logps, times(full[c.at], value), full[c.at] * slope
            sums.add(c, slopes[c.at] * before)
    loss = terms if o.reduction == "none" else terms.sum() * scale
    # A log-prob that is the loss: an operator may not return one tensor twice.
    return (loss, logps, slopes, *stored(sums.gradients, t.hidden, scale / before))


def _backward(*tensors: Tensor, **given: Any) -> tuple[Tensor, ...]:
    t, o = Tensors(*tensors), _OPTIONS.unpack(given)
    assert t.token_weights is not None
    rows = t.token_weights.nonzero().squeeze(-1)
    sums = _Sums(t, o, o.wanted)
    with without_autocast(t.hidden.device):
        for c in _chunks(t, o, rows, t.target_ids.long()):
            sums.add(c, t.token_weights[c.at])
    return stored(sums.gradients, t.hidden, 1.0)


def _forward_fake(*tensors: Tensor, **given: Any) -> tuple[Tensor, ...]:
    t, o = Tensors(*tensors), _OPTIONS.unpack(given)

    def empty(*shape: Any) -> Tensor:
        return t.hidden.new_empty(shape, dtype=wide_dtype(t.hidden))

    tokens = t.hidden.shape[0]
    loss = empty(tokens) if o.reduction == "none" else empty()
    return (loss, empty(tokens), empty(tokens), *stored_fake(Gradients(t.hidden, t.weight, t.bias), o.made))


def _backward_fake(*tensors: Tensor, **given: Any) -> tuple[Tensor, ...]:
    t = Tensors(*tensors)
    return stored_fake(Gradients(t.hidden, t.weight, t.bias), _OPTIONS.unpack(given).wanted)


_library.impl("fused_token_loss", _forward, "CompositeExplicitAutograd")
_library.impl("fused_token_loss_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("hsd_kernels::fused_token_loss", _forward_fake, lib=_library)
torch.library.register_fake("hsd_kernels::fused_token_loss_backward", _backward_fake, lib=_library)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], given: dict[str, Any], output: tuple[Tensor, ...]) -> None:
    t, out, o = Tensors(*inputs), Outputs(*output), _OPTIONS.unpack(given)
    ctx.mark_non_differentiable(out.logps, out.slopes, out.grad_hidden, out.grad_weight, out.grad_bias)
    ctx.set_materialize_grads(False)
    ctx.given, ctx.options, ctx.dtype = given, o, t.hidden.dtype
    # Through autograd, so that an in-place change before the backward is an error, not a wrong gradient.
    if o.reduction == "none":
        of_loss = dict.fromkeys(("advantages", "old_logps", "reference_logps"))
        ctx.save_for_backward(*t._replace(token_weights=out.slopes, **of_loss))
    else:
        ctx.save_for_backward(out.grad_hidden, out.grad_weight, out.grad_bias)


@first_order_only("fused_token_loss")
def _autograd(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
    found = Gradients(None, None, None)
    if upstream is not None and ctx.options.reduction == "none":
        t = Tensors(*ctx.saved_tensors)
        assert t.token_weights is not None
        slopes = t.token_weights * upstream.masked_fill(t.token_weights == 0, 0.0)
        op = torch.ops.hsd_kernels.fused_token_loss_backward
        made = Gradients(*op(*t._replace(token_weights=slopes), **ctx.given))
        found = finished(made, ctx.options.wanted, lambda g: g.to(ctx.dtype))
    elif upstream is not None:
        made = Gradients(*ctx.saved_tensors)
        found = finished(made, ctx.options.wanted, lambda g: times_upstream(g, upstream, ctx.dtype))
    grads: dict[str, Any] = dict.fromkeys(Tensors._fields)
    return tuple((grads | {"hidden": found.hidden, "weight": found.weight, "bias": found.bias}).values())


register_autograd(_library, "fused_token_loss", _setup_context, _autograd)
