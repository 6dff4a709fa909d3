"""The chunk loop: stacked GEMM, row pass, backward GEMMs. Device-agnostic; the rows come from a backend module.

Per chunk of token rows: logits of all sides into one reused workspace (one GEMM of ``[h_s ; h_t]`` for those that share
a head), then statistics and the gradient dz of the student's logits. dz gathers in a buffer of several chunks, and once
per buffer ``dH = dz W`` and ``dW += dz^T h_s``. With N rows, hidden D, vocabulary V and U = 2 N D V that is 4U FLOPs in
all for forward and backward, 5U with a reference policy, and no (N, V) tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from hsd_kernels import gemm, memory
from hsd_kernels import rows as row_backends
from hsd_kernels.divergence import RowSpec
from hsd_kernels.head import Head
from hsd_kernels.op_support import Gradients, Wanted, in_dtype, rows_of, wide_dtype, without_autocast
from hsd_kernels.row_stats import COLUMNS, RowStats
from hsd_kernels.vocab_filter import active_columns, take_columns_
from hsd_kernels.vocab_parallel import Shards

TokenWeightFn = Callable[[RowStats], Tensor]


@dataclass(frozen=True)
class Side:
    """A frozen policy: what it reads, through which head, what its divergence counts."""

    hidden: Tensor  # (T, D)
    head: Head  # the student's own object where it is shared
    spec: RowSpec


@dataclass(frozen=True)
class Problem:
    """Validated, flat inputs: hidden states are (T, D), per-token tensors (T,), everything detached."""

    student_hidden: Tensor
    head: Head
    teacher: Side
    rows_impl: ModuleType
    reference: Side | None = None
    reference_coef: float | Tensor = 0.0  # or (T,)
    target_ids: Tensor | None = None
    filter_eps: float | None = None
    memory_bytes: int | None = None
    shards: Shards | None = None  # of the vocabulary, over a process group

    @property
    def tokens(self) -> int:
        return self.student_hidden.shape[0]

    @property
    def wide(self) -> torch.dtype:
        return wide_dtype(self.student_hidden)

    @property
    def logits_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.teacher.spec.linear else self.wide


@dataclass
class Result:
    """Sums over rows of weight * (factor * divergence + coef * reference KL) and its gradients; gradients not wanted
    are None. ``filtered`` (2,) is the L1 mass of dz that the filter left out, and all of it."""

    factor: Tensor | None  # (T,) what the hook returned, None without one
    grad_weight: Tensor | None
    grad_bias: Tensor | None
    filtered: Tensor
    stats: Tensor | None = None  # (len(COLUMNS), T), zero in rows that were dropped
    reference_stats: Tensor | None = None  # the same, with the reference policy for the teacher
    grad_hidden: Tensor | None = None

    @property
    def gradients(self) -> Gradients:
        return Gradients(self.grad_hidden, self.grad_weight, self.grad_bias)


def run(
    problem: Problem,
    rows: Tensor,
    weights: Tensor,
    factor: TokenWeightFn | Tensor | None,
    wanted: Wanted,
) -> Result:
    """Statistics of the token positions ``rows`` (R,) and gradients of the weighted sum over them.

    ``weights`` is (R,); ``factor``, a hook or the (T,) values that one returned earlier, multiplies the divergence from
    the teacher and not the reference term. Rows left out are never read: a NaN there does not propagate.
    """
    with without_autocast(problem.student_hidden.device):
        return _run(problem, rows, weights, factor, wanted)


@dataclass(frozen=True)
class _Workspace:
    logits: Tensor  # (sides * chunk, V)
    dz: Tensor | None  # (buffer, V), None without a gradient
    wide_dz: Tensor | None  # (chunk, V) in fp32 for the gradient of a bias, None without one or where dz is in fp32
    reference_dz: Tensor | None  # (chunk, V), None without a gradient of a reference term


@dataclass(frozen=True)
class _Buffer:
    """B token rows whose dz is in memory at the same time."""

    at: slice | Tensor  # their positions
    rows: Tensor  # (B,), the same as numbers
    hidden: list[Tensor]  # (B, D) of each side
    weights: Tensor  # (B,)
    equal: list[Tensor]  # (B,) bool, of the teacher and of the reference: `_equal`
    target_ids: Tensor | None  # (B,), within the vocabulary
    strange: Tensor | None  # (B,) bool, where that is not what was given


def _run(p: Problem, rows: Tensor, weights: Tensor, factor: TokenWeightFn | Tensor | None, wanted: Wanted) -> Result:
    sides = [Side(p.student_hidden, p.head, p.teacher.spec), p.teacher, *([p.reference] if p.reference else [])]
    size = _sizes(p, len(sides), rows.numel(), wanted)
    out = _empty_result(p, wanted, factor is not None, rows.numel(), size)
    if rows.numel() == 0:
        return _filled_with_zeros(p, out, wanted)
    narrow = gemm.gradient_dtype(p.student_hidden, p.wide)
    term = p.wide if wanted.bias else narrow
    buffer_rows, chunk_rows = (size.buffer, size.chunk) if any(wanted) else (0, 0)
    tables = [(len(sides) * size.chunk, p.logits_dtype), (buffer_rows, narrow)]
    tables += [(chunk_rows if term != narrow else 0, term), (chunk_rows if p.reference else 0, term)]
    vocab = p.head.weight.shape[0]
    with memory.borrowed(tables, vocab, size.stride, p.student_hidden.device) as (logits, dz, wide_dz, reference_dz):
        assert logits is not None
        space = _Workspace(logits, dz, wide_dz, reference_dz)
        for start in range(0, rows.numel(), size.buffer):
            buffer = _buffer(p, sides, rows, weights, slice(start, start + size.buffer))
            magnitudes = [
                _chunk(p, sides, buffer, factor, out, space, slice(first, first + size.chunk))
                for first in range(0, buffer.rows.numel(), size.chunk)
            ]
            if dz is not None:
                h_s = buffer.hidden[0]
                largest = None if p.filter_eps is None and factor is None else torch.cat(magnitudes)
                if factor is not None:  # dW = dz^T h: 0 times the NaN of a row that the hook dropped would be NaN
                    assert largest is not None
                    h_s = h_s.masked_fill((largest == 0).unsqueeze(-1), 0.0)
                used = rows_of(dz, slice(0, len(h_s)))
                _backward_gemms(p, used, h_s, buffer.at, out, wanted, largest, first=start == 0, spare=logits)
    if callable(factor):
        assert out.factor is not None
        bad = int((~out.factor[rows].isfinite()).count_nonzero())
        if bad:
            raise ValueError(f"token_weight_fn: expected finite numbers, got {bad} that are NaN or infinite")
    if p.shards is not None:
        p.shards.sum_(out.filtered)
        if out.grad_hidden is not None:
            p.shards.sum_(out.grad_hidden)
    return out


def _buffer(p: Problem, sides: list[Side], rows: Tensor, weights: Tensor, here: slice) -> _Buffer:
    at = here if rows.numel() == p.tokens else rows[here]  # all tokens: views instead of copies
    hidden = [side.hidden[at] if isinstance(at, Tensor) else rows_of(side.hidden, at) for side in sides]
    equal = [_equal(p, side, hidden[0], h) for side, h in zip(sides[1:], hidden[1:], strict=True)]
    target_ids = strange = None
    if p.target_ids is not None:
        given = p.target_ids[at] if p.shards is None else p.target_ids[at] - p.shards.start
        target_ids = given.clamp(0, p.head.weight.shape[0] - 1)
        strange = given != target_ids
    weights = in_dtype(rows_of(weights, here), p.wide)
    return _Buffer(at, rows_of(rows, here), hidden, weights, equal, target_ids, strange)


def _chunk(
    p: Problem,
    sides: list[Side],
    b: _Buffer,
    factor: TokenWeightFn | Tensor | None,
    out: Result,
    space: _Workspace,
    here: slice,
) -> Tensor:
    """Statistics of the rows ``here`` (n,) of a buffer, and their dz if there is a gradient. Returns the largest
    magnitude of their weights in any term, (n,): where it is 0, dz is."""
    hidden = [rows_of(h, here) for h in b.hidden]
    student = hidden[0] - hidden[1] if p.teacher.spec.linear else hidden[0]
    x = _logits(sides, [student, *hidden[1:]], space.logits)
    n = len(student)
    narrow_dz = None if space.dz is None else rows_of(space.dz, slice(here.start, here.start + n))
    dz = narrow_dz if space.wide_dz is None else rows_of(space.wide_dz, slice(0, n))
    at = slice(b.at.start + here.start, b.at.start + here.start + n) if isinstance(b.at, slice) else b.at[here]

    weights, equal = rows_of(b.weights, here), rows_of(b.equal[0], here)
    if callable(factor):
        assert out.factor is not None
        stats = _statistics(p, p.teacher, b, here, x[0], x[1], equal, None, None)
        table = stats.stack()  # before the hook, which may write on what it is shown
        out.factor[at] = _hook_weights(factor, stats._replace(rows=stats.rows.clone()))
        ready = (weights * out.factor[at]).masked_fill(equal, 0.0)
        if dz is not None:
            stats = RowStats.unstack(table, stats.rows, with_targets=b.target_ids is not None)
            given = (x[0], x[1], p.teacher.spec, p.head.bias, p.teacher.head.bias, stats, ready, dz)
            row_backends.passes(p.rows_impl, x[0].shape[1], p.teacher.spec).gradient_(*given)
    else:
        if factor is not None:
            assert out.factor is not None
            out.factor[at] = factor[at]
            weights = weights * factor[at]
        ready = weights.masked_fill(equal, 0.0)
        table = _statistics(p, p.teacher, b, here, x[0], x[1], equal, ready, dz).stack()
    out.stats = _placed(out.stats, at, table, p.tokens, 1)
    largest = ready if p.filter_eps is None and factor is None else ready.abs()
    if p.reference is not None:
        equal = rows_of(b.equal[1], here)
        coef = p.reference_coef[at] if isinstance(p.reference_coef, Tensor) else p.reference_coef
        ready = (rows_of(b.weights, here) * coef).masked_fill(equal, 0.0)
        part = None if space.reference_dz is None else rows_of(space.reference_dz, slice(0, n))
        stats = _statistics(p, p.reference, b, here, x[0], x[2], equal, ready, part)
        out.reference_stats = _placed(out.reference_stats, at, stats.stack(), p.tokens, 1)
        largest = torch.maximum(largest, ready.abs())
        if dz is not None and part is not None:
            dz += part
    if out.grad_bias is not None and dz is not None:
        out.grad_bias += dz.sum(0, dtype=p.wide)
    if narrow_dz is not None and dz is not None and narrow_dz is not dz:
        narrow_dz.copy_(dz)
    return largest


def _equal(p: Problem, side: Side, h_s: Tensor, h_side: Tensor) -> Tensor:
    """(n,) bool: rows in which both sides read the same through one head. A GEMM may sum the same row in another order
    at another position (MKL: D = 13), leaving 1e-7 of noise where the answer is 0. inf - inf is not 0: such a row keeps
    its NaN."""
    if side.head is not p.head:
        return torch.zeros(h_s.shape[0], dtype=torch.bool, device=h_s.device)
    return (h_s - h_side).eq(0).all(-1)


def _logits(sides: list[Side], hidden: list[Tensor], workspace: Tensor) -> list[Tensor]:
    """Raw head outputs (n, V) of every side, views of the workspace; sides with one head share one GEMM."""
    n = hidden[0].shape[0]
    heads = list({id(side.head): side.head for side in sides}.values())
    x: list[Tensor] = [workspace] * len(sides)
    start = 0
    for head in heads:
        members = [i for i, side in enumerate(sides) if side.head is head]
        stop = start + n * len(members)
        stacked = hidden[members[0]] if len(members) == 1 else torch.cat([hidden[i] for i in members])
        place = rows_of(workspace, slice(start, stop))
        gemm.project_out(stacked, head.weight, place)
        for i, part in zip(members, place.split(n), strict=True):
            x[i] = part
        start = stop
    return x


def _statistics(
    p: Problem,
    side: Side,
    b: _Buffer,
    here: slice,
    x_s: Tensor,
    x_side: Tensor,
    equal: Tensor,
    weights: Tensor | None,
    dz: Tensor | None,
) -> RowStats:
    """Row statistics between the student and ``side``. With ``weights`` and ``dz``, also ``weights`` times the
    gradient, into ``dz``: in one read of the logits where the backend has one."""
    biases = (p.head.bias, side.head.bias)
    given = (x_s, x_side, side.spec, *biases)
    target_ids = None if b.target_ids is None else rows_of(b.target_ids, here)
    rows = rows_of(b.rows, here)
    whole = weights is not None and dz is not None and p.shards is None
    passes = row_backends.passes(p.rows_impl, x_s.shape[1], side.spec)
    both = row_backends.both_in_one_read(passes, x_s, side.spec) if whole else None
    if both is not None:
        stats = both(*given, target_ids, rows, weights, dz)
    else:
        stats = passes.statistics(*given, target_ids, rows)
    if b.strange is not None:
        strange = b.strange[here]
        student_logps, teacher_logps = stats.student_logps, stats.teacher_logps
        assert student_logps is not None and teacher_logps is not None
        if p.shards is not None:  # a part without mass has no log-probs of its own; in the whole row they are -inf
            student_logps = student_logps.masked_fill(stats.student_lse == -torch.inf, -torch.inf)
            teacher_logps = teacher_logps.masked_fill(stats.teacher_lse == -torch.inf, -torch.inf)
        stats = stats._replace(
            student_logps=student_logps.masked_fill(strange, float("nan")),
            teacher_logps=teacher_logps.masked_fill(strange, float("nan")),
        )
    if p.shards is not None:
        stats = p.shards.merge(stats, side.spec, x_s, x_side, *biases)
    if side.spec.divergence.is_nonnegative:
        stats = stats._replace(kl=stats.kl.clamp_min(0.0))  # rounding; a NaN stays
    stats = stats._replace(kl=stats.kl.masked_fill(equal, 0.0))
    if weights is not None and dz is not None and both is None:
        passes.gradient_(*given, stats, weights, dz)
    return stats


def _backward_gemms(
    p: Problem,
    dz: Tensor,
    h_s: Tensor,
    at: slice | Tensor,
    out: Result,
    wanted: Wanted,
    largest: Tensor | None,
    first: bool,
    spare: Tensor,
) -> None:
    """``spare`` may be overwritten, as dz may."""
    weight, columns = p.head.weight, None
    if p.filter_eps is not None:
        assert largest is not None
        active = active_columns(dz, p.filter_eps, largest.amax(), p.student_hidden.dtype)
        out.filtered += torch.stack([active.dropped, active.total]).to(out.filtered)
        columns = active.columns
    shape = weight.shape
    if columns is not None:
        dz, shape = take_columns_(dz, columns), (columns.numel(), weight.shape[1])
    if wanted.hidden:
        if columns is not None:
            weight = torch.index_select(weight, 0, columns, out=_within(spare, shape, weight.dtype))
        out.grad_hidden = _placed(out.grad_hidden, at, gemm.backproject(dz, weight, _hidden_dtype(p)), p.tokens, 0)
    if out.grad_weight is None:
        return
    if columns is None:
        gemm.accumulate_(out.grad_weight, dz, h_s, first)
        return
    part = _within(spare, shape, out.grad_weight.dtype)
    gemm.accumulate_(part, dz, h_s, first=True)
    if first:
        out.grad_weight.zero_()
    out.grad_weight.index_add_(0, columns, part)


def _placed(held: Tensor | None, at: slice | Tensor, value: Tensor, tokens: int, axis: int) -> Tensor:
    """``held`` with ``value`` at the token positions ``at`` of ``axis``; ``value`` itself where that is all of them."""
    if value.shape[axis] == tokens:
        return value
    if held is None:
        held = value.new_zeros([tokens if i == axis else n for i, n in enumerate(value.shape)])
    held[(slice(None),) * axis + (at,)] = value
    return held


def _within(spare: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An empty tensor, over ``spare`` where it fits: fresh pages cost more than a gather into them."""
    size = math.prod(shape) * dtype.itemsize
    start = -spare.storage_offset() * spare.itemsize % dtype.itemsize
    if start + size > spare.shape[0] * spare.stride(0) * spare.itemsize:
        return spare.new_empty(shape, dtype=dtype)
    whole = spare.as_strided((spare.shape[0] * spare.stride(0),), (1,))
    return whole.view(torch.uint8)[start : start + size].view(dtype).view(shape)


def _empty_result(p: Problem, wanted: Wanted, has_factor: bool, rows: int, size: memory.Sizes) -> Result:
    weight, like = p.head.weight, p.student_hidden
    head = like.dtype if size.buffer >= rows and gemm.sums_narrow(weight) else p.wide
    return Result(
        factor=like.new_ones(p.tokens, dtype=p.wide) if has_factor else None,
        grad_weight=like.new_empty(weight.shape, dtype=head) if wanted.weight else None,
        grad_bias=like.new_zeros(weight.shape[0], dtype=p.wide) if wanted.bias else None,
        filtered=like.new_zeros(2, dtype=p.wide),
    )


def _hidden_dtype(p: Problem) -> torch.dtype:
    """fp16 has no room for a gradient that is yet to be divided by the token count and multiplied by a loss scale; the
    parts of a vocabulary's shards are summed before they are rounded."""
    wide = p.student_hidden.dtype == torch.float16 or p.shards is not None
    return p.wide if wide else p.student_hidden.dtype


def _filled_with_zeros(p: Problem, out: Result, wanted: Wanted) -> Result:
    out.stats = p.student_hidden.new_zeros(len(COLUMNS), p.tokens, dtype=p.wide)
    out.reference_stats = None if p.reference is None else out.stats.clone()
    if wanted.hidden:
        out.grad_hidden = p.student_hidden.new_zeros(p.student_hidden.shape, dtype=_hidden_dtype(p))
    if out.grad_weight is not None:
        out.grad_weight.zero_()
    return out


def _sizes(p: Problem, sides: int, rows: int, wanted: Wanted) -> memory.Sizes:
    weight = p.head.weight
    own = weight.shape[0]
    dz_bytes = gemm.gradient_dtype(p.student_hidden, p.wide).itemsize
    sum_bytes = weight.numel() * (p.wide.itemsize - weight.element_size()) if wanted.weight else 0
    return memory.sizes(
        rows,
        own if p.shards is None else p.shards.largest,  # ranks must take the same chunks
        p.student_hidden.device.type,
        sides * p.logits_dtype.itemsize + (p.wide.itemsize if wanted.bias and dz_bytes < p.wide.itemsize else 0),
        dz_bytes if any(wanted) else 0,
        p.memory_bytes,
        # A filter keeps the columns that any row of a buffer needs.
        one_level=p.filter_eps is not None,
        sum_bytes=sum_bytes if gemm.sums_narrow(weight) and p.shards is None else 0,
    )


def _hook_weights(token_weight_fn: TokenWeightFn, stats: RowStats) -> Tensor:
    w = token_weight_fn(stats)
    if not isinstance(w, Tensor) or w.shape != stats.kl.shape or w.is_complex():
        got = f"{w.dtype} of shape {tuple(w.shape)}" if isinstance(w, Tensor) else type(w).__name__
        raise ValueError(f"token_weight_fn: expected real numbers of shape {tuple(stats.kl.shape)}, got {got}")
    return w.detach().to(stats.kl)
