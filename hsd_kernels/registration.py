"""How a loss becomes two operators: schemas, fakes, FLOPs and autograd. The gradient is made in the forward.

The first operator returns, as outputs of their own, the gradients that are wanted, scaled and in their storage dtype:
the backward multiplies them by the upstream gradient. A per-token loss has an upstream gradient per row. That can
rescale finished rows of dH, but not dW, which is a sum over rows: when the head is trained the backward runs the chunks
again with the upstream gradient as weights, by the second operator.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from hsd_kernels.op_support import NOTHING, Gradients, Wanted, stored_fake, wide_dtype
from hsd_kernels.schema import Packer, option_arguments, tensor_arguments
from hsd_kernels.upstream import times_upstream

_library = torch.library.Library("hsd_kernels", "DEF")


class Trained:
    """What the options of every loss say of its sum and its gradients. Their dataclass declares these fields: the order
    of its fields is that of the schema."""

    reduction: str
    num_items: float | None
    train_hidden: bool
    train_weight: bool
    train_bias: bool

    @property
    def wanted(self) -> Wanted:
        return Wanted(self.train_hidden, self.train_weight, self.train_bias)

    @property
    def reruns(self) -> bool:
        """Whether the backward makes the gradients, by running the chunks again."""
        return self.reduction == "none" and (self.train_weight or self.train_bias)

    @property
    def made(self) -> Wanted:
        """What the forward makes."""
        return NOTHING if self.reruns else self.wanted

    def scale(self, live: int) -> float:
        """Of a sum over ``live`` tokens."""
        if self.reduction != "mean":
            return 1.0
        return 1.0 / (max(live, 1) if self.num_items is None else self.num_items)


def register(
    name: str,
    tensors: type[Any],
    records: tuple[type[Any], ...],
    outputs: type[Any],
    *,
    hidden: str,
    forward: Callable[..., tuple[Tensor, ...]],
    backward: Callable[..., tuple[Tensor, ...]],
    fake: Callable[..., tuple[Tensor, ...]],
    again: Callable[[Any, Any], Any],
    sides: Callable[[Any], int],
) -> None:
    """The operators ``name`` and ``name``_backward.

    Args:
        tensors: a NamedTuple of the arguments, ``weight``, ``bias`` and ``token_weights`` among them.
        records: dataclasses of the options, a `Trained` last.
        outputs: a NamedTuple of what ``forward`` returns: ``loss``, and last ``grad_hidden``, ``grad_weight`` and
            ``grad_bias``.
        hidden: the argument whose gradient ``grad_hidden`` is.
        forward, backward: (*tensors, **options) -> outputs, and -> `stored` gradients of the sum of token_weights (T,)
            or (..., T) times whatever they weight.
        fake: (tensors, options, empty) -> the outputs but for the gradients, each an ``empty(*shape)``.
        again: (tensors, outputs) -> the tensors of a backward for an upstream gradient of ones.
        sides: of shapes: how many (T, V) blocks of logits a forward and a backward make.
    """
    options = Packer(records[-1])
    arguments = f"{tensor_arguments(tensors)}, *, {option_arguments(*records)}"

    def trained(t: Any) -> Gradients:
        return Gradients(getattr(t, hidden), t.weight, t.bias)

    def forward_fake(*inputs: Tensor, **given: Any) -> tuple[Tensor, ...]:
        t, o = tensors(*inputs), options.unpack(given)

        def empty(*shape: Any) -> Tensor:
            like = getattr(t, hidden)
            return like.new_empty(shape, dtype=wide_dtype(like))

        return (*fake(t, o, empty), *stored_fake(trained(t), o.made))

    def backward_fake(*inputs: Tensor, **given: Any) -> tuple[Tensor, ...]:
        return stored_fake(trained(tensors(*inputs)), options.unpack(given).wanted)

    def products(inputs: tuple[Any, ...], made: Wanted) -> int:
        """FLOPs: 2 N D V for each side's logits, dH and dW. A counter of FLOPs does not see inside an operator."""
        t = tensors(*inputs)
        vocab, _ = t.weight
        unit: Any = 2 * math.prod(getattr(t, hidden)) * vocab
        return int(unit * (sides(t) + made.hidden + made.weight))

    def forward_flops(*shapes: Any, **given: Any) -> int:
        return products(shapes, options.unpack(given).made)

    def backward_flops(*shapes: Any, **given: Any) -> int:
        return products(shapes, options.unpack(given).wanted)

    for op, returned, implementation, without_numbers, flops in (
        (name, outputs, forward, forward_fake, forward_flops),
        (f"{name}_backward", Gradients, backward, backward_fake, backward_flops),
    ):
        _library.define(f"{op}({arguments}) -> ({tensor_arguments(returned).replace('?', '')})")
        _library.impl(op, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"hsd_kernels::{op}", without_numbers, lib=_library)
        register_flop_formula(getattr(torch.ops.hsd_kernels, op))(flops)  # pyright: ignore

    def setup_context(ctx: Any, inputs: tuple[Any, ...], given: dict[str, Any], output: tuple[Tensor, ...]) -> None:
        t, out, o = tensors(*inputs), outputs(*output), options.unpack(given)
        ctx.mark_non_differentiable(*(x for field, x in out._asdict().items() if field != "loss"))
        ctx.set_materialize_grads(False)
        ctx.given, ctx.options, ctx.dtype = given, o, getattr(t, hidden).dtype
        # Through autograd, so that an in-place change before the backward is an error, not a wrong gradient.
        if o.reruns:
            ctx.save_for_backward(*map(_savable, again(t, out)))
        else:
            made = (out.grad_hidden, out.grad_weight, out.grad_bias)
            ctx.save_for_backward(*made, again(t, out).token_weights if o.reduction == "none" else None)

    @_first_order_only(name)
    def gradients(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
        o, found = ctx.options, dict.fromkeys(tensors._fields)
        if upstream is None:
            return tuple(found.values())
        if o.reruns:
            t = tensors(*ctx.saved_tensors)
            weights = t.token_weights * _of_counted(upstream, t.token_weights)
            made = getattr(torch.ops.hsd_kernels, f"{name}_backward")(*t._replace(token_weights=weights), **ctx.given)
        else:
            *made, effective = ctx.saved_tensors
            upstream = upstream if effective is None else _of_counted(upstream, effective)
        for field, g, wanted in zip((hidden, "weight", "bias"), made, o.wanted, strict=True):
            if wanted:
                found[field] = g.to(ctx.dtype) if o.reruns else times_upstream(g, upstream, ctx.dtype)
        return tuple(found.values())

    _register_autograd(name, setup_context, gradients)


def _register_autograd(
    name: str, setup_context: Callable[..., None], gradients: Callable[..., tuple[Any, ...]]
) -> None:
    """`torch.library.register_autograd` of an operator of this package, with the same functions: its own looks each
    argument up in the schema at every call (tests count the calls of a small problem)."""
    op = getattr(torch.ops.hsd_kernels, name)

    def below(given: dict[str, Any], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():  # pyright: ignore
            return op(*tensors, **given)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, given: dict[str, Any], *tensors: Tensor | None) -> tuple[Tensor, ...]:  # pyright: ignore
            out = below(given, *tensors)
            setup_context(ctx, tensors, given, out)
            return out

        @staticmethod
        def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:  # pyright: ignore
            return (None, *gradients(ctx, *upstream))

    def differentiable(*tensors: Tensor | None, **given: Any) -> tuple[Tensor, ...]:
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            return Function.apply(given, *tensors)  # pyright: ignore
        return below(given, *tensors)

    _library.impl(name, differentiable, "Autograd")


def _first_order_only(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A backward that refuses ``create_graph=True`` by name: what it returned would be taken for a constant."""

    def wrap(backward: Callable[..., Any]) -> Callable[..., Any]:
        once = once_differentiable(backward)

        @functools.wraps(backward)
        def checked(ctx: Any, *upstream: Any) -> Any:
            if torch.is_grad_enabled():
                raise RuntimeError(f"{name}: expected create_graph=False, got True; it has no second derivative")
            return once(ctx, *upstream)

        return checked

    return wrap


def _savable(t: Tensor | None) -> Tensor | None:
    """A tensor that was made under `torch.inference_mode` cannot be saved for a backward: its copy can."""
    return t.clone() if t is not None and t.is_inference() else t


def _of_counted(upstream: Tensor, weights: Tensor) -> Tensor:
    """A NaN upstream of a dropped row, also one that the hook dropped, does not propagate. (T,) or (..., T) weights."""
    return upstream.masked_fill(torch.atleast_2d(weights == 0).all(0), 0.0)
