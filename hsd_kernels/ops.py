"""The operators behind `fused_hsd_kl` and what they compute. A per-token loss of a trained head is 6U instead of 4U,
U = 2 N D V: its backward runs the chunks again (`hsd_kernels.registration`)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hsd_kernels import rows as row_backends
from hsd_kernels.divergence import Divergence, RowSpec
from hsd_kernels.driver import Problem, Side, TokenWeightFn, run
from hsd_kernels.head import Head
from hsd_kernels.op_support import checked_targets, live_rows, stored, times
from hsd_kernels.registration import Trained, register
from hsd_kernels.row_stats import COLUMNS
from hsd_kernels.schema import Packer
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
class Options(Trained):
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
    hook: int  # `numbered`
    train_hidden: bool
    train_weight: bool
    train_bias: bool


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

# fp16 holds 6e-5 to 65,504 with all its bits, and most of dz is smaller than 6e-5: a power of two moves it up before
# the products and leaves room for token weights, and 1 / temperature, that multiply to 1,000.
_FP16_ROOM = 64.0

# A schema has no type for a Python function: a hook has a number for the length of one call.
_hooks: dict[int, TokenWeightFn] = {}
_hook_numbers = itertools.count(1)  # drawn in one step, so that threads never share one


def call(tensors: Tensors, divergence: Divergence, options: Options) -> Outputs:
    given = _DIVERGENCE.pack(divergence) | _OPTIONS.pack(options)
    return Outputs(*torch.ops.hsd_kernels.fused_hsd_kl(*tensors, **given))


@contextmanager
def numbered(hook: TokenWeightFn | None) -> Iterator[int]:
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
    scale = o.scale(rows.numel())
    # Scaled before the GEMMs rather than in a pass over dW after them.
    before = _FP16_ROOM if t.student_hidden.dtype == torch.float16 else scale
    ones = t.token_weights is None and not o.hook
    result = run(problem, rows, weights * before if before != 1.0 else weights, _hooks.get(o.hook), o.made)
    stats = result.stats
    assert stats is not None
    effective = weights.new_empty(0)
    if ones and o.reduction != "none" and result.reference_stats is None:  # the same in fewer calls
        terms = _kl(stats)
        of_reference = None
    else:
        full = weights
        if t.token_weights is not None:
            full = torch.zeros_like(t.token_weights, dtype=weights.dtype)
            full[rows] = weights
        of_teacher, of_reference = full if result.factor is None else full * result.factor, full * o.reference_coef
        effective = torch.stack([of_teacher, of_reference]) if o.reduction == "none" else effective
        terms = times(of_teacher, _kl(stats))
    reference_stats = stats.new_empty(0)
    if result.reference_stats is not None and of_reference is not None:
        reference_stats = result.reference_stats
        terms = terms + times(of_reference, _kl(reference_stats))
    loss = terms if o.reduction == "none" else terms.sum() * scale
    made = stored(result.gradients, t.student_hidden, scale / before)
    return (loss, stats, reference_stats, effective, result.filtered, *made)


def _backward(*tensors: Tensor, **given: Any) -> tuple[Tensor, ...]:
    t, o = Tensors(*tensors), _OPTIONS.unpack(given)
    assert t.token_weights is not None
    rows = (t.token_weights != 0).any(0).nonzero().squeeze(-1)
    of_teacher, of_reference = t.token_weights.unbind(0)
    weights, factor = of_teacher[rows], None
    problem = _problem(t, _DIVERGENCE.unpack(given), o, None, rows.numel())
    if o.reference_coef:
        weights, factor = torch.ones_like(weights), of_teacher
        problem = replace(problem, reference_coef=of_reference)
    room = _FP16_ROOM if t.student_hidden.dtype == torch.float16 else 1.0
    return stored(run(problem, rows, weights * room, factor, o.wanted).gradients, t.student_hidden, 1.0 / room)


def _fake(t: Tensors, o: Options, empty: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    tokens = t.student_hidden.shape[0]
    table = (len(COLUMNS), tokens)
    return (
        empty(tokens) if o.reduction == "none" else empty(),
        empty(*table),
        empty(0) if t.reference_hidden is None else empty(*table),
        empty(2, tokens) if o.reduction == "none" else empty(0),
        empty(2),
    )


register(
    "fused_hsd_kl",
    Tensors,
    (Divergence, Options),
    Outputs,
    hidden="student_hidden",
    forward=_forward,
    backward=_backward,
    fake=_fake,
    again=lambda t, out: t._replace(target_ids=None, token_weights=out.effective),
    sides=lambda t: 2 + (t.reference_hidden is not None),
)


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
        shards = Shards.agreed(group, t.weight, live)
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
