"""The operators behind `fused_token_loss` and the loss of one token. A per-token loss of a trained head is 4U instead
of 3U, U = 2 N D V: its backward makes the logits again (`hsd_kernels.registration`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hsd_kernels.divergence import Divergence, RowSpec
from hsd_kernels.head import Head
from hsd_kernels.op_support import checked_targets, live_rows, stored, times
from hsd_kernels.registration import Trained, register
from hsd_kernels.schema import Packer
from hsd_kernels.token_driver import Problem, run

MAX_LOG_RATIO = 20.0  # nats; from there on exp is continued by its tangent: e^89 is infinite in fp32


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
class Options(Trained):
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
    logps_only: bool = False  # the loss is the log-prob itself, and nonzero weights count alike
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    dual_clip: float | None = None
    reference_coef: float = 0.0

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


def call(tensors: Tensors, options: Options) -> Outputs:
    return Outputs(*torch.ops.hsd_kernels.fused_token_loss(*tensors, **_OPTIONS.pack(options)))


def _forward(*tensors: Tensor, **given: Any) -> tuple[Tensor, ...]:
    t, o = Tensors(*tensors), _OPTIONS.unpack(given)
    rows, weights = live_rows(t.token_weights, t.hidden)
    target_ids = checked_targets(t.target_ids, rows, t.weight.shape[0])
    scale = o.scale(rows.numel())
    before = 1.0 if t.hidden.dtype == torch.float16 else scale  # no room for so small a dz
    full, logps, terms, slopes = (weights.new_zeros(t.hidden.shape[0]) for _ in range(4))  # outputs may not be views
    full[rows] = torch.ones_like(weights) if o.logps_only else weights

    def slopes_of(at: Tensor, found: Tensor) -> Tensor:
        value, slope = _token_loss(found, at, t, o)
        logps[at], terms[at], slopes[at] = found, times(full[at], value), full[at] * slope
        return slopes[at] * before

    made = run(_problem(t, o, target_ids), rows, slopes_of, o.made)
    loss = terms if o.reduction == "none" else terms.sum() * scale
    return (loss, logps, slopes, *stored(made, t.hidden, scale / before))


def _backward(*tensors: Tensor, **given: Any) -> tuple[Tensor, ...]:
    t, o = Tensors(*tensors), _OPTIONS.unpack(given)
    slopes = t.token_weights
    assert slopes is not None
    problem = _problem(t, o, t.target_ids.long())
    return stored(run(problem, slopes.nonzero().squeeze(-1), lambda at, _: slopes[at], o.wanted), t.hidden, 1.0)


def _fake(t: Tensors, o: Options, empty: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    tokens = t.hidden.shape[0]
    return empty(tokens) if o.reduction == "none" else empty(), empty(tokens), empty(tokens)


def _problem(t: Tensors, o: Options, target_ids: Tensor) -> Problem:
    return Problem(t.hidden, Head(t.weight, t.bias), target_ids, o.spec, o.memory_bytes)


register(
    "fused_token_loss",
    Tensors,
    (Options,),
    Outputs,
    hidden="hidden",
    forward=_forward,
    backward=_backward,
    fake=_fake,
    again=lambda t, out: t._replace(token_weights=out.slopes, advantages=None, old_logps=None, reference_logps=None),
    sides=lambda t: 1,
)


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
