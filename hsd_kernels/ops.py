"""The two custom operators behind `fused_hsd_kl`: schema, fake, autograd. The gradient is made in the forward.

``fused_hsd_kl`` returns the loss, the statistics and, as outputs of their own, the gradients that are wanted, scaled
and in their storage dtype: the backward multiplies them by the upstream gradient. A per-token loss has an upstream
gradient per row. That can rescale finished rows of dH, but not dW, which is a sum over rows: when the head is trained
the backward runs the chunks again with the upstream gradient as weights, ``fused_hsd_kl_backward`` (6U instead of 4U).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hsd_kernels import rows as row_backends
from hsd_kernels.divergence import Divergence, RowSpec
from hsd_kernels.driver import Problem, Side, TokenWeightFn, run
from hsd_kernels.head import Head
from hsd_kernels.op_support import (
    NOTHING,
    Gradients,
    Wanted,
    checked_targets,
    finished,
    first_order_only,
    live_rows,
    register_autograd,
    savable,
    stored,
    stored_fake,
    times,
    wide_dtype,
)
from hsd_kernels.row_stats import COLUMNS
from hsd_kernels.schema import Packer, option_arguments, tensor_arguments
from hsd_kernels.upstream import times_upstream
from hsd_kernels.vocab_parallel import Shards


class Tensors(NamedTuple):
    """The operators' positional arguments: flat hidden states (T, D), heads (V, D) and (V,), per-token tensors."""

    student_hidden: Tensor
    teacher_hidden: Tensor
    reference_hidden: Tensor | None
    weight: Tensor
    bias: Tensor | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    reference_weight: Tensor | None
    reference_bias: Tensor | None
    target_ids: Tensor | None  # (T,); None in the backward
    token_weights: Tensor | None  # (T,); in the backward (2, T), of the divergence and of the reference term


@dataclass(frozen=True)
class Options:
    """Beside the fields of `Divergence`, the operators' keyword-only arguments."""

    logit_scale: float
    softcap: float | None
    linear: bool
    reference_coef: float
    filter_eps: float | None
    memory_bytes: int | None
    impl: str
    group_name: str | None
    reduction: str
    num_items: float | None
    hook: int  # `lend_hook`
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


class Outputs(NamedTuple):
    loss: Tensor  # () or (T,)
    stats: Tensor  # (len(COLUMNS), T), of student and teacher
    reference_stats: Tensor  # the same of student and reference policy; (0,) without one
    effective: Tensor  # (2, T), weights of the divergence and of the reference term, for reduction "none"; else (0,)
    filtered: Tensor  # (2,), L1 mass of dz left out by the filter, and all of it
    grad_hidden: Tensor  # (T, D), (0,) where not made
    grad_weight: Tensor  # (V, D)
    grad_bias: Tensor  # (V,)


_DIVERGENCE, _OPTIONS = Packer(Divergence), Packer(Options)
_arguments = f"{tensor_arguments(Tensors)}, *, {option_arguments(Divergence, Options)}"
_library = torch.library.Library("hsd_kernels", "DEF")
_library.define(f"fused_hsd_kl({_arguments}) -> ({tensor_arguments(Outputs)})")
_library.define(f"fused_hsd_kl_backward({_arguments}) -> ({tensor_arguments(Gradients).replace('?', '')})")

# fp16 holds 6e-5 to 65,504 with all its bits, and most of dz is smaller than 6e-5: a power of two moves it up before
# the products and leaves room for token weights, and 1 / temperature, that multiply to 1,000.
_FP16_ROOM = 64.0

# A schema has no type for a Python function: a hook is lent under a number for the length of one call.
_hooks: dict[int, TokenWeightFn] = {}
_hook_numbers = itertools.count(1)  # drawn in one step, so that threads never share one


def call(tensors: Tensors, divergence: Divergence, options: Options) -> Outputs:
    given = _DIVERGENCE.pack(divergence) | _OPTIONS.pack(options)
    return Outputs(*torch.ops.hsd_kernels.fused_hsd_kl(*tensors, **given))


@contextmanager
def lend_hook(hook: TokenWeightFn | None) -> Iterator[int]:
    """The number under which the operator finds ``hook``; 0 for none."""
    if hook is None:
        yield 0
        return
    if torch.compiler.is_compiling():
        raise RuntimeError("token_weight_fn: expected None under torch.compile, got a function; leave this call out")
    number = next(_hook_numbers)
    _hooks[number] = hook
    try:
        yield number
    finally:
        del _hooks[number]


def _forward(*tensors: Tensor, **given: Any) -> tuple[Tensor, ...]:
    t, o = Tensors(*tensors), _OPTIONS.unpack(given)
    rows, weights = live_rows(t.token_weights, t.student_hidden)
    target_ids = None
    if t.target_ids is not None:
        target_ids = checked_targets(t.target_ids, rows, t.weight.shape[0] if o.group_name is None else None)
    problem = _problem(t, _DIVERGENCE.unpack(given), o, target_ids, rows.numel())
    scale = 1.0
    if o.reduction == "mean":
        scale = 1.0 / (max(rows.numel(), 1) if o.num_items is None else o.num_items)
    # Scaled before the GEMMs rather than in a pass over dW after them.
    before = _FP16_ROOM if t.student_hidden.dtype == torch.float16 else scale
    result = run(problem, rows, weights * before, _hooks.get(o.hook), o.made)

    full = weights
    if t.token_weights is not None:
        full = torch.zeros_like(t.token_weights, dtype=weights.dtype)
        full[rows] = weights
    of_teacher, of_reference = full if result.factor is None else full * result.factor, full * problem.reference_coef
    effective = torch.stack([of_teacher, of_reference]) if o.reduction == "none" else weights.new_empty(0)
    terms = times(of_teacher, _kl(result.stats))
    reference_stats = result.stats.new_empty(0)
    if result.reference_stats is not None:
        reference_stats = result.reference_stats
        terms = terms + times(of_reference, _kl(reference_stats))
    loss = terms if o.reduction == "none" else terms.sum() * scale
    made = stored(result.gradients, t.student_hidden, scale / before)
    return (loss, result.stats, reference_stats, effective, result.filtered, *made)


def _backward(*tensors: Tensor, **given: Any) -> tuple[Tensor, ...]:
    t, o = Tensors(*tensors), _OPTIONS.unpack(given)
    assert t.token_weights is not None
    rows = (t.token_weights != 0).any(0).nonzero().squeeze(-1)
    of_teacher, of_reference = t.token_weights.unbind(0)
    weights, factor = of_teacher[rows], None
    if o.reference_coef:
        weights = of_reference[rows] / o.reference_coef
        factor = torch.where(of_reference == 0, 0.0, of_teacher / of_reference * o.reference_coef)
    problem = _problem(t, _DIVERGENCE.unpack(given), o, None, rows.numel())
    room = _FP16_ROOM if t.student_hidden.dtype == torch.float16 else 1.0
    return stored(run(problem, rows, weights * room, factor, o.wanted).gradients, t.student_hidden, 1.0 / room)


def _forward_fake(*tensors: Tensor, **given: Any) -> tuple[Tensor, ...]:
    t, o = Tensors(*tensors), _OPTIONS.unpack(given)
    tokens = t.student_hidden.shape[0]

    def empty(*shape: Any) -> Tensor:
        return t.student_hidden.new_empty(shape, dtype=wide_dtype(t.student_hidden))

    table = (len(COLUMNS), tokens)
    return (
        empty(tokens) if o.reduction == "none" else empty(),
        empty(*table),
        empty(0) if t.reference_hidden is None else empty(*table),
        empty(2, tokens) if o.reduction == "none" else empty(0),
        empty(2),
        *stored_fake(Gradients(t.student_hidden, t.weight, t.bias), o.made),
    )


def _backward_fake(*tensors: Tensor, **given: Any) -> tuple[Tensor, ...]:
    t = Tensors(*tensors)
    return stored_fake(Gradients(t.student_hidden, t.weight, t.bias), _OPTIONS.unpack(given).wanted)


_library.impl("fused_hsd_kl", _forward, "CompositeExplicitAutograd")
_library.impl("fused_hsd_kl_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("hsd_kernels::fused_hsd_kl", _forward_fake, lib=_library)
torch.library.register_fake("hsd_kernels::fused_hsd_kl_backward", _backward_fake, lib=_library)


@register_flop_formula(torch.ops.hsd_kernels.fused_hsd_kl)  # pyright: ignore
def _flops(*shapes: Any, **given: Any) -> int:
    """Of the products: 2U for both sides, U for a reference and for each of dH and dW, U = 2 N D V. A counter of FLOPs
    does not see inside an operator."""
    o = _OPTIONS.unpack({name: given[name] for name in _OPTIONS.convert})
    return _products(shapes, o.made)


@register_flop_formula(torch.ops.hsd_kernels.fused_hsd_kl_backward)  # pyright: ignore
def _backward_flops(*shapes: Any, **given: Any) -> int:
    return _products(shapes, _OPTIONS.unpack({name: given[name] for name in _OPTIONS.convert}).wanted)


def _products(shapes: Any, made: Wanted) -> int:
    t = Tensors(*shapes[: len(Tensors._fields)])
    unit: Any = 2 * math.prod(t.student_hidden) * t.weight[0]
    return int(unit * (2 + (t.reference_hidden is not None) + made.hidden + made.weight))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], given: dict[str, Any], output: tuple[Tensor, ...]) -> None:
    t, out, o = Tensors(*inputs), Outputs(*output), _OPTIONS.unpack(given)
    ctx.mark_non_differentiable(*out._replace(loss=out.stats))
    ctx.set_materialize_grads(False)
    ctx.given, ctx.options, ctx.dtype = given, o, t.student_hidden.dtype
    # Through autograd, so that an in-place change before the backward is an error, not a wrong gradient.
    if o.reruns:
        ctx.save_for_backward(*map(savable, t._replace(target_ids=None, token_weights=out.effective)))
    else:
        effective = out.effective if o.reduction == "none" else None
        ctx.save_for_backward(out.grad_hidden, out.grad_weight, out.grad_bias, effective)


@first_order_only("fused_hsd_kl")
def _autograd(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
    found = Gradients(None, None, None)
    if upstream is not None and ctx.options.reruns:
        t = Tensors(*ctx.saved_tensors)
        assert t.token_weights is not None
        weights = t.token_weights * _of_counted(upstream, t.token_weights)
        op = torch.ops.hsd_kernels.fused_hsd_kl_backward
        made = Gradients(*op(*t._replace(token_weights=weights), **ctx.given))
        found = finished(made, ctx.options.wanted, lambda g: g.to(ctx.dtype))
    elif upstream is not None:
        *made, effective = ctx.saved_tensors
        upstream = upstream if effective is None else _of_counted(upstream, effective)
        found = finished(Gradients(*made), ctx.options.wanted, lambda g: times_upstream(g, upstream, ctx.dtype))
    grads: dict[str, Any] = dict.fromkeys(Tensors._fields)
    grads |= {"student_hidden": found.hidden, "weight": found.weight, "bias": found.bias}
    return tuple(grads.values())


register_autograd(_library, "fused_hsd_kl", _setup_context, _autograd)


def _of_counted(upstream: Tensor, weights: Tensor) -> Tensor:
    """A NaN upstream of a dropped row, also one that the hook dropped, reaches nothing."""
    return upstream.masked_fill((weights == 0).all(0), 0.0)


def _problem(t: Tensors, divergence: Divergence, o: Options, target_ids: Tensor | None, live: int) -> Problem:
    def head(weight: Tensor, bias: Tensor | None) -> Head:
        return Head(weight, bias, o.logit_scale, o.softcap)

    own = head(t.weight, t.bias)
    teacher_head = own if t.teacher_weight is None else _known(head(t.teacher_weight, t.teacher_bias), own)
    reference = None
    if t.reference_hidden is not None:
        reference_head = own
        if t.reference_weight is not None:
            reference_head = _known(head(t.reference_weight, t.reference_bias), own, teacher_head)
        reference = Side(t.reference_hidden, reference_head, RowSpec.of(Divergence("reverse_kl"), reference_head))
    shards = None
    if o.group_name is not None:
        group = torch.distributed.distributed_c10d._resolve_process_group(o.group_name)  # pyright: ignore
        shards = Shards.meet(group, t.weight, live)
    return Problem(
        student_hidden=t.student_hidden,
        head=own,
        teacher=Side(t.teacher_hidden, teacher_head, RowSpec.of(divergence, own, o.linear)),
        reference=reference,
        reference_coef=o.reference_coef,
        rows_impl=row_backends.resolve(o.impl, t.student_hidden.device, t.student_hidden.dtype),
        target_ids=target_ids,
        filter_eps=o.filter_eps,
        memory_bytes=o.memory_bytes,
        shards=shards,
    )


def _known(head: Head, *known: Head) -> Head:
    """One of ``known`` if it lies in the same memory: sides with one head share one GEMM."""

    def place(t: Tensor | None) -> Any:
        return None if t is None else (t.data_ptr(), t.shape, t.stride())

    for other in known:
        if (place(other.weight), place(other.bias)) == (place(head.weight), place(head.bias)):
            return other
    return head


def _kl(table: Tensor) -> Tensor:
    return table[COLUMNS.index("kl")]
