"""The contract: what `fused_hsd_kl` computes, accepts, returns and refuses."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hsd_kernels.checks import check_logits_dtype, check_options, check_per_token, check_tensors
from hsd_kernels.driver import STATS, TokenWeightFn
from hsd_kernels.ops import lend_hook
from hsd_kernels.vocab_filter import FILTER_AUTO


class HSDKLOutput(NamedTuple):
    """Everything the pass knows per token. Shapes are the leading shape of ``student_hidden``; nats; fp32 (fp64 for
    fp64 inputs); only ``loss`` carries a gradient. Tokens of weight 0 are never computed and hold 0."""

    loss: Tensor
    per_token_kl: Tensor
    student_logps: Tensor | None  # log-prob of target_ids, None without them
    teacher_logps: Tensor | None
    student_entropy: Tensor
    teacher_entropy: Tensor
    student_lse: Tensor
    teacher_lse: Tensor
    reference_kl: Tensor | None  # KL(student || reference) per token, None without a reference
    reference_logps: Tensor | None
    filtered_share: Tensor | None  # scalar: L1 share of the logit gradient that filter_eps left out, None without it


def fused_hsd_kl(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    lm_head_weight: Tensor,
    bias: Tensor | None = None,
    *,
    teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    reference_hidden: Tensor | None = None,
    reference_weight: Tensor | None = None,
    reference_bias: Tensor | None = None,
    reference_coef: float = 0.0,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    kl_clip: float | None = None,
    kl_clip_form: str = "opsd",
    target_ids: Tensor | None = None,
    token_weights: Tensor | None = None,
    token_weight_fn: TokenWeightFn | None = None,
    reduction: str = "mean",
    num_items: float | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    logits_dtype: torch.dtype | None = None,
    filter_eps: float | str | None = None,
    chunk_bytes: int | None = None,
    impl: str = "auto",
    process_group: Any = None,
    return_stats: bool = False,
) -> Tensor | HSDKLOutput:
    """Full-vocabulary divergence between teacher and student from hidden states, without (tokens, vocabulary) logits.

    Equivalent, for the defaults, to::

        student = F.log_softmax(F.linear(student_hidden, lm_head_weight, bias).float(), -1)
        teacher = F.log_softmax(F.linear(teacher_hidden, lm_head_weight, bias).float(), -1).detach()
        loss = (teacher.exp() * (teacher - student)).sum(-1).mean()

    but both projections are one GEMM, the gradient is made while the logits of a chunk are at hand, and the largest
    intermediate is ``chunk_bytes``; ``reference_coef * KL(student || reference)`` can be added per token in the same
    pass. The logits compared are ``softcap * tanh(logit_scale * (h W^T + b) / softcap) /
    temperature`` on both sides; there is no silent temperature^2 factor. In fp32 they and their log-sum-exp are rounded
    at 6e-8 of their size, so the relative error of the gradient is about 1e-7 times the largest of them: 3e-5 at 300,
    0.3 % at 30,000.

    Args:
        student_hidden: (..., D), fp32, bf16, fp16 or fp64. Gets a gradient.
        teacher_hidden: (..., D) with the same leading shape, or (..., D') if ``teacher_weight`` is (V, D'). Never a
            gradient: it must not require one.
        lm_head_weight: (V, D), the head shared by both sides. Gets a gradient if it requires one, accumulated in fp32.
        bias: (V,), optional, likewise.
        teacher_weight, teacher_bias: a head of the teacher's own, (V, D') and (V,); no gradient.
        reference_hidden, reference_weight, reference_bias: a reference policy's hidden states (..., D) and, if it is
            not the student's, its head; no gradient. Given with ``reference_coef`` > 0 and only then.
        reference_coef: adds ``reference_coef * KL(student || reference)`` to every token, over the full vocabulary and
            at temperature 1: a third block of the stacked GEMM, 5U in all.
        divergence: "forward_kl" = KL(teacher || student), HSD's objective; "reverse_kl" = KL(student || teacher);
            "jsd" = beta KL(teacher || m) + (1 - beta) KL(student || m), m = (1 - beta) student + beta teacher.
        beta: the teacher's share of the mixture, in [0, 1]; 0 is the forward and 1 the reverse KL. Only for "jsd".
        temperature: divides the logits of both sides, > 0.
        kl_clip: pointwise clip: every vocabulary summand is replaced by min(., kl_clip) before the sum.
        kl_clip_form: "opsd" clips the summands p log(p / q), so that the per-token value may be negative;
            "nonnegative" clips p log(p / q) - p + q, which have the same sum and none below 0.
        target_ids: (...), integers in [0, V) wherever the weight is not 0: the tokens whose log-probs the statistics
            report. Out of range is an error on a CPU and a log-prob of NaN on CUDA, where a check would synchronize.
        token_weights: (...), finite, without gradient; multiplies each token's divergence. Tokens of weight 0 are
            dropped before the GEMM. Costs one host synchronization.
        token_weight_fn: called once per chunk with `RowStats` (including ``rows``, the flat token positions); returns
            the (C,) weights that multiply those of ``token_weights`` (but not for the reference term). No gradient
            flows through it. Not available under ``torch.compile(fullgraph=True)``.
        reduction: "mean" over the tokens of nonzero ``token_weights`` (or ``num_items``), "sum", or "none".
        num_items: replaces the count that "mean" divides by, for gradient accumulation.
        logits_dtype: None keeps the logits of a chunk in fp32. torch.bfloat16, for bf16 inputs, one head and no
            reference, stores the teacher's logits and the difference to the student's (the head is linear) in bf16:
            half the traffic, and on a CPU a faster GEMM, for an error in the gradient of a few percent
            (benchmarks/README.md has it by KL quartile).
        filter_eps: leaves columns of the logit gradient out of the two backward GEMMs, per chunk: with a number those
            where no entry exceeds ``filter_eps`` times the largest token weight; with "auto" the lightest ones, as
            long as their share of the L1 mass is at most what rounding to the input dtype loses (0.14 % for bf16).
            The statistics return the measured share. One host synchronization a chunk. Exact by default.
        chunk_bytes: size of the logits workspace; by default 1 GiB on CUDA and 512 MiB elsewhere (kept for
            the next call on a CPU).
        impl: "auto" (Triton on CUDA, C++ on a CPU in fp32 and bf16, torch elsewhere), "torch", "triton" or "cpp". An
            explicit choice never falls back.
        process_group: the vocabulary is divided over its ranks. ``lm_head_weight``, ``bias`` and the heads of the
            other sides hold this rank's rows, in rank order, possibly of different numbers; everything else is the
            same on every rank, ``target_ids`` counted over the whole vocabulary. Every rank gets the whole loss,
            statistics and gradient of ``student_hidden``.
        return_stats: return `HSDKLOutput` instead of the loss.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    Source: the loss of Hindsight Self-Distillation, arXiv 2606.15576; JSD and clip as in OPSD, arXiv 2601.18734.
    """
    given = {
        "student_hidden": student_hidden,
        "teacher_hidden": teacher_hidden,
        "reference_hidden": reference_hidden,
        "lm_head_weight": lm_head_weight,
        "bias": bias,
        "teacher_weight": teacher_weight,
        "teacher_bias": teacher_bias,
        "reference_weight": reference_weight,
        "reference_bias": reference_bias,
    }
    given = _autocast(given)
    check_tensors(given, sharded=process_group is not None)
    numeric = {
        "beta": beta,
        "temperature": temperature,
        "logit_scale": logit_scale,
        "reference_coef": reference_coef,
        "kl_clip": kl_clip,
        "num_items": num_items,
        "softcap": softcap,
        "chunk_bytes": chunk_bytes,
    }
    check_options(
        divergence=divergence,
        kl_clip_form=kl_clip_form,
        reduction=reduction,
        filter_eps=filter_eps,
        impl=impl,
        **numeric,
    )
    needed = True if reference_coef > 0 else False
    if needed == (reference_hidden is None):
        expected = "a tensor with reference_coef > 0, None without"
        got = "None" if reference_hidden is None else "a tensor"
        raise ValueError(f"reference_hidden: expected {expected}, got {got} and reference_coef={reference_coef}")
    check_logits_dtype(logits_dtype, given)
    if token_weight_fn is not None and not callable(token_weight_fn):
        raise TypeError(f"token_weight_fn: expected a callable or None, got {type(token_weight_fn).__name__}")
    student = given["student_hidden"]
    check_per_token("target_ids", target_ids, student)
    check_per_token("token_weights", token_weights, student)

    shape, tokens = student.shape[:-1], student.shape[:-1].numel()
    flat = [t.reshape(tokens, t.shape[-1]) if t is not None and "hidden" in name else t for name, t in given.items()]
    per_token = [None if t is None else t.detach().reshape(tokens) for t in (target_ids, token_weights)]
    trained = (flat[0], flat[3], flat[4])
    with lend_hook(token_weight_fn) as hook:
        loss, stats, _, filtered, *_ = torch.ops.hsd_kernels.fused_hsd_kl(
            *flat,
            *per_token,
            divergence,
            float(beta),
            float(temperature),
            None if kl_clip is None else float(kl_clip),
            kl_clip_form,
            float(logit_scale),
            None if softcap is None else float(softcap),
            logits_dtype == torch.bfloat16,
            float(reference_coef),
            None if filter_eps is None else FILTER_AUTO if filter_eps == "auto" else float(filter_eps),
            None if chunk_bytes is None else int(chunk_bytes),
            impl,
            None if process_group is None else process_group.group_name,
            reduction,
            None if num_items is None else float(num_items),
            hook,
            [torch.is_grad_enabled() and t is not None and t.requires_grad for t in trained],
        )
    loss = loss.reshape(shape) if reduction == "none" else loss
    if not return_stats:
        return loss
    columns = dict(zip(STATS, (s.reshape(shape) for s in stats.unbind(0)), strict=True))
    del columns["grad_sum"]
    for name in columns:
        absent = (target_ids is None and name.endswith("logps")) or (reference_hidden is None and "reference" in name)
        columns[name] = None if absent else columns[name]
    share = None if filter_eps is None else filtered[0] / filtered[1].clamp_min(torch.finfo(filtered.dtype).tiny)
    return HSDKLOutput(loss, columns.pop("kl"), **columns, filtered_share=share)


def _autocast(given: dict[str, Any]) -> dict[str, Any]:
    """Under autocast a linear layer runs in the autocast dtype; so does the head here."""
    first = given["student_hidden"]
    # The meta device has no autocast. Dynamo of torch 2.8 cannot trace torch.amp.is_autocast_available.
    if not isinstance(first, Tensor) or (kind := first.device.type) == "meta" or not torch.is_autocast_enabled(kind):
        return given
    dtype = torch.get_autocast_dtype(kind)
    low = (torch.float32, torch.bfloat16, torch.float16)
    return {n: t.to(dtype) if isinstance(t, Tensor) and t.dtype in low else t for n, t in given.items()}
