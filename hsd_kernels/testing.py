"""How a kernel's error is judged: against fp64, measured by what plain PyTorch loses in the same dtype. And the small
problems it is judged on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from hsd_kernels.divergence import Divergence, RowSpec
from hsd_kernels.head import Head


def assert_within_budget(
    name: str, candidate: Tensor, same_dtype: Tensor, exact: Tensor, scale: float | None = None
) -> None:
    """max |candidate - exact| <= 2 (max |same_dtype - exact| + band), band = eps(candidate) * scale.

    ``exact`` is the fp64 result and ``same_dtype`` that of an eager evaluation in the candidate's arithmetic.
    ``scale`` is the magnitude of the numbers that were rounded on the way, by default the largest result.
    Infinities must be the same infinities and ``exact`` holds no NaN.
    """
    candidate64, same64, exact = (t.detach().cpu().double() for t in (candidate, same_dtype, exact))
    finite = exact.isfinite()
    if not torch.equal(candidate64[~finite], exact[~finite]) or not candidate64[finite].isfinite().all():
        raise AssertionError(f"{name}: expected {exact} where it is not finite, got {candidate64}")
    if not finite.any():
        return
    if scale is None:
        scale = exact[finite].abs().max().item()
    error, same_error = ((t - exact)[finite].abs().max().item() for t in (candidate64, same64))
    budget = 2.0 * (same_error + torch.finfo(candidate.dtype).eps * scale)
    if not error <= budget:
        allowed = f"{budget:.3g} (the same dtype: {same_error:.3g})"
        raise AssertionError(f"{name}: expected an error of at most {allowed}, got {error:.3g}")


def check_budget(name: str, got: Tensor, eager: Tensor, exact: Tensor) -> None:
    """One rounding of the result to its dtype, and of fp32 logits of up to about 20 on the way."""
    way = 20.0 * torch.finfo(torch.float32).eps / torch.finfo(got.dtype).eps
    scale = max(exact.abs().max().item(), 1e-4)
    assert_within_budget(name, got, eager.to(got.dtype), exact, scale=scale * (1.0 + way))
    if exact.abs().max() > 1e-4:
        ours, theirs = (((t - exact).abs().sum() / exact.abs().sum()).item() for t in (got, eager.to(got.dtype)))
        assert ours <= 2.0 * theirs + 1e-5, f"{name}: relative L1 error {ours:.1e}, eager {theirs:.1e}"


def draw(
    *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, seed: int = 0, grad: bool = False
) -> Tensor:
    """Gaussian numbers that depend on nothing but the shape and ``seed``."""
    g = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=g) * scale).to(dtype).requires_grad_(grad)


def small_problem(
    tokens: int = 10, dim: int = 16, vocab: int = 61, dtype: torch.dtype = torch.float32, near: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(student_hidden, teacher_hidden, head weight); the teacher within ``near`` of the student if given."""
    student = draw(tokens, dim, dtype=dtype)
    teacher = draw(tokens, dim, seed=1) if near is None else student.float() + near * draw(tokens, dim, seed=1)
    return student, teacher.to(dtype), draw(vocab, dim, dtype=dtype, scale=0.5, seed=2)


def logit_pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(N, V) logits, chosen freely, as the two hidden states and the head of a call: an identity as head."""
    return student, teacher, torch.eye(student.shape[-1], dtype=student.dtype)


def double(*tensors: Tensor) -> list[Tensor]:
    return [t.double() for t in tensors]


def grads(
    loss_fn: Callable[..., Any],
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    upstream: Tensor | None = None,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    **options: Any,
) -> list[Tensor]:
    """[loss, d student, d weight, d bias] from fresh leaves. `flat` options."""
    student, weight = (t.detach().clone().requires_grad_() for t in (student, weight))
    bias = None if bias is None else bias.detach().clone().requires_grad_()
    loss = loss_fn(student, teacher, Head(weight, bias, logit_scale, softcap), **flat(**options))
    loss.backward(upstream)
    return [loss.detach(), *(t.grad for t in (student, weight, bias) if t is not None and t.grad is not None)]


def flat(divergence: str = "forward_kl", **options: Any) -> dict[str, Any]:
    """Options of `fused_hsd_kl` in which the fields of `Divergence` stand under their own names."""
    given = {f.name: options.pop(f.name) for f in fields(Divergence) if f.name in options}
    return {"divergence": Divergence(divergence, **given), **options}


def row_spec(
    kind: str = "forward_kl",
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    linear: bool = False,
    **divergence: Any,
) -> RowSpec:
    return RowSpec(Divergence(kind, **divergence), logit_scale, softcap, linear)


def rows_of_bytes(rows: int, vocab: int, itemsize: int = 4) -> int:
    """chunk_bytes that give chunks of exactly ``rows``."""
    return 2 * rows * vocab * itemsize
