"""Both KLs and their gradients in one read of a chunk of logits, for CUDA. Mathematics: `hsd_kernels.divergence`.

A row is cut into slices, one program each. A program keeps its slice of both sides in registers, publishes the
slice's sums, waits until the last program of the row has done so, merges all of them, and writes its slice of dz: 8
bytes a pair of fp32 logits are read and 2 written, where two passes read 16.

No program waits for one that has not started: programs take their place in the order in which they start (a ticket),
so that those of the oldest unfinished row all run as long as the device holds one row's slices at a time (`serves`).
The sums of slices are merged in one order, whoever comes last: results are bitwise repeatable.

Exponents are in units of log 2, ``p = 2 ** (k (y - top) - log2(sum))`` with ``k = kappa log2(e)``. What few slices
need is done where a first sum asks for it: ``0 * -inf = 0``, and a sum without the 1 of a likely token.

The JSD, a clip and a floor stay two passes. They need a second sum over the row, of what the first one normalizes. A
second wait with twice as much to hold is slower than a second read.
"""

# Triton's reductions are inferred to return tuples, and a literal for a constexpr is refused:
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hsd_kernels import configs
from hsd_kernels.divergence import RowSpec
from hsd_kernels.row_stats import COLUMNS, RowStats
from hsd_kernels.rows import triton_rows
from hsd_kernels.rows.triton_rows import (
    REVERSE_KL,
    STUDENT_LOGPS,
    TEACHER_LOGPS,
    _log1p,
    _times,
    pair,
    store_row,
)

LN2: tl.constexpr = tl.constexpr(math.log(2.0))
# Stands for a logit beyond V: finite, since 0 times it must be 0.
LOWEST: tl.constexpr = tl.constexpr(-1.0e30)
SUMS: tl.constexpr = tl.constexpr(7)  # of a slice
PEAKED: tl.constexpr = tl.constexpr(0.25)  # a slice whose likeliest token has four fifths of it is summed with care,
FEW: tl.constexpr = tl.constexpr(128)  # so many columns at a time


def serves(x: Tensor, spec: RowSpec) -> bool:
    """Whether this is a KL without a clip or a floor, and the device holds all slices of a row at a time: a
    multiprocessor runs a program or more."""
    if spec.divergence.sums_summands:
        return False
    block = row_config(spec, triton_rows.capability(x.device)).block_v
    return not x.is_cuda or slices(x.shape[1], block)[0] <= _multiprocessors(x.device)


def statistics_and_gradient_(
    x_student: Tensor,
    x_teacher: Tensor,
    spec: RowSpec,
    bias: Tensor | None,
    teacher_bias: Tensor | None,
    target_ids: Tensor | None,
    rows: Tensor,
    weights: Tensor,
    out: Tensor,
) -> RowStats:
    """`triton_rows.statistics`, and `triton_rows.gradient_` of the same rows into ``out``, which lies apart from the
    logits."""
    n, vocab = x_student.shape
    table = torch.empty(len(COLUMNS), n, dtype=torch.float32, device=x_student.device)
    stats = RowStats.unstack(table, rows, with_targets=target_ids is not None)
    if n == 0:
        return stats
    config = row_config(spec, triton_rows.capability(x_student.device))
    parts, slots = slices(vocab, config.block_v)
    partial = torch.empty(n, SUMS.value, slots, dtype=torch.float32, device=x_student.device)
    # An interpreter runs programs one after the other: there nothing may wait, and the second of two launches reads
    # what the first has published.
    waits = x_student.is_cuda
    with torch.cuda.device_of(x_student):
        for _ in range(1 if waits else 2):
            sync = torch.zeros(1 + n, dtype=torch.int32, device=x_student.device)
            kernel: Any = one_read_kernel[(n * parts,)]
            kernel(
                x_student,
                x_teacher,
                triton_rows.contiguous(bias),
                triton_rows.contiguous(teacher_bias),
                triton_rows.contiguous(target_ids),
                triton_rows.contiguous(weights),
                partial,
                sync,
                table,
                out,
                vocab,
                triton_rows.row_stride(x_student),
                triton_rows.row_stride(x_teacher),
                triton_rows.row_stride(out),
                table.stride(0),
                triton_rows.scales(spec)[0],
                spec.scales[1] / math.log(2.0),
                spec.chain,
                **triton_rows.flags(spec),
                WAITS=waits,
                PARTS=parts,
                SLOTS=slots,
                BLOCK_V=config.block_v,
                **config.options,
            )
    return stats


def row_config(spec: RowSpec, capability: int) -> configs.RowConfig:
    return configs.row_config("one_read" if spec.softcap is None else "one_read_softcap", capability)


def slices(vocab: int, block: int) -> tuple[int, int]:
    """Number of slices of a row, and the power of two that holds it."""
    parts = -(-vocab // block)
    return parts, max(2, triton.next_power_of_2(parts))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def one_read_kernel(
    xs_ptr,  # (C, V)
    xt_ptr,  # (C, V)
    bias_ptr,  # (V,)
    teacher_bias_ptr,  # (V,)
    target_ptr,  # (C,)
    weights_ptr,  # (C,)
    partial_ptr,  # (C, SUMS, SLOTS)
    sync_ptr,  # (1 + C,) zeros: the ticket; the arrivals of each row
    table_ptr,  # (len(COLUMNS), C)
    dz_ptr,  # (C, V)
    V,
    stride_xs,
    stride_xt,
    stride_dz,
    stride_table,
    in_scale,
    k,
    chain,
    DIVERGENCE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    LINEAR: tl.constexpr,
    WAITS: tl.constexpr,
    PARTS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    if WAITS:
        ticket = tl.atomic_add(sync_ptr, 1, sem="relaxed")
    else:
        ticket = tl.program_id(0)
    row = ticket // PARTS
    part = ticket % PARTS
    row64 = row.to(tl.int64)
    xs_ptr += row64 * stride_xs
    xt_ptr += row64 * stride_xt
    partial_ptr += row64 * (SUMS * SLOTS)
    table_ptr += row
    sync_ptr += 1 + row
    cols = part * BLOCK_V + tl.arange(0, BLOCK_V)
    if part * BLOCK_V + BLOCK_V <= V:
        y_s, y_t = pair(
            xs_ptr, xt_ptr, bias_ptr, teacher_bias_ptr, cols, V, in_scale, HAS_SOFTCAP, LINEAR, LOWEST, True
        )
    else:
        y_s, y_t = pair(xs_ptr, xt_ptr, bias_ptr, teacher_bias_ptr, cols, V, in_scale, HAS_SOFTCAP, LINEAR, LOWEST)

    top_s, top_t = tl.split(tl.max(tl.join(y_s, y_t), 0))  # joined: one barrier
    top_s = tl.maximum(top_s, LOWEST)
    top_t = tl.maximum(top_t, LOWEST)
    u_s = (y_s - top_s) * k
    u_t = (y_t - top_t) * k
    e_s = tl.exp2(u_s)
    e_t = tl.exp2(u_t)
    more_s = tl.sum(e_s, 0) - 1.0
    more_t = tl.sum(e_t, 0) - 1.0
    a_s = tl.sum(e_s * u_s, 0)
    a_t = tl.sum(e_t * u_t, 0)
    if DIVERGENCE == REVERSE_KL:
        d = tl.sum(e_s * (u_s - u_t), 0)
    else:
        d = tl.sum(e_t * (u_t - u_s), 0)
    strange = a_s + a_t + d
    if (strange != strange) | (more_s < PEAKED) | (more_t < PEAKED):
        # With 0 * -inf = 0, and without the 1 of the maximum, beside which a sum loses its last bits. From memory: to
        # hold more in registers would be paid by every slice.
        more_s = 0.0
        more_t = 0.0
        ones_s = -1.0
        ones_t = -1.0
        a_s = 0.0
        a_t = 0.0
        d = 0.0
        for start in range(0, BLOCK_V, FEW):
            few = part * BLOCK_V + start + tl.arange(0, FEW)
            few_s, few_t = pair(
                xs_ptr, xt_ptr, bias_ptr, teacher_bias_ptr, few, V, in_scale, HAS_SOFTCAP, LINEAR, LOWEST
            )
            few_s = (few_s - top_s) * k
            few_t = (few_t - top_t) * k
            p_s = tl.exp2(few_s)
            p_t = tl.exp2(few_t)
            more_s += tl.sum(tl.where(p_s == 1.0, 0.0, p_s), 0)
            more_t += tl.sum(tl.where(p_t == 1.0, 0.0, p_t), 0)
            ones_s += tl.sum(tl.where(p_s == 1.0, 1.0, 0.0), 0)
            ones_t += tl.sum(tl.where(p_t == 1.0, 1.0, 0.0), 0)
            a_s += tl.sum(_times(p_s, few_s), 0)
            a_t += tl.sum(_times(p_t, few_t), 0)
            if DIVERGENCE == REVERSE_KL:
                d += tl.sum(_times(p_s, few_s - few_t), 0)
            else:
                d += tl.sum(_times(p_t, few_t - few_s), 0)
        more_s += ones_s
        more_t += ones_t
    slot = partial_ptr + part
    tl.store(slot, top_s)
    tl.store(slot + SLOTS, top_t)
    tl.store(slot + 2 * SLOTS, more_s)
    tl.store(slot + 3 * SLOTS, more_t)
    tl.store(slot + 4 * SLOTS, a_s)
    tl.store(slot + 5 * SLOTS, a_t)
    tl.store(slot + 6 * SLOTS, d)
    _exchange(sync_ptr, PARTS, WAITS)
    row_top_s, row_top_t, r_s, r_t, more_s, more_t = _merged(partial_ptr, k, PARTS, SLOTS)
    l_s = 1.0 + more_s
    l_t = 1.0 + more_t
    # By a division: 2 ** -log2(sum) would lose the last bits of a row with one likely token.
    shift_s = (top_s - row_top_s) * k
    shift_t = (top_t - row_top_t) * k
    p_s = e_s * tl.div_rn(tl.exp2(shift_s), l_s)
    p_t = e_t * tl.div_rn(tl.exp2(shift_t), l_t)
    if DIVERGENCE == REVERSE_KL:
        # p_s (log p_s - log p_t - G): the log-sums are in both and cancel.
        d = _divergence(partial_ptr, r_s, r_t, 2, PARTS, SLOTS) / l_s
        dz = _times(p_s, ((u_s - u_t) + (shift_s - shift_t - d)) * LN2)
    else:
        dz = p_s - p_t
    weight = tl.load(weights_ptr + row).to(tl.float32)
    dz *= weight * chain
    if HAS_SOFTCAP:
        dz *= 1.0 - y_s * y_s
    dz = dz.to(dz_ptr.dtype.element_ty)
    tl.store(dz_ptr + row64 * stride_dz + cols, dz, mask=cols < tl.where(weight == 0.0, 0, V))
    if weight == 0.0:
        tl.store(dz_ptr + row64 * stride_dz + cols, tl.zeros_like(dz), mask=cols < V)

    if part == PARTS - 1:  # the last to start
        in_s = 1.0 + _slots(partial_ptr, 2, -1.0, PARTS, SLOTS)
        in_t = 1.0 + _slots(partial_ptr, 3, -1.0, PARTS, SLOTS)
        whole_s = tl.exp2(r_s) * (_slots(partial_ptr, 4, 0.0, PARTS, SLOTS) + r_s * in_s)
        whole_t = tl.exp2(r_t) * (_slots(partial_ptr, 5, 0.0, PARTS, SLOTS) + r_t * in_t)
        log_s = _log1p(more_s)
        log_t = _log1p(more_t)
        entropy_s = log_s - tl.sum(whole_s, 0) / l_s * LN2
        entropy_t = log_t - tl.sum(whole_t, 0) / l_t * LN2
        if DIVERGENCE == REVERSE_KL:
            kl = d * LN2 - _log1p((more_s - more_t) / l_t)
            grad_sum = d * LN2 - (log_s - log_t)
        else:
            d = _divergence(partial_ptr, r_t, r_s, 3, PARTS, SLOTS) / l_t
            kl = d * LN2 - _log1p((more_t - more_s) / l_s)
            grad_sum = 0.0
        store_row(
            table_ptr, stride_table, kl, entropy_s, entropy_t, row_top_s, row_top_t, log_s, log_t, grad_sum, k * LN2
        )
        if target_ptr is not None:
            target = tl.load(target_ptr + row).to(tl.int64)
            y_s2, y_t2 = pair(
                xs_ptr, xt_ptr, bias_ptr, teacher_bias_ptr, target, V, in_scale, HAS_SOFTCAP, LINEAR, LOWEST, True
            )
            tl.store(table_ptr + STUDENT_LOGPS * stride_table, (y_s2 - row_top_s) * k * LN2 - log_s)
            tl.store(table_ptr + TEACHER_LOGPS * stride_table, (y_t2 - row_top_t) * k * LN2 - log_t)


@triton.jit
def _exchange(counter_ptr, PARTS: tl.constexpr, WAITS: tl.constexpr):
    """What the row's programs have stored before it, each of them reads after it."""
    tl.debug_barrier()
    arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel") + 1
    if WAITS:
        while arrived < PARTS:
            arrived = tl.atomic_add(counter_ptr, 0, sem="acquire")


@triton.jit
def _slots(partial_ptr, n, other, PARTS: tl.constexpr, SLOTS: tl.constexpr):
    """The n-th sum of all slices."""
    i = tl.arange(0, SLOTS)
    return tl.load(partial_ptr + n * SLOTS + i, mask=i < PARTS, other=other, cache_modifier=".cg")


@triton.jit
def _merged(partial_ptr, k, PARTS: tl.constexpr, SLOTS: tl.constexpr):
    """Of the row: both maxima; how far below them each slice's lie; both sums of exponentials but for a 1, NaN where no
    logit is finite."""
    y_s = _slots(partial_ptr, 0, LOWEST, PARTS, SLOTS)
    y_t = _slots(partial_ptr, 1, LOWEST, PARTS, SLOTS)
    more_s = _slots(partial_ptr, 2, -1.0, PARTS, SLOTS)
    more_t = _slots(partial_ptr, 3, -1.0, PARTS, SLOTS)
    top_s, top_t = tl.split(tl.max(tl.join(y_s, y_t), 0))
    r_s = (y_s - top_s) * k
    r_t = (y_t - top_t) * k
    # How many slices hold each maximum, both in one sum.
    tops = tl.sum(tl.where(r_s < 0.0, 0, 1) + tl.where(r_t < 0.0, 0, 65536), 0)
    more_s = tl.exp2(r_s) * (more_s + tl.where(r_s < 0.0, 1.0, 0.0))
    more_t = tl.exp2(r_t) * (more_t + tl.where(r_t < 0.0, 1.0, 0.0))
    more_s, more_t = tl.split(tl.sum(tl.join(more_s, more_t), 0))
    more_s = tl.where(top_s > LOWEST, more_s + ((tops & 65535) - 1).to(tl.float32), float("nan"))
    more_t = tl.where(top_t > LOWEST, more_t + ((tops >> 16) - 1).to(tl.float32), float("nan"))
    return top_s, top_t, r_s, r_t, more_s, more_t


@triton.jit
def _divergence(partial_ptr, r_p, r_q, n, PARTS: tl.constexpr, SLOTS: tl.constexpr):
    """The row's sum of e_p (u_p - u_q), of whose e_p the n-th sums are."""
    e = 1.0 + _slots(partial_ptr, n, -1.0, PARTS, SLOTS)
    return tl.sum(_times(tl.exp2(r_p), _slots(partial_ptr, 6, 0.0, PARTS, SLOTS) + (r_p - r_q) * e), 0)
