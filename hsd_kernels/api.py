"""The contract: what `fused_hsd_kl` computes, accepts, returns and refuses."""

from __future__ import annotations

import math
import numbers
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hsd_kernels.checks import (
    REDUCTIONS,
    check_head_shape,
    check_hidden_shape,
    check_not_transformed,
    check_operand,
    check_per_token,
    check_range,
    check_reference,
)
from hsd_kernels.divergence import DIVERGENCES, Divergence, RowSpec
from hsd_kernels.driver import TokenWeightFn
from hsd_kernels.head import Head, as_head
from hsd_kernels.op_support import autocast_to, wants, wide_dtype
from hsd_kernels.ops import Options, Tensors, call, numbered
from hsd_kernels.row_stats import RowStats
from hsd_kernels.rows import IMPLS
from hsd_kernels.values import check_choice, check_positive
from hsd_kernels.vocab_filter import FILTER_AUTO


class HSDKLOutput(NamedTuple):
    """Everything the pass knows per token. Only ``loss`` carries a gradient. The columns of the two tables have the
    leading shape of ``student_hidden``. Tokens of weight 0 are never computed and hold 0."""

    loss: Tensor
    stats: RowStats  # of student and teacher
    reference: RowStats | None  # of student and reference policy (its "teacher"), None without one
    filtered_share: Tensor | None  # scalar: L1 share of the logit gradient that filter_eps left out, None without it


def fused_hsd_kl(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    head: Tensor | Head,
    *,
    divergence: str | Divergence = "forward_kl",
    teacher_head: Tensor | Head | None = None,
    reference_hidden: Tensor | None = None,
    reference_head: Tensor | Head | None = None,
    reference_coef: float = 0.0,
    target_ids: Tensor | None = None,
    token_weights: Tensor | None = None,
    token_weight_fn: TokenWeightFn | None = None,
    reduction: str = "mean",
    num_items: float | None = None,
    logits_dtype: torch.dtype | None = None,
    filter_eps: float | str | None = None,
    memory_bytes: int | None = None,
    impl: str = "auto",
    process_group: Any = None,
    return_stats: bool = False,
) -> Tensor | HSDKLOutput:
    """Full-vocabulary divergence between teacher and student from hidden states, without (tokens, vocabulary) logits.

    Equivalent, for the defaults, to::

        student = F.log_softmax(F.linear(student_hidden, head).float(), -1)
        teacher = F.log_softmax(F.linear(teacher_hidden, head).float(), -1).detach()
        loss = (teacher.exp() * (teacher - student)).sum(-1).mean()

    but both projections are one GEMM, the gradient is made while the logits of a chunk are at hand, and the largest
    intermediate is ``memory_bytes``; ``reference_coef * KL(student || reference)`` can be added per token in the same
    pass. The logits compared are ``softcap * tanh(logit_scale * (h W^T + b) / softcap) / temperature`` on both sides.

    Error of the gradient in fp32, given the logits: a probability is formed from its logit's distance to the row's
    largest and is off by about 6e-8 of that distance, whatever is common to the row. A row whose probable token has
    1 - p left loses about 6e-8 / (1 - p) of its gradient, as any difference of two fp32 probabilities does. The logits
    themselves are rounded at 6e-8 of their size by the product that makes them.

    Args:
        student_hidden: (..., D), fp32, bf16, fp16 or fp64. Gets a gradient.
        teacher_hidden: (..., D) with the same leading shape, or (..., D') if ``teacher_head`` is (V, D'). Never a
            gradient: it must not require one.
        head: the head of both sides, a `Head` or its weight (V, D). Weight and bias get a gradient if they require
            one, accumulated in fp32.
        divergence: a `Divergence`, or the ``kind`` of one with every other field at its default.
        teacher_head: a head of the teacher's own, a `Head` or a weight (V, D'), without gradient. It has the scale and
            the cap of ``head``; a plain weight takes them.
        reference_hidden, reference_head: a reference policy's hidden states (..., D) and, if it is not the student's,
            its head; no gradient. Given with ``reference_coef`` > 0 and only then.
        reference_coef: adds ``reference_coef * KL(student || reference)`` to every token, over the full vocabulary and
            at temperature 1: a third block of the stacked GEMM, 5U in all.
        target_ids: (...), integers in [0, V) wherever the weight is not 0: the tokens whose log-probs the statistics
            report. Out of range is an error on a CPU and a log-prob of NaN on CUDA, where a check would synchronize.
        token_weights: (...), finite, without gradient; multiplies each token's divergence. Tokens of weight 0 are
            dropped before the GEMM. Costs one host synchronization.
        token_weight_fn: called once per chunk with `RowStats` (including ``rows``, the flat token positions); returns
            the (C,) weights, finite, that multiply those of ``token_weights`` (but not for the reference term). No
            gradient flows through it. One host synchronization a call. Not available under
            ``torch.compile(fullgraph=True)``.
        reduction: "mean" over the tokens of nonzero ``token_weights`` (or ``num_items``), "sum", or "none".
        num_items: replaces the count that "mean" divides by, for gradient accumulation.
        logits_dtype: None keeps the logits of a chunk in fp32. torch.bfloat16, for bf16 inputs, one head and no
            reference, stores the teacher's logits and the difference to the student's (the head is linear) in bf16:
            half the traffic, and on a CPU a faster GEMM, for an error in the gradient of 2.2 to 3.4 % by KL quartile
            where fp32 logits leave 0.2 % (benchmarks/results/error_smollm2.md).
        filter_eps: leaves columns of the logit gradient out of the two backward GEMMs, per chunk: with a number those
            where no entry exceeds ``filter_eps`` times the largest token weight; with "auto" the lightest ones, as
            long as their share of the L1 mass is at most what rounding to the input dtype loses (0.14 % for bf16).
            The statistics return the measured share. One host synchronization a chunk. Exact by default.
        memory_bytes: for the logits of a chunk of tokens and the gradient dz of a buffer of chunks; by default 1,640
            MiB on CUDA and 704 MiB elsewhere. More makes the products with dz taller: on an H100 with 32,768 tokens,
            1.14 of the bare GEMMs by default, 1.13 at 4.6 GiB (benchmarks/results/gpu_h100.md). It does not depend on
            what is free, so that results repeat. A CPU keeps the memory for the next call
            (`hsd_kernels.release_memory`).
        impl: "auto" (Triton on CUDA, C++ on a CPU in fp32 and bf16, torch elsewhere), "torch", "triton" or "cpp". An
            explicit choice never falls back.
        process_group: the vocabulary is divided over its ranks. All heads hold this rank's rows, in rank order,
            possibly of different numbers; everything else is the same on every rank, ``target_ids`` counted over the
            whole vocabulary. Every rank gets the whole loss, statistics and gradient of ``student_hidden``.
        return_stats: return `HSDKLOutput` instead of the loss.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
        RuntimeError: for ``create_graph=True`` in a backward, and for tensors with a forward-mode tangent.

    Source: the loss of Hindsight Self-Distillation, arXiv 2606.15576.
    """
    head = as_head("head", head)
    teacher_head = None if teacher_head is None else as_head("teacher_head", teacher_head, head)
    reference_head = None if reference_head is None else as_head("reference_head", reference_head, head)
    divergence = _divergence(divergence)
    if process_group is not None and not hasattr(process_group, "group_name"):
        got = f"{process_group!r} ({type(process_group).__name__})"
        raise TypeError(f"process_group: expected a ProcessGroup of which this rank is a member or None, got {got}")
    if process_group is not None and divergence.top_k is not None:
        raise ValueError(f"divergence: expected no top_k with a sharded vocabulary, got {divergence}")
    tensors = Tensors(
        *autocast_to(
            *Tensors(
                student_hidden=student_hidden,
                teacher_hidden=teacher_hidden,
                reference_hidden=reference_hidden,
                weight=head.weight,
                bias=head.bias,
                teacher_weight=None if teacher_head is None else teacher_head.weight,
                teacher_bias=None if teacher_head is None else teacher_head.bias,
                reference_weight=None if reference_head is None else reference_head.weight,
                reference_bias=None if reference_head is None else reference_head.bias,
                target_ids=None,
                token_weights=None,
            )
        )
    )
    _check_tensors(tensors, sharded=process_group is not None)
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("impl", impl, IMPLS)
    check_positive("num_items", num_items, optional=True)
    check_positive("memory_bytes", memory_bytes, optional=True, integer=True)
    check_reference("reference_hidden", reference_hidden, reference_coef)
    _check_logits_dtype(logits_dtype, tensors)
    if token_weight_fn is not None and not callable(token_weight_fn):
        raise TypeError(f"token_weight_fn: expected a callable or None, got {type(token_weight_fn).__name__}")
    student = tensors.student_hidden
    check_per_token("target_ids", target_ids, student, "student_hidden", integers=True)
    check_per_token("token_weights", token_weights, student, "student_hidden")
    check_not_transformed("fused_hsd_kl", *tensors, token_weights)
    check_range("divergence.temperature", RowSpec(divergence, head.logit_scale, head.softcap), student)

    shape = student.shape[:-1]
    tokens = math.prod(shape)  # not numel(): it would make a dynamic number of tokens a constant for torch.export

    def flat(hidden: Tensor) -> Tensor:
        return hidden if hidden.dim() == 2 else hidden.reshape(tokens, hidden.shape[-1])

    tensors = tensors._replace(
        student_hidden=flat(student),
        teacher_hidden=flat(tensors.teacher_hidden),
        reference_hidden=None if tensors.reference_hidden is None else flat(tensors.reference_hidden),
        target_ids=None if target_ids is None else target_ids.detach().reshape(tokens),
        token_weights=None if token_weights is None else token_weights.detach().reshape(tokens),
    )
    with numbered(token_weight_fn) as hook:
        options = Options(
            logit_scale=head.logit_scale,
            softcap=head.softcap,
            linear=logits_dtype == torch.bfloat16,
            reference_coef=reference_coef,
            filter_eps=_filter_eps(filter_eps),
            memory_bytes=memory_bytes,
            impl=impl,
            group_name=None if process_group is None else process_group.group_name,
            reduction=reduction,
            num_items=num_items,
            hook=hook,
            train_hidden=wants(tensors.student_hidden),
            train_weight=wants(tensors.weight),
            train_bias=wants(tensors.bias),
        )
        out = call(tensors, divergence, options)
    loss = out.loss.reshape(shape) if reduction == "none" else out.loss
    if not return_stats:
        return loss
    rows = torch.arange(tokens, device=student.device).reshape(shape)

    def table(stacked: Tensor) -> RowStats:
        return RowStats.unstack(stacked.reshape(stacked.shape[0], *shape), rows, with_targets=target_ids is not None)

    share = None
    if filter_eps is not None:
        dropped, total = out.filtered.unbind(0)
        share = dropped / total.clamp_min(torch.finfo(total.dtype).tiny)
    reference = None if reference_hidden is None else table(out.reference_stats)
    return HSDKLOutput(loss, table(out.stats), reference, share)


def _divergence(given: Any) -> Divergence:
    if isinstance(given, str):
        return Divergence(given)
    if not isinstance(given, Divergence):
        raise TypeError(f"divergence: expected a Divergence or one of {DIVERGENCES}, got {type(given).__name__}")
    return given


def _filter_eps(given: Any) -> float | None:
    if given is None or (isinstance(given, str) and given == "auto"):
        return None if given is None else FILTER_AUTO
    if isinstance(given, bool) or not isinstance(given, numbers.Real):
        raise TypeError(f"filter_eps: expected None, 'auto' or a number, got {given!r}")
    check_positive("filter_eps", given)
    return float(given)


def _check_tensors(t: Tensors, sharded: bool) -> None:
    """``sharded``: the heads are parts of a vocabulary."""
    student = t.student_hidden
    check_operand("student_hidden", student, student, "student_hidden", trained=True)
    given = {
        "teacher_hidden": t.teacher_hidden,
        "reference_hidden": t.reference_hidden,
        "head.weight": t.weight,
        "head.bias": t.bias,
        "teacher_head.weight": t.teacher_weight,
        "teacher_head.bias": t.teacher_bias,
        "reference_head.weight": t.reference_weight,
        "reference_head.bias": t.reference_bias,
    }
    for name, operand in given.items():
        if operand is not None or name == "teacher_hidden":
            check_operand(name, operand, student, "student_hidden", trained=name.startswith("head"))
    check_head_shape("head", t.weight, t.bias, is_part=sharded)
    vocab, dim = t.weight.shape
    check_hidden_shape("student_hidden", student, dim)
    for side, hidden, weight, bias in (
        ("teacher", t.teacher_hidden, t.teacher_weight, t.teacher_bias),
        ("reference", t.reference_hidden, t.reference_weight, t.reference_bias),
    ):
        if weight is not None:
            check_head_shape(f"{side}_head", weight, bias, vocab, sharded)
        if hidden is not None:
            check_hidden_shape(f"{side}_hidden", hidden, dim if weight is None else weight.shape[1], student.shape[:-1])
        elif weight is not None:
            raise ValueError(f"{side}_head: expected None without {side}_hidden, got a head")


def _check_logits_dtype(logits_dtype: Any, t: Tensors) -> None:
    student = t.student_hidden
    wide = wide_dtype(student)
    if logits_dtype in (None, wide):
        return
    if logits_dtype != torch.bfloat16:
        raise ValueError(f"logits_dtype: expected None, {wide} or torch.bfloat16, got {logits_dtype}")
    if student.dtype != torch.bfloat16:
        raise ValueError(f"logits_dtype: expected torch.bfloat16 for bf16 inputs only, got it for {student.dtype}")
    for name, other in (("teacher_head", t.teacher_weight), ("reference_hidden", t.reference_hidden)):
        if other is not None:
            raise ValueError(f"{name}: expected None with logits_dtype=torch.bfloat16, got one")
