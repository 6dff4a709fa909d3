"""The chunk loop: stacked GEMM, row pass, backward GEMMs. Device-agnostic; the rows come from a backend module.

Per chunk of C token rows: logits of both sides into one reused workspace (one GEMM of ``[h_s ; h_t]`` with the shared
head), one row pass for the statistics, one that turns the student's logits into their gradient in place, then
``dH = dz W`` and ``dW += dz^T h_s``. With N rows, hidden D, vocabulary V and U = 2 N D V that is 4U FLOPs in all for
forward and backward, and no (N, V) tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hsd_kernels.divergence import RowSpec, RowStats

# Bytes of the logits workspace. 1 GiB holds 883 fp32 row pairs at V = 151,936, tall enough that dW's read-modify-write
# stays small beside the GEMMs. Neither size has been tuned by measurement yet.
CHUNK_BYTES = {"cuda": 1 << 30}
DEFAULT_CHUNK_BYTES = 256 << 20
# Vocabulary rows upcast at a time where a GEMM of half-precision operands cannot accumulate into fp32 (CPU).
UPCAST_ROWS = 8192

TokenWeightFn = Callable[[RowStats], Tensor]


@dataclass(frozen=True)
class Head:
    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)


@dataclass(frozen=True)
class Problem:
    """Validated, flat inputs: hidden states are (T, D), per-token tensors (T,), everything detached."""

    student_hidden: Tensor
    teacher_hidden: Tensor
    head: Head
    teacher_head: Head | None  # None: the teacher shares the student's head
    spec: RowSpec
    rows_impl: ModuleType
    target_ids: Tensor | None = None
    chunk_bytes: int | None = None


@dataclass(frozen=True)
class Wanted:
    hidden: bool
    weight: bool
    bias: bool

    @property
    def any(self) -> bool:
        return self.hidden or self.weight or self.bias


@dataclass
class Result:
    """Sums over rows of weight * divergence and its gradients; gradients not wanted are None."""

    stats: RowStats  # (T,), zero in rows that were dropped
    weights: Tensor  # (T,) effective weights: given weights times those of the hook
    grad_hidden: Tensor | None
    grad_weight: Tensor | None
    grad_bias: Tensor | None


def run(
    problem: Problem, rows: Tensor, weights: Tensor, token_weight_fn: TokenWeightFn | None, wanted: Wanted
) -> Result:
    """Statistics of the token positions ``rows`` (R,) and gradients of ``sum weights * divergence`` over them.

    ``weights`` is (R,). Rows left out are never read: a NaN there reaches nothing.
    """
    with _without_autocast(problem.student_hidden.device):
        return _run(problem, rows, weights, token_weight_fn, wanted)


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Operands are in the right dtype here: autocast would run the GEMMs of upcast operands in bf16 (CPU)."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _run(
    problem: Problem, rows: Tensor, weights: Tensor, token_weight_fn: TokenWeightFn | None, wanted: Wanted
) -> Result:
    p = problem
    hidden, weight = p.student_hidden, p.head.weight
    tokens, vocab = hidden.shape[0], weight.shape[0]
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32

    out = _empty_result(p, tokens, wide, wanted)
    if rows.numel() == 0:
        return out
    chunk = _chunk_rows(p, vocab, wide, rows.numel())
    workspace = hidden.new_empty((2 * chunk, vocab), dtype=wide)
    bias = p.head.bias
    teacher_bias = bias if p.teacher_head is None else p.teacher_head.bias
    for start in range(0, rows.numel(), chunk):
        at = rows[start : start + chunk]
        w = weights[start : start + chunk].to(wide)
        n = at.numel()
        h_s, h_t = hidden[at], p.teacher_hidden[at]
        x_s, x_t = workspace[:n], workspace[n : 2 * n]
        if p.teacher_head is None:
            _project_out(torch.cat([h_s, h_t]), weight, workspace[: 2 * n])
        else:
            _project_out(h_s, weight, x_s)
            _project_out(h_t, p.teacher_head.weight, x_t)

        targets = None if p.target_ids is None else p.target_ids[at]
        valid = None if targets is None else targets.clamp(0, vocab - 1)
        stats = p.rows_impl.statistics(x_s, x_t, p.spec, bias, teacher_bias, valid, at)
        if targets is not None and stats.student_logps is not None and stats.teacher_logps is not None:
            strange = targets != valid
            stats = stats._replace(
                student_logps=stats.student_logps.masked_fill(strange, float("nan")),
                teacher_logps=stats.teacher_logps.masked_fill(strange, float("nan")),
            )
        silent = None
        if p.teacher_head is None:
            # A GEMM may sum the same row in another order at another position (MKL: D = 13), leaving 1e-7 of noise
            # where the answer is 0. inf - inf is not 0: such a row keeps its NaN.
            silent = (h_s - h_t).eq(0).all(-1)
            stats = stats._replace(kl=stats.kl.masked_fill(silent, 0.0))
        if token_weight_fn is not None:
            w = w * _hook_weights(token_weight_fn, stats)
        out.weights[at] = w
        for total, part in zip(out.stats[1:], stats[1:], strict=True):
            if total is not None:
                total[at] = part
        if not wanted.any:
            continue

        dz = _gradient_view(x_s, hidden.dtype)
        w = w if silent is None else w.masked_fill(silent, 0.0)
        p.rows_impl.gradient_(x_s, x_t, p.spec, bias, teacher_bias, stats, w, dz)
        if out.grad_hidden is not None:
            out.grad_hidden[at] = _backproject(dz, weight).to(out.grad_hidden.dtype)
        if out.grad_weight is not None:
            _accumulate_(out.grad_weight, dz, h_s)
        if out.grad_bias is not None:
            out.grad_bias += dz.sum(0, dtype=wide)
    return out


def _empty_result(p: Problem, tokens: int, wide: torch.dtype, wanted: Wanted) -> Result:
    def zeros(*shape: int, dtype: torch.dtype = wide) -> Tensor:
        return p.student_hidden.new_zeros(shape, dtype=dtype)

    fields: dict[str, Any] = {name: zeros(tokens) for name in RowStats._fields[1:]}
    if p.target_ids is None:
        fields["student_logps"] = fields["teacher_logps"] = None
    weight = p.head.weight
    # fp16 has no room for a gradient that is yet to be divided by the token count and multiplied by a loss scale.
    narrow = wide if p.student_hidden.dtype == torch.float16 else p.student_hidden.dtype
    return Result(
        stats=RowStats(rows=torch.arange(tokens, device=weight.device), **fields),
        weights=zeros(tokens),
        grad_hidden=torch.zeros_like(p.student_hidden, dtype=narrow) if wanted.hidden else None,
        grad_weight=zeros(*weight.shape) if wanted.weight else None,
        grad_bias=zeros(weight.shape[0]) if wanted.bias else None,
    )


def _chunk_rows(p: Problem, vocab: int, wide: torch.dtype, rows: int) -> int:
    budget = p.chunk_bytes or CHUNK_BYTES.get(p.student_hidden.device.type, DEFAULT_CHUNK_BYTES)
    return min(rows, max(1, budget // (2 * vocab * wide.itemsize)))


def _hook_weights(token_weight_fn: TokenWeightFn, stats: RowStats) -> Tensor:
    w = token_weight_fn(stats)
    if not isinstance(w, Tensor) or w.shape != stats.kl.shape:
        got = tuple(w.shape) if isinstance(w, Tensor) else type(w).__name__
        raise ValueError(f"token_weight_fn: expected a tensor of shape {tuple(stats.kl.shape)}, got {got}")
    return w.detach().to(stats.kl)


# The GEMMs. On CUDA, operands stay in the input dtype and cuBLAS accumulates into fp32. A CPU GEMM of bf16 operands
# rounds its output to bf16: a relative L1 error in dH of 1.9e-2 against fp64, 1.8e-3 with the operands upcast (error
# columns of benchmarks/bench_kernel.py). So they are upcast, UPCAST_ROWS of the vocabulary at a time.


def _project_out(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = hidden @ weight.T, (n, D), (V, D) -> (n, V)."""
    if hidden.dtype == out.dtype:
        torch.mm(hidden, weight.t(), out=out)
    elif hidden.is_cuda:
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
    else:
        hidden = hidden.to(out.dtype)
        for v in range(0, weight.shape[0], UPCAST_ROWS):
            out[:, v : v + UPCAST_ROWS] = hidden @ weight[v : v + UPCAST_ROWS].to(out.dtype).t()


def _gradient_view(x_student: Tensor, operand_dtype: torch.dtype) -> Tensor:
    """Where dz goes: on CUDA the head of each row's own memory in the GEMM operands' dtype, else the row itself."""
    if x_student.is_cuda and operand_dtype != x_student.dtype:
        return x_student.view(operand_dtype)[:, : x_student.shape[1]]
    return x_student


def _backproject(dz: Tensor, weight: Tensor) -> Tensor:
    """dz @ weight, (n, V), (V, D) -> (n, D)."""
    if dz.dtype == weight.dtype:
        return dz @ weight
    out = dz.new_zeros(dz.shape[0], weight.shape[1])
    for v in range(0, weight.shape[0], UPCAST_ROWS):
        out.addmm_(dz[:, v : v + UPCAST_ROWS], weight[v : v + UPCAST_ROWS].to(dz.dtype))
    return out


def _accumulate_(grad_weight: Tensor, dz: Tensor, hidden: Tensor) -> None:
    """grad_weight += dz.T @ hidden, (V, D) wide, (n, V), (n, D)."""
    if dz.dtype == grad_weight.dtype:
        grad_weight.addmm_(dz.t(), hidden.to(dz.dtype))
    else:
        torch.addmm(grad_weight, dz.t(), hidden, out_dtype=grad_weight.dtype, out=grad_weight)
