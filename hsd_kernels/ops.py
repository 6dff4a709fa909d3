"""The two custom operators behind `fused_hsd_kl`: schema, fake, autograd. The gradient is made in the forward.

``fused_hsd_kl`` returns the loss, the statistics and, as outputs of their own, the gradients that are wanted, scaled
and in their storage dtype: the backward multiplies them by the upstream gradient. A per-token loss has an upstream
gradient per row. That can rescale finished rows of dH, but not dW, which is a sum over rows: when the head is trained
the backward runs the chunks again with the upstream gradient as weights, ``fused_hsd_kl_backward`` (6U instead of 4U).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hsd_kernels import rows as row_backends
from hsd_kernels.divergence import RowSpec
from hsd_kernels.driver import STATS, Head, Problem, Result, Side, TokenWeightFn, Wanted, run
from hsd_kernels.vocab_parallel import Shards

# A schema has no type for a Python function: a hook is lent under a number for the length of one call.
_hooks: dict[int, TokenWeightFn] = {}
_hook_numbers = itertools.count(1)  # drawn in one step, so that threads never share one
_OPTIONS = (
    "str divergence, float beta, float temperature, float? kl_clip, str kl_clip_form, float logit_scale, "
    "float? softcap, bool linear, float reference_coef, float? filter_eps, int? chunk_bytes, str impl, str? group_name"
)
_TENSORS = (
    "Tensor student_hidden, Tensor teacher_hidden, Tensor? reference_hidden, Tensor weight, Tensor? bias, "
    "Tensor? teacher_weight, Tensor? teacher_bias, Tensor? reference_weight, Tensor? reference_bias"
)
_library = torch.library.Library("hsd_kernels", "DEF")
_library.define(
    f"fused_hsd_kl({_TENSORS}, Tensor? target_ids, Tensor? token_weights, {_OPTIONS}, str reduction, "
    "float? num_items, int hook, bool[] wanted) -> "
    # loss () or (T,); statistics (len(STATS), T); effective weights (2, T) of the divergence and of the reference
    # term; L1 mass of dz left out by the filter, and all of it (2,); dH (T, D); dW (V, D); db (V,)
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    f"fused_hsd_kl_backward({_TENSORS}, Tensor upstream, Tensor weights, {_OPTIONS}, bool[] wanted) -> "
    "(Tensor, Tensor, Tensor)"
)
_NUM_TENSORS = _TENSORS.count("Tensor")
_NUM_OPTIONS = _OPTIONS.count(",") + 1


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


def _forward(*args: Any) -> tuple[Tensor, ...]:
    tensors, (target_ids, token_weights), options, rest = _parts(args)
    reduction, num_items, hook, wanted = rest
    student = tensors[0]
    tokens = student.shape[0]
    rows, weights = _live_rows(token_weights, tokens, student)
    if target_ids is not None:
        target_ids = _checked_targets(target_ids, rows, tensors[3], options[-1])
    problem = _problem(tensors, options, target_ids, rows.numel())
    made = Wanted(*wanted) if not _reruns(reduction, wanted) else Wanted(False, False, False)
    scale = 1.0
    if reduction == "mean":
        scale = 1.0 / (max(rows.numel(), 1) if num_items is None else num_items)
    # Scaled before the GEMMs rather than in a pass over dW after them; fp16 has no room for so small a dz.
    before = 1.0 if student.dtype == torch.float16 else scale
    result = run(problem, rows, weights * before, _hooks.get(hook), made)

    full = torch.zeros_like(result.factor)
    full[rows] = weights
    effective = torch.stack([full * result.factor, full * problem.reference_coef])
    kl, reference_kl = (result.stats[STATS.index(name)] for name in ("kl", "reference_kl"))
    terms = _times(effective[0], kl)
    if problem.reference is not None:
        terms = terms + _times(effective[1], reference_kl)
    loss = terms if reduction == "none" else terms.sum() * scale
    grads = _stored(result, tensors, scale / before, wanted)
    return loss, result.stats, effective, result.filtered, *grads


def _backward(*args: Any) -> tuple[Tensor, ...]:
    tensors, (upstream, weights), options, (wanted,) = _parts(args)
    # A NaN upstream of a dropped row, also one that the hook dropped, reaches nothing.
    weights = weights * upstream.masked_fill((weights == 0).all(0), 0.0)
    rows = (weights != 0).any(0).nonzero().squeeze(-1)
    reference_coef = options[_option("reference_coef")]
    token_weights, factor = weights[0, rows], None
    if reference_coef:
        token_weights = weights[1, rows] / reference_coef
        factor = torch.where(weights[1] == 0, 0.0, weights[0] / weights[1] * reference_coef)
    problem = _problem(tensors, options, None, rows.numel())
    return _stored(run(problem, rows, token_weights, factor, Wanted(*wanted)), tensors, 1.0, wanted)


def _forward_fake(*args: Any) -> tuple[Tensor, ...]:
    tensors, _, _, (reduction, _, _, wanted) = _parts(args)
    student = tensors[0]
    tokens = student.shape[0]
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32

    def empty(*shape: Any) -> Tensor:
        return student.new_empty(shape, dtype=wide)

    loss = empty(tokens) if reduction == "none" else empty()
    made = (False, False, False) if _reruns(reduction, wanted) else wanted
    return loss, empty(len(STATS), tokens), empty(2, tokens), empty(2), *_grads_fake(tensors, made)


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    tensors, _, _, (wanted,) = _parts(args)
    return _grads_fake(tensors, wanted)


def _grads_fake(tensors: Any, made: Any) -> tuple[Tensor, ...]:
    kinds = (tensors[0], tensors[3], tensors[4])
    return tuple(
        like.new_empty(like.shape, dtype=_storage_dtype(like)) if make else tensors[0].new_empty(0)
        for like, make in zip(kinds, made, strict=True)
    )


_library.impl("fused_hsd_kl", _forward, "CompositeExplicitAutograd")
_library.impl("fused_hsd_kl_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("hsd_kernels::fused_hsd_kl", _forward_fake, lib=_library)
torch.library.register_fake("hsd_kernels::fused_hsd_kl_backward", _backward_fake, lib=_library)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, _, options, (reduction, _, _, wanted) = _parts(inputs)
    _, stats, effective, filtered, *grads = output
    ctx.mark_non_differentiable(stats, effective, filtered, *grads)
    ctx.set_materialize_grads(False)
    ctx.rerun, ctx.per_token, ctx.wanted = _reruns(reduction, wanted), reduction == "none", wanted
    ctx.options, ctx.dtype = options, tensors[0].dtype
    # Through autograd, so that an in-place change before the backward is an error, not a wrong gradient.
    saved = tensors if ctx.rerun else grads
    ctx.save_for_backward(*saved, effective if ctx.per_token else None)


@once_differentiable
def _autograd(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
    found: tuple[Any, ...] = (None, None, None)
    *saved, effective = ctx.saved_tensors
    if upstream is not None and ctx.rerun:
        op = torch.ops.hsd_kernels.fused_hsd_kl_backward
        found = op(*saved, upstream, effective, *ctx.options, ctx.wanted)
        found = tuple(g.to(ctx.dtype) if want else None for g, want in zip(found, ctx.wanted, strict=True))
    elif upstream is not None:
        if ctx.per_token:
            upstream = upstream.masked_fill((effective == 0).all(0), 0.0)
        found = tuple(
            _times_upstream(g, upstream, ctx.dtype) if want else None for g, want in zip(saved, ctx.wanted, strict=True)
        )
    hidden, weight, bias = found
    grads = [None] * (_NUM_TENSORS + 2 + _NUM_OPTIONS + 4)
    grads[0], grads[3], grads[4] = hidden, weight, bias
    return tuple(grads)


torch.library.register_autograd("hsd_kernels::fused_hsd_kl", _autograd, setup_context=_setup_context, lib=_library)


def _parts(args: tuple[Any, ...]) -> tuple[Any, Any, Any, Any]:
    """(tensors, the two per-token tensors, options, the rest) of an operator's arguments."""
    options = _NUM_TENSORS + 2
    rest = options + _NUM_OPTIONS
    return args[:_NUM_TENSORS], args[_NUM_TENSORS:options], args[options:rest], args[rest:]


def _option(name: str) -> int:
    return [o.split()[-1] for o in _OPTIONS.split(",")].index(name)


def _reruns(reduction: str, wanted: list[bool]) -> bool:
    return reduction == "none" and (wanted[1] or wanted[2])


def _problem(tensors: Any, options: Any, target_ids: Tensor | None, live: int) -> Problem:
    student, teacher, reference, weight, bias, teacher_weight, teacher_bias, ref_weight, ref_bias = tensors
    divergence, beta, temperature, kl_clip, kl_clip_form, logit_scale, softcap, linear, *rest = options
    reference_coef, filter_eps, chunk_bytes, impl, group = rest
    head = Head(weight, bias)
    form = {"logit_scale": logit_scale, "softcap": softcap}
    clip = {"kl_clip": kl_clip, "kl_clip_form": kl_clip_form}
    spec = RowSpec.resolve(divergence, beta, temperature=temperature, linear=linear, **clip, **form)
    teacher_head = head if teacher_weight is None else _head(teacher_weight, teacher_bias, head)
    ref_head = head if ref_weight is None else _head(ref_weight, ref_bias, head, teacher_head)
    shards = None
    if group is not None:
        shards = Shards.meet(torch.distributed.distributed_c10d._resolve_process_group(group), weight, live)  # pyright: ignore[reportPrivateImportUsage]
    return Problem(
        student_hidden=student,
        head=head,
        teacher=Side(teacher, teacher_head, spec),
        reference=None if reference is None else Side(reference, ref_head, RowSpec("reverse_kl", **form)),
        reference_coef=reference_coef,
        rows_impl=row_backends.resolve(impl, student.device, student.dtype),
        target_ids=target_ids,
        filter_eps=filter_eps,
        chunk_bytes=chunk_bytes,
        shards=shards,
    )


def _head(weight: Tensor, bias: Tensor | None, *known: Head) -> Head:
    """One of ``known`` if it lies in the same memory: sides with one head share one GEMM."""

    def place(t: Tensor | None) -> Any:
        return None if t is None else (t.data_ptr(), t.shape, t.stride())

    for head in known:
        if (place(head.weight), place(head.bias)) == (place(weight), place(bias)):
            return head
    return Head(weight, bias)


def _times(weights: Tensor, kl: Tensor) -> Tensor:
    """A token that the hook gave weight 0 counts 0, also where its divergence is infinite or NaN."""
    return torch.where(weights == 0, 0.0, weights * kl)


def _live_rows(token_weights: Tensor | None, tokens: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Positions and weights of the tokens that count. One host synchronization if weights are given."""
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    if token_weights is None:
        return torch.arange(tokens, device=like.device), torch.ones(tokens, device=like.device, dtype=wide)
    w = token_weights.to(wide)
    live, bad = torch.stack([w.count_nonzero(), (~w.isfinite()).count_nonzero()]).tolist()
    if bad:
        raise ValueError(f"token_weights: expected finite numbers, got {bad} that are NaN or infinite")
    rows = torch.nonzero_static(w, size=live).squeeze(-1)
    return rows, w[rows]


def _checked_targets(ids: Tensor, rows: Tensor, weight: Tensor, group: str | None) -> Tensor:
    live = ids[rows]
    vocab = weight.shape[0]
    # On CUDA this would synchronize: there the log-probs of an id out of range are NaN. So they are over a group.
    checked = not ids.is_cuda and group is None and live.numel()
    if checked and not (0 <= int(live.min()) and int(live.max()) < vocab):
        raise ValueError(f"target_ids: expected values in [0, {vocab}), got {int(live.min())} to {int(live.max())}")
    return ids.long()


def _stored(result: Result, tensors: Any, scale: float, wanted: list[bool]) -> tuple[Tensor, ...]:
    """The gradients times ``scale`` in their storage dtype, empty where not made."""
    found = (result.grad_hidden, result.grad_weight, result.grad_bias)
    kinds = (tensors[0], tensors[3], tensors[4])
    return tuple(
        tensors[0].new_empty(0) if g is None else (g if scale == 1.0 else g.mul_(scale)).to(_storage_dtype(like))
        for g, like in zip(found, kinds, strict=True)
    )


def _storage_dtype(like: Tensor) -> torch.dtype:
    """fp16 gradients wait for the upstream gradient, often a loss scale of 65,536, in fp32."""
    return torch.float32 if like.dtype == torch.float16 else like.dtype


def _times_upstream(g: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """g (R, ...) times a scalar or (R,) in the precision of ``grad``, rounded once: an upstream gradient rounded to
    bf16 would be off by up to 0.2 % in every entry alike."""
    # Also by 1: the saved tensor itself would become a leaf's .grad, and the next accumulation would change it.
    if g.device.type == "cpu" and grad.numel() == 1 and type(g) is Tensor:  # not one that a compiler traces
        # A number multiplies bf16 in fp32, without fp32 copies of the whole: 161 -> 34 ms for (49,152, 576), one core.
        return torch.mul(g, grad.item()).to(dtype)
    grad = grad.reshape(-1, *(1,) * (g.dim() - 1))
    return torch.mul(g, grad, out=torch.empty_like(g, dtype=dtype))
