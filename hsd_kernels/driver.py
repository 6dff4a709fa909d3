"""The chunk loop: stacked GEMM, row passes, backward GEMMs. Device-agnostic; the rows come from a backend module.

Per chunk of C token rows: logits of all sides into one reused workspace (one GEMM of ``[h_s ; h_t]`` for those that
share a head), one row pass for the statistics, one that turns the student's logits into their gradient in place, then
``dH = dz W`` and ``dW += dz^T h_s``. With N rows, hidden D, vocabulary V and U = 2 N D V that is 4U FLOPs in all for
forward and backward, 5U with a reference policy, and no (N, V) tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from hsd_kernels import gemm
from hsd_kernels.divergence import RowSpec
from hsd_kernels.head import Head
from hsd_kernels.op_support import Gradients, Wanted, wide_dtype, without_autocast
from hsd_kernels.row_stats import COLUMNS, RowStats
from hsd_kernels.vocab_filter import active_columns, take_columns_
from hsd_kernels.vocab_parallel import Shards

# Bytes of the logits workspace. 1 GiB holds 883 fp32 row pairs at V = 151,936, tall enough that dW's read-modify-write
# stays small beside the GEMMs; not yet tuned on a GPU. On two CPU cores (1,024 tokens, D = 512, V = 151,936) the
# forward took 2.51, 2.44 and 2.31 s in fp32 and 1.11, 0.98 and 0.89 s in bf16 at 256 MiB, 512 MiB and 1 GiB.
CHUNK_BYTES = {"cuda": 1 << 30}
DEFAULT_CHUNK_BYTES = 512 << 20

# The last workspace of a CPU call. Fresh pages cost as much as using them: 0.11 s for 512 MiB on two cores, beside a
# forward GEMM of 0.4 s into them (bf16, N = 1,024, D = 512, V = 151,936). CUDA's allocator keeps memory by itself.
_spare: list[Tensor] = []

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
    reference_coef: float = 0.0
    target_ids: Tensor | None = None
    filter_eps: float | None = None
    chunk_bytes: int | None = None
    shards: Shards | None = None  # of the vocabulary, over a process group

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

    stats: Tensor  # (len(COLUMNS), T), zero in rows that were dropped
    reference_stats: Tensor | None  # the same, with the reference policy for the teacher
    factor: Tensor  # (T,) what the hook returned, 1 without one
    grad_hidden: Tensor | None
    grad_weight: Tensor | None
    grad_bias: Tensor | None
    filtered: Tensor

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
    the teacher and not the reference term. Rows left out are never read: a NaN there reaches nothing.
    """
    with without_autocast(problem.student_hidden.device):
        return _run(problem, rows, weights, factor, wanted)


def _run(p: Problem, rows: Tensor, weights: Tensor, factor: TokenWeightFn | Tensor | None, wanted: Wanted) -> Result:
    sides = [Side(p.student_hidden, p.head, p.teacher.spec), p.teacher, *([p.reference] if p.reference else [])]
    chunk = _chunk_rows(p, len(sides), rows.numel())
    out = _empty_result(p, wanted, one_chunk=chunk >= rows.numel())
    if rows.numel() == 0:
        if out.grad_weight is not None:
            out.grad_weight.zero_()
        return out
    vocab = p.head.weight.shape[0]
    with _borrowed(len(sides) * chunk * vocab, p.logits_dtype, p.student_hidden.device) as memory:
        _chunks(p, rows, weights, factor, wanted, out, sides, memory.view(-1, vocab))
    if p.shards is not None:
        p.shards.sum_(out.filtered)
        if out.grad_hidden is not None:
            p.shards.sum_(out.grad_hidden)
    return out


def _chunks(
    p: Problem,
    rows: Tensor,
    weights: Tensor,
    factor: TokenWeightFn | Tensor | None,
    wanted: Wanted,
    out: Result,
    sides: list[Side],
    workspace: Tensor,
) -> None:
    chunk = workspace.shape[0] // len(sides)
    for start in range(0, rows.numel(), chunk):
        at = rows[start : start + chunk]
        w = weights[start : start + chunk].to(p.wide)
        hidden = [side.hidden[at] for side in sides]
        student = hidden[0] - hidden[1] if p.teacher.spec.linear else hidden[0]
        x = _logits(sides, [student, *hidden[1:]], workspace)

        stats, silent = _statistics(p, p.teacher, x[0], x[1], hidden[0], hidden[1], at)
        out.stats[:, at] = stats.stack()
        if callable(factor):
            out.factor[at] = _hook_weights(factor, stats)
        elif factor is not None:
            out.factor[at] = factor[at]
        parts = [(p.teacher, x[1], stats, (w * out.factor[at]).masked_fill(silent, 0.0))]
        if p.reference is not None:
            ref, silent = _statistics(p, p.reference, x[0], x[2], hidden[0], hidden[2], at)
            assert out.reference_stats is not None
            out.reference_stats[:, at] = ref.stack()
            parts.append((p.reference, x[2], ref, (w * p.reference_coef).masked_fill(silent, 0.0)))
        if not any(wanted):
            continue

        dz = _logit_gradient(p, x[0], parts)
        if out.grad_bias is not None:
            out.grad_bias += dz.sum(0, dtype=p.wide)
        magnitudes = torch.stack([part[3] for part in parts]).abs()
        if factor is not None:  # dW = dz^T h: 0 times the NaN of a row that the hook dropped would be NaN
            hidden[0] = hidden[0].masked_fill((magnitudes == 0).all(0).unsqueeze(-1), 0.0)
        spare = workspace.flatten()[x[0].numel() :]  # the other sides' logits
        _backward_gemms(p, dz, hidden[0], at, out, magnitudes.amax(), first=start == 0, spare=spare)


@contextmanager
def _borrowed(count: int, dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """``count`` elements of memory. Taken out of `_spare` while in use: calls may nest and threads may meet."""
    size = count * dtype.itemsize
    try:
        memory = _spare.pop() if device.type == "cpu" else None
    except IndexError:
        memory = None
    if memory is None or memory.numel() < size:
        memory = torch.empty(size, dtype=torch.uint8, device=device)
    yield memory[:size].view(dtype)
    if device.type == "cpu":
        _spare[:] = [memory]


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
        gemm.project_out(stacked, head.weight, workspace[start:stop])
        for i, part in zip(members, workspace[start:stop].split(n), strict=True):
            x[i] = part
        start = stop
    return x


def _statistics(
    p: Problem, side: Side, x_s: Tensor, x_side: Tensor, h_s: Tensor, h_side: Tensor, at: Tensor
) -> tuple[RowStats, Tensor]:
    """Row statistics between the student and ``side``, and which rows are silent, (n,) bool."""
    biases = (p.head.bias, side.head.bias)
    targets = valid = None
    if p.target_ids is not None:
        targets = p.target_ids[at] if p.shards is None else p.target_ids[at] - p.shards.start
        valid = targets.clamp(0, x_s.shape[1] - 1)
    stats = p.rows_impl.statistics(x_s, x_side, side.spec, *biases, valid, at)
    if targets is not None:
        strange = targets != valid
        student_logps, teacher_logps = stats.student_logps, stats.teacher_logps
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
    silent = torch.zeros_like(at, dtype=torch.bool)
    if side.head is p.head:
        # A GEMM may sum the same row in another order at another position (MKL: D = 13), leaving 1e-7 of noise
        # where the answer is 0. inf - inf is not 0: such a row keeps its NaN.
        silent = (h_s - h_side).eq(0).all(-1)
        stats = stats._replace(kl=stats.kl.masked_fill(silent, 0.0))
    return stats, silent


def _logit_gradient(p: Problem, x_s: Tensor, parts: list[tuple[Side, Tensor, RowStats, Tensor]]) -> Tensor:
    """dz (n, V), over the memory of the student's logits. The reference's part is first made over its own logits."""
    dz = gemm.gradient_view(x_s, p.student_hidden)
    for side, x_side, stats, weights in reversed(parts):
        over = x_s if side is p.teacher else x_side
        part = gemm.gradient_view(over, p.student_hidden)
        p.rows_impl.gradient_(x_s, x_side, side.spec, p.head.bias, side.head.bias, stats, weights, part)
        if side is not p.teacher:
            reference = part
        elif len(parts) > 1:
            dz += reference
    return dz


def _backward_gemms(
    p: Problem, dz: Tensor, h_s: Tensor, at: Tensor, out: Result, largest_weight: Tensor, first: bool, spare: Tensor
) -> None:
    """``spare`` (m,) may be overwritten, as dz may."""
    weight, columns = p.head.weight, None
    if p.filter_eps is not None:
        active = active_columns(dz, p.filter_eps, largest_weight, p.student_hidden.dtype)
        out.filtered += torch.stack([active.dropped, active.total]).to(out.filtered)
        columns = active.columns
    if columns is None:
        if out.grad_hidden is not None:
            out.grad_hidden[at] = gemm.backproject(dz, weight, out.grad_hidden.dtype)
        if out.grad_weight is not None:
            gemm.accumulate_(out.grad_weight, dz, h_s, first)
        return
    dz, shape = take_columns_(dz, columns), (columns.numel(), weight.shape[1])
    if out.grad_hidden is not None:
        weight = torch.index_select(weight, 0, columns, out=_within(spare, shape, weight.dtype))
        out.grad_hidden[at] = gemm.backproject(dz, weight, out.grad_hidden.dtype)
    if out.grad_weight is not None:
        part = _within(spare, shape, out.grad_weight.dtype)
        gemm.accumulate_(part, dz, h_s, first=True)
        if first:
            out.grad_weight.zero_()
        out.grad_weight.index_add_(0, columns, part)


def _within(memory: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An empty tensor, over ``memory`` where it fits: 23,000 rows of W (49,152, 576) are gathered in 8 ms there, on
    fresh pages in 39 (fp32, one CPU core)."""
    size = math.prod(shape) * dtype.itemsize
    start = -memory.storage_offset() * memory.itemsize % dtype.itemsize
    if start + size > memory.nbytes:
        return memory.new_empty(shape, dtype=dtype)
    return memory.view(torch.uint8)[start : start + size].view(dtype).view(shape)


def _empty_result(p: Problem, wanted: Wanted, one_chunk: bool) -> Result:
    tokens, weight = p.student_hidden.shape[0], p.head.weight

    def zeros(*shape: int) -> Tensor:
        return p.student_hidden.new_zeros(shape, dtype=p.wide)

    # fp16 has no room for a gradient that is yet to be divided by the token count and multiplied by a loss scale; the
    # parts of a vocabulary's shards are summed before they are rounded.
    wide = p.student_hidden.dtype == torch.float16 or p.shards is not None
    narrow = p.wide if wide else p.student_hidden.dtype
    head = p.student_hidden.dtype if one_chunk and gemm.torch_leads(p.student_hidden) else p.wide
    return Result(
        stats=zeros(len(COLUMNS), tokens),
        reference_stats=None if p.reference is None else zeros(len(COLUMNS), tokens),
        factor=zeros(tokens) + 1.0,
        grad_hidden=p.student_hidden.new_zeros(p.student_hidden.shape, dtype=narrow) if wanted.hidden else None,
        grad_weight=p.student_hidden.new_empty(weight.shape, dtype=head) if wanted.weight else None,
        grad_bias=zeros(weight.shape[0]) if wanted.bias else None,
        filtered=zeros(2),
    )


def _chunk_rows(p: Problem, sides: int, rows: int) -> int:
    vocab = p.head.weight.shape[0] if p.shards is None else p.shards.largest  # ranks must take the same chunks
    budget = p.chunk_bytes or CHUNK_BYTES.get(p.student_hidden.device.type, DEFAULT_CHUNK_BYTES)
    most = max(1, budget // (sides * vocab * p.logits_dtype.itemsize))
    chunks = max(1, -(-rows // most))
    return -(-rows // chunks)  # of one size: a small last one would waste its GEMMs


def _hook_weights(token_weight_fn: TokenWeightFn, stats: RowStats) -> Tensor:
    w = token_weight_fn(stats)
    if not isinstance(w, Tensor) or w.shape != stats.kl.shape:
        got = tuple(w.shape) if isinstance(w, Tensor) else type(w).__name__
        raise ValueError(f"token_weight_fn: expected a tensor of shape {tuple(stats.kl.shape)}, got {got}")
    return w.detach().to(stats.kl)
