"""Row backend in Triton: fp32, bf16 or fp16 logits, fp32 arithmetic. Mathematics: `hsd_kernels.divergence`.

One program per row. A logit is read as ``y`` with ``z = kappa * y`` (`_formed`, `RowSpec.scales`): ``y`` minus its
maximum is exact for large probabilities, and the temperature multiplies that difference, not a large logit.
"""

# Triton's reductions are inferred to return tuples, and a literal for a constexpr is refused:
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

import ctypes
import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hsd_kernels import configs
from hsd_kernels.divergence import DIVERGENCES, RowSpec
from hsd_kernels.row_stats import COLUMNS, RowStats

FORWARD_KL: tl.constexpr = tl.constexpr(DIVERGENCES.index("forward_kl"))
REVERSE_KL: tl.constexpr = tl.constexpr(DIVERGENCES.index("reverse_kl"))
# The rows of the table that `statistics_kernel` writes.
KL: tl.constexpr = tl.constexpr(COLUMNS.index("kl"))
STUDENT_LOGPS: tl.constexpr = tl.constexpr(COLUMNS.index("student_logps"))
TEACHER_LOGPS: tl.constexpr = tl.constexpr(COLUMNS.index("teacher_logps"))
STUDENT_ENTROPY: tl.constexpr = tl.constexpr(COLUMNS.index("student_entropy"))
TEACHER_ENTROPY: tl.constexpr = tl.constexpr(COLUMNS.index("teacher_entropy"))
STUDENT_LSE: tl.constexpr = tl.constexpr(COLUMNS.index("student_lse"))
TEACHER_LSE: tl.constexpr = tl.constexpr(COLUMNS.index("teacher_lse"))
STUDENT_TOP: tl.constexpr = tl.constexpr(COLUMNS.index("student_top"))
TEACHER_TOP: tl.constexpr = tl.constexpr(COLUMNS.index("teacher_top"))
STUDENT_LOG_SUM: tl.constexpr = tl.constexpr(COLUMNS.index("student_log_sum"))
TEACHER_LOG_SUM: tl.constexpr = tl.constexpr(COLUMNS.index("teacher_log_sum"))
GRAD_SUM: tl.constexpr = tl.constexpr(COLUMNS.index("grad_sum"))
# Where a running maximum starts: finite, since a whole block may be -inf and exp(-inf - -inf) is NaN.
LOWEST: tl.constexpr = tl.constexpr(-3.0e38)
LOG2E: tl.constexpr = tl.constexpr(1.0 / math.log(2.0))
MINUS_INF: tl.constexpr = tl.constexpr(-math.inf)


def statistics(
    x_student: Tensor,
    x_teacher: Tensor,
    spec: RowSpec,
    bias: Tensor | None,
    teacher_bias: Tensor | None,
    target_ids: Tensor | None,
    rows: Tensor,
) -> RowStats:
    table = torch.empty(len(COLUMNS), x_student.shape[0], dtype=torch.float32, device=x_student.device)
    config = configs.row_config("statistics", capability(x_student.device))
    more = config.lanes(x_student.shape[1], x_student.element_size())
    sides = (x_student, x_teacher, spec, bias, teacher_bias)
    _launch(statistics_kernel, config, *sides, (target_ids,), table, scales(spec), more)
    return RowStats.unstack(table, rows, with_targets=target_ids is not None)


def gradient_(
    x_student: Tensor,
    x_teacher: Tensor,
    spec: RowSpec,
    bias: Tensor | None,
    teacher_bias: Tensor | None,
    stats: RowStats,
    weights: Tensor,
    out: Tensor,
) -> None:
    per_row = (stats.student_top, stats.teacher_top, stats.student_log_sum, stats.teacher_log_sum, stats.grad_sum)
    config = configs.row_config("gradient", capability(x_student.device))
    sides = (x_student, x_teacher, spec, bias, teacher_bias)
    _launch(gradient_kernel, config, *sides, (*per_row, weights), out, (*scales(spec), spec.chain), {})


def _launch(
    kernel: Any,
    config: configs.RowConfig,
    x_student: Tensor,
    x_teacher: Tensor,
    spec: RowSpec,
    bias: Tensor | None,
    teacher_bias: Tensor | None,
    per_row: tuple[Tensor | None, ...],
    out: Tensor,
    factors: tuple[float | None, ...],
    more: dict[str, Any],
) -> None:
    """One program a row. The two kernels' arguments in their order."""
    n, vocab = x_student.shape
    if n == 0:
        return
    with torch.cuda.device_of(x_student):
        kernel[(n,)](
            x_student,
            x_teacher,
            *map(contiguous, (bias, teacher_bias, *per_row)),
            out,
            vocab,
            row_stride(x_student),
            row_stride(x_teacher),
            row_stride(out),
            *factors,
            float(spec.divergence.beta),
            spec.divergence.clip,
            spec.divergence.log_floor,
            **flags(spec),
            NONNEGATIVE=spec.divergence.clip is not None and spec.divergence.clip_form == "nonnegative",
            **more,
            BLOCK_V=config.block_v,
            **config.options,
        )


def scales(spec: RowSpec) -> tuple[float | None, float]:
    """(in_scale, kappa), None for a scale of 1. What is None is compiled away."""
    in_scale, kappa = spec.scales
    # Rounded here because a kernel takes it in fp32: its fp64 lines must use the same value.
    return None if in_scale == 1.0 else float(in_scale), ctypes.c_float(kappa).value


def flags(spec: RowSpec) -> dict[str, int | bool]:
    return {
        "DIVERGENCE": DIVERGENCES.index(spec.divergence.kind),
        "HAS_SOFTCAP": spec.softcap is not None,
        "LINEAR": spec.linear,
    }


@functools.cache
def capability(device: torch.device) -> int:
    """10 * major + minor; for the interpreter that of the oldest pinned architecture."""
    if device.type != "cuda":
        return min(configs.ARCHITECTURES)
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def row_stride(x: Tensor) -> int:
    assert x.stride(1) == 1 or x.shape[1] == 1
    return x.stride(0)


def contiguous(per_row: Tensor | None) -> Tensor | None:
    return None if per_row is None else per_row.contiguous()


# The two kernels. The first keeps every sum and maximum over the vocabulary per lane, one for each thread, and reduces
# them once at the end: no barrier in its loops, short sums, and one rescaling for the K * WIDTH columns that a lane has
# of a (K, LANES, WIDTH) block. The blocks that V fills need no mask.


@triton.jit
def statistics_kernel(
    xs_ptr,  # (C, V)
    xt_ptr,  # (C, V)
    bias_ptr,  # (V,)
    teacher_bias_ptr,  # (V,)
    target_ptr,  # (C,)
    out_ptr,  # (len(COLUMNS), C)
    V,
    stride_xs,
    stride_xt,
    stride_out,
    in_scale,
    kappa,
    beta,
    clip,
    log_floor,
    DIVERGENCE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NONNEGATIVE: tl.constexpr,
    LINEAR: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    IN_LANE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    # A KL needs only E[z_p - z_q] and both log-sums: one read. The JSD, a clip and a floor need both for each summand.
    IS_KL: tl.constexpr = DIVERGENCE == FORWARD_KL or DIVERGENCE == REVERSE_KL  # pyright: ignore
    ONE_PASS: tl.constexpr = IS_KL and clip is None and log_floor is None  # pyright: ignore
    K: tl.constexpr = BLOCK_V // (LANES * WIDTH)
    # int64 before the multiply: row * stride passes 2^31 at row 14,135 for V = 151,936.
    row = tl.program_id(0).to(tl.int64)
    xs_ptr += row * stride_xs
    xt_ptr += row * stride_xt
    lanes = tl.arange(0, LANES)
    block = tl.arange(0, K)[:, None, None] * (LANES * WIDTH) + lanes[None, :, None] * WIDTH
    block += tl.arange(0, WIDTH)[None, None, :]

    m_s = tl.full([LANES], LOWEST, tl.float32)  # running maximum of y
    m_t = tl.full([LANES], LOWEST, tl.float32)
    l_s = tl.zeros([LANES], tl.float32)  # sum of e = exp(kappa (y - m))
    l_t = tl.zeros([LANES], tl.float32)
    a_s = tl.zeros([LANES], tl.float32)  # sum of e (y - m), for the entropy
    a_t = tl.zeros([LANES], tl.float32)
    d = tl.zeros([LANES], tl.float32)  # sum of e_p ((y_p - m_p) - (y_q - m_q)) for KL(p || q)
    k = kappa * LOG2E
    whole = V // BLOCK_V * BLOCK_V
    for start in range(0, whole, BLOCK_V):
        y_s, y_t = pair(
            xs_ptr, xt_ptr, bias_ptr, teacher_bias_ptr, start + block, V, in_scale, HAS_SOFTCAP, LINEAR, FULL=True
        )
        m_s, m_t, l_s, l_t, a_s, a_t, d = _with_block(
            y_s, y_t, m_s, m_t, l_s, l_t, a_s, a_t, d, k, DIVERGENCE, ONE_PASS
        )
    if whole < V:
        y_s, y_t = pair(xs_ptr, xt_ptr, bias_ptr, teacher_bias_ptr, whole + block, V, in_scale, HAS_SOFTCAP, LINEAR)
        m_s, m_t, l_s, l_t, a_s, a_t, d = _with_block(
            y_s, y_t, m_s, m_t, l_s, l_t, a_s, a_t, d, k, DIVERGENCE, ONE_PASS
        )

    top_s = tl.max(m_s, 0)
    top_t = tl.max(m_t, 0)
    w_s, w_t, a_s, a_t, d = _rescaled(top_s - m_s, top_t - m_t, l_s, l_t, a_s, a_t, d, k, DIVERGENCE, ONE_PASS)
    # Beside the 1 of the row's maximum a sum loses all below 6e-8. That lane is read and summed again, without.
    lane_s = tl.min(tl.where(m_s == top_s, lanes, LANES), 0)
    lane_t = tl.min(tl.where(m_t == top_t, lanes, LANES), 0)
    more_s = tl.sum(tl.where(lanes == lane_s, 0.0, w_s * l_s), 0)
    more_t = tl.sum(tl.where(lanes == lane_t, 0.0, w_t * l_t), 0)
    few = tl.arange(0, IN_LANE)
    few = few // WIDTH * (LANES * WIDTH) + few % WIDTH
    few_s, _ = pair(xs_ptr, xt_ptr, bias_ptr, teacher_bias_ptr, few + lane_s * WIDTH, V, in_scale, HAS_SOFTCAP, LINEAR)
    _, few_t = pair(xs_ptr, xt_ptr, bias_ptr, teacher_bias_ptr, few + lane_t * WIDTH, V, in_scale, HAS_SOFTCAP, LINEAR)
    more_s = _with_lane(more_s, few_s - top_s, k)
    more_t = _with_lane(more_t, few_t - top_t, k)
    log_s = _log1p(more_s)
    log_t = _log1p(more_t)
    l_s = 1.0 + more_s
    l_t = 1.0 + more_t

    grad_sum = 0.0
    if ONE_PASS:
        d = tl.sum(d, 0)
        if DIVERGENCE == FORWARD_KL:
            kl = kappa * d / l_t - _log1p((more_t - more_s) / l_s)
        else:
            d = kappa * d / l_s
            kl = d - _log1p((more_s - more_t) / l_t)
            # G with the rounded log-sums that the gradient will use: ps (ls - lt - G) does not see an error that is
            # in both ls - lt and G.
            grad_sum = (d.to(tl.float64) - (log_s.to(tl.float64) - log_t.to(tl.float64))).to(tl.float32)
    else:
        f_sum = tl.zeros([LANES], tl.float32)
        g_sum = tl.zeros([LANES], tl.float32)
        p_sum = tl.zeros([LANES], tl.float32)
        for start in range(0, V, BLOCK_V):
            y_s, y_t = pair(xs_ptr, xt_ptr, bias_ptr, teacher_bias_ptr, start + block, V, in_scale, HAS_SOFTCAP, LINEAR)
            ls = tl.fma(y_s - top_s, kappa, -log_s)
            lt = tl.fma(y_t - top_t, kappa, -log_t)
            ps = tl.exp(ls)
            f, g = _summands(ls, lt, ps, beta, clip, log_floor, DIVERGENCE, NONNEGATIVE)
            f_sum += _over(f)
            g_sum += _over(g)
            p_sum += _over(ps)
        kl = tl.sum(f_sum, 0)
        grad_sum = tl.sum(g_sum, 0) / tl.sum(p_sum, 0)  # p_sum is 1 but for the rounding of the log-sum

    out_ptr += row
    entropy_s = log_s - kappa * tl.sum(a_s, 0) / l_s
    entropy_t = log_t - kappa * tl.sum(a_t, 0) / l_t
    store_row(out_ptr, stride_out, kl, entropy_s, entropy_t, top_s, top_t, log_s, log_t, grad_sum, kappa)
    if target_ptr is not None:
        target = tl.load(target_ptr + row).to(tl.int64)
        y_s, y_t = pair(xs_ptr, xt_ptr, bias_ptr, teacher_bias_ptr, target, V, in_scale, HAS_SOFTCAP, LINEAR)
        tl.store(out_ptr + STUDENT_LOGPS * stride_out, kappa * (y_s - top_s) - log_s)
        tl.store(out_ptr + TEACHER_LOGPS * stride_out, kappa * (y_t - top_t) - log_t)


@triton.jit
def store_row(out_ptr, stride, kl, entropy_s, entropy_t, top_s, top_t, log_s, log_t, grad_sum, kappa):
    """A row of the table, but for the log-probs of its target."""
    tl.store(out_ptr + KL * stride, kl)
    tl.store(out_ptr + STUDENT_ENTROPY * stride, entropy_s)
    tl.store(out_ptr + TEACHER_ENTROPY * stride, entropy_t)
    tl.store(out_ptr + STUDENT_LSE * stride, tl.fma(top_s, kappa, log_s))
    tl.store(out_ptr + TEACHER_LSE * stride, tl.fma(top_t, kappa, log_t))
    tl.store(out_ptr + STUDENT_TOP * stride, top_s)
    tl.store(out_ptr + TEACHER_TOP * stride, top_t)
    tl.store(out_ptr + STUDENT_LOG_SUM * stride, log_s)
    tl.store(out_ptr + TEACHER_LOG_SUM * stride, log_t)
    tl.store(out_ptr + GRAD_SUM * stride, grad_sum)


@triton.jit
def gradient_kernel(
    xs_ptr,  # (C, V)
    xt_ptr,  # (C, V)
    bias_ptr,  # (V,)
    teacher_bias_ptr,  # (V,)
    top_s_ptr,  # (C,)
    top_t_ptr,  # (C,)
    log_s_ptr,  # (C,)
    log_t_ptr,  # (C,)
    grad_sum_ptr,  # (C,)
    weights_ptr,  # (C,)
    out_ptr,  # (C, V)
    V,
    stride_xs,
    stride_xt,
    stride_out,
    in_scale,
    kappa,
    chain,
    beta,
    clip,
    log_floor,
    DIVERGENCE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NONNEGATIVE: tl.constexpr,
    LINEAR: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    xs_ptr += row * stride_xs
    xt_ptr += row * stride_xt
    out_ptr += row * stride_out
    top_s = tl.load(top_s_ptr + row)
    top_t = tl.load(top_t_ptr + row)
    log_s = tl.load(log_s_ptr + row)
    log_t = tl.load(log_t_ptr + row)
    weight = tl.load(weights_ptr + row).to(tl.float32)
    for start in range(0, V, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        y_s, y_t = pair(xs_ptr, xt_ptr, bias_ptr, teacher_bias_ptr, cols, V, in_scale, HAS_SOFTCAP, LINEAR)
        ls = tl.fma(y_s - top_s, kappa, -log_s)
        lt = tl.fma(y_t - top_t, kappa, -log_t)
        ps = tl.exp(ls)
        _, dz = _summands(ls, lt, ps, beta, clip, log_floor, DIVERGENCE, NONNEGATIVE)
        if clip is not None or log_floor is not None or DIVERGENCE != FORWARD_KL:
            dz -= ps * tl.load(grad_sum_ptr + row)
        dz *= weight * chain
        if HAS_SOFTCAP:
            dz *= 1.0 - y_s * y_s
        dz = tl.where(weight == 0.0, 0.0, dz)
        tl.store(out_ptr + cols, dz.to(out_ptr.dtype.element_ty), mask=cols < V)


@triton.jit
def pair(
    xs_ptr,
    xt_ptr,
    bias_ptr,
    teacher_bias_ptr,
    cols,
    V,
    in_scale,
    HAS_SOFTCAP: tl.constexpr,
    LINEAR: tl.constexpr,
    BEYOND: tl.constexpr = MINUS_INF,
    FULL: tl.constexpr = False,
):
    """y of both sides at ``cols``. Beyond V it is BEYOND: -inf is a probability of zero on both sides, which no sum
    sees. FULL: no column is. LINEAR: the student's block holds the difference to the teacher's."""
    x_s = _load(xs_ptr, cols, V, FULL)
    x_t = _load(xt_ptr, cols, V, FULL)
    if LINEAR:
        x_s += x_t
    y_s = _formed(x_s, bias_ptr, cols, V, in_scale, HAS_SOFTCAP, BEYOND, FULL)
    y_t = _formed(x_t, teacher_bias_ptr, cols, V, in_scale, HAS_SOFTCAP, BEYOND, FULL)
    return y_s, y_t


@triton.jit
def _load(x_ptr, cols, V, FULL: tl.constexpr):
    if FULL:
        x = tl.load(x_ptr + cols)
    else:
        x = tl.load(x_ptr + cols, mask=cols < V, other=0.0)
    return x.to(tl.float32)


@triton.jit
def _formed(x, bias_ptr, cols, V, in_scale, HAS_SOFTCAP: tl.constexpr, BEYOND: tl.constexpr, FULL: tl.constexpr):
    if bias_ptr is not None:
        x += _load(bias_ptr, cols, V, FULL)
    if in_scale is not None:
        x *= in_scale
    if HAS_SOFTCAP:
        x = _tanh(x)
    if not FULL:
        x = tl.where(cols < V, x, BEYOND)
    return x


@triton.jit
def _with_block(y_s, y_t, m_s, m_t, l_s, l_t, a_s, a_t, d, k, DIVERGENCE: tl.constexpr, ONE_PASS: tl.constexpr):
    """The lanes' maxima and sums of `statistics_kernel` with those of one more block."""
    top_s = tl.maximum(m_s, tl.max(tl.max(y_s, 2), 0))
    top_t = tl.maximum(m_t, tl.max(tl.max(y_t, 2), 0))
    w_s, w_t, a_s, a_t, d = _rescaled(top_s - m_s, top_t - m_t, l_s, l_t, a_s, a_t, d, k, DIVERGENCE, ONE_PASS)
    u_s = y_s - top_s[None, :, None]
    u_t = y_t - top_t[None, :, None]
    e_s = tl.exp2(k * u_s)
    e_t = tl.exp2(k * u_t)
    l_s = w_s * l_s + _over(e_s)
    l_t = w_t * l_t + _over(e_t)
    if ONE_PASS:
        if DIVERGENCE == FORWARD_KL:
            d += _over(_times(e_t, u_t - u_s))
        else:
            d += _over(_times(e_s, u_s - u_t))
    a_s += _over(_times(e_s, u_s))
    a_t += _over(_times(e_t, u_t))
    return top_s, top_t, l_s, l_t, a_s, a_t, d


@triton.jit
def _over(block):
    """The sum of a block's columns in each lane."""
    return tl.sum(tl.sum(block, 2), 0)


@triton.jit
def _with_lane(more, u, k):
    """A row's sum of exponentials but for one 1, from the sum of all lanes but one, and that one's y - top."""
    more += tl.sum(tl.where(u == 0.0, 0.0, tl.exp2(k * u)), 0)
    return more + (tl.sum(tl.where(u == 0.0, 1.0, 0.0), 0) - 1.0)


@triton.jit
def _rescaled(rise_s, rise_t, l_s, l_t, a_s, a_t, d, k, DIVERGENCE: tl.constexpr, ONE_PASS: tl.constexpr):
    """exp(-kappa rise) of both sides, and the sums of `statistics_kernel` after their maxima rose."""
    w_s = tl.exp2(-k * rise_s)
    w_t = tl.exp2(-k * rise_t)
    if ONE_PASS:
        # d is infinite where q is -inf and p is not; `_times` for when a later maximum makes p negligible.
        if DIVERGENCE == FORWARD_KL:
            d = _times(w_t, d + (rise_s - rise_t) * l_t)
        else:
            d = _times(w_s, d + (rise_t - rise_s) * l_s)
    a_s = w_s * (a_s - rise_s * l_s)
    a_t = w_t * (a_t - rise_t * l_t)
    return w_s, w_t, a_s, a_t, d


@triton.jit
def _summands(
    ls,
    lt,
    ps,
    beta,
    clip,
    log_floor,
    DIVERGENCE: tl.constexpr,
    NONNEGATIVE: tl.constexpr,
):
    """(f, g) of the table in `divergence`."""
    if log_floor is not None:
        lt = tl.maximum(lt, ls + log_floor, propagate_nan=tl.PropagateNan.ALL)
    pt = tl.exp(lt)
    if DIVERGENCE == FORWARD_KL:
        f = _times(pt, lt - ls)
        g = ps - pt
        clipped_g = ps
    elif DIVERGENCE == REVERSE_KL:
        f = _times(ps, ls - lt)
        g = f
        clipped_g = -ps
    else:
        d = lt - ls
        mixed = _log1p(tl.where(d > 0.0, 1.0 - beta, beta) * _expm1(-tl.abs(d)))
        g = (1.0 - beta) * _times(ps, tl.minimum(-d, 0.0) - mixed)
        f = g + beta * _times(pt, tl.minimum(d, 0.0) - mixed)
        clipped_g = tl.zeros_like(ps)
    if NONNEGATIVE:
        clipped_g = tl.zeros_like(ps)
        if DIVERGENCE == FORWARD_KL:
            f += ps - pt
        elif DIVERGENCE == REVERSE_KL:
            f += pt - ps
    if clip is not None:
        clipped = f > clip
        f = tl.where(clipped, clip, f)
        g = tl.where(clipped, clipped_g, g)
    return f, g


@triton.jit
def _times(p, log_ratio):
    """p * log_ratio with 0 log 0 = 0. The product comes last, where a sum can take it in."""
    return p * tl.where(p == 0.0, 0.0, log_ratio)


# Written out: libdevice does not run in the interpreter, and exp(x) - 1 and log(1 + x) are inaccurate near 0.


@triton.jit
def _expm1(x):
    """exp(x) - 1 for x <= 0. Taylor's next term at -0.35 is 2e-8 of the result."""
    series = x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040)))))
    return tl.where(x > -0.35, x + x * x * (0.5 + series), tl.exp(x) - 1.0)


@triton.jit
def _log1p(x):
    """log(1 + x) = 2 atanh(x / (2 + x)). The series' next term at |w| = 0.18 is 3e-9 of the result."""
    w = x / (2.0 + x)
    w2 = w * w
    series = w2 * (1 / 3 + w2 * (1 / 5 + w2 * (1 / 7 + w2 * (1 / 9))))
    return tl.where(tl.abs(w) < 0.18, 2.0 * w * (1.0 + series), tl.log(1.0 + x))


@triton.jit
def _tanh(x):
    """-expm1(-2 |x|) / (2 + expm1(-2 |x|)) with the sign of x: relative accuracy also near 0."""
    e = _expm1(-2.0 * tl.abs(x))
    y = -e / (2.0 + e)
    return tl.where(x < 0.0, -y, y)
