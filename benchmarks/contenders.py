"""Everyone who computes this loss: mean over tokens of KL(teacher || student) from hidden states and a shared head.

A contender is a function (student, teacher, weight) -> scalar loss; its backward gives dH and dW. A yardstick is the
same for cross-entropy with `target_ids` as labels, which has no teacher: it is compared with GEMMs of 3U.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hsd_kernels import Head, memory

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def fused(student: Tensor, teacher: Tensor, weight: Tensor | Head, **options: Any) -> Any:
    """Every call of `hsd_kernels.fused_hsd_kl` from the benchmarks: the one place that knows its keywords."""
    from hsd_kernels import fused_hsd_kl

    return fused_hsd_kl(student, teacher, weight, **options)


def exact(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    return fused(student, teacher, weight)


def roomy(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    return fused(student, teacher, weight, memory_bytes=2 << 30)


def torch_rows(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    return fused(student, teacher, weight, impl="torch")


def filtered(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    return fused(student, teacher, weight, filter_eps="auto")


def filtered_at_1e_5(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    return fused(student, teacher, weight, filter_eps=1e-5)


def linear_bf16(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    return fused(student, teacher, weight, logits_dtype=torch.bfloat16)


def naive(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    ls = F.log_softmax(F.linear(student, weight).float(), -1)
    with torch.no_grad():
        lt = F.log_softmax(F.linear(teacher, weight).float(), -1)
    return F.kl_div(ls, lt, log_target=True, reduction="none").sum(-1).mean()


def naive_compiled(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    return _compiled(naive)(student, teacher, weight)


@functools.cache
def _compiled(function: Loss) -> Loss:
    return torch.compile(function, dynamic=False)


def trl_chunked(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    per_token, _ = ChunkedDivergenceFunction.apply(student, weight, None, teacher, weight.detach(), None, 0.0)  # type: ignore[misc]
    return per_token.mean()


def liger_chunked(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # pyright: ignore[reportMissingImports]

    # Its default compiles the chunks; on a CPU that takes longer than it saves.
    options = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0, "beta": 0.0, "compiled": student.is_cuda}
    ids = torch.zeros(student.shape[0], dtype=torch.long, device=student.device)
    return LigerFusedLinearJSDLoss(**options)(student, weight, teacher, weight.detach(), ids)


def liger_triton(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.transformers.fused_linear_jsd import (
        LigerFusedLinearJSD,  # pyright: ignore[reportMissingImports]
    )

    return LigerFusedLinearJSD(jsd_beta=0.0)(student, weight, teacher, weight.detach(), None)


def fla_triton(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    from fla.modules.fused_kl_div import FusedKLDivLoss  # pyright: ignore[reportMissingImports]

    return FusedKLDivLoss()(student, teacher, weight, weight.detach())


def labels(student: Tensor, weight: Tensor) -> Tensor:
    """Of the yardsticks: the same for everyone."""
    return torch.arange(student.shape[0], device=student.device) * 7919 % weight.shape[0]


def cross_entropy(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    logits = F.linear(student, weight)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, labels(student, weight))


def quack_cross_entropy(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy  # pyright: ignore[reportMissingImports]

    return chunked_linear_cross_entropy(student, weight, labels(student, weight), reduction="mean")


def cut_cross_entropy(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

    return linear_cross_entropy(student, weight, labels(student, weight))


CONTENDERS: dict[str, Loss] = {
    "hsd_kernels": exact,
    "hsd_kernels, torch rows": torch_rows,
    "hsd_kernels, 2 GiB chunks": roomy,
    "hsd_kernels, filter auto": filtered,
    "hsd_kernels, filter 1e-5": filtered_at_1e_5,
    "hsd_kernels, linear bf16": linear_bf16,
    "naive full logits": naive,
    "naive, torch.compile": naive_compiled,
    "TRL chunked": trl_chunked,
    "Liger chunked": liger_chunked,
    "Liger Triton JSD": liger_triton,
    "FLA fused KL": fla_triton,
}
YARDSTICKS: dict[str, Loss] = {"quack cross-entropy": quack_cross_entropy, "CCE cross-entropy": cut_cross_entropy}
# What each imports, so that its absence can be named.
NEEDS = {
    "TRL chunked": ("datasets", "trl"),
    "Liger chunked": ("liger_kernel",),
    "Liger Triton JSD": ("liger_kernel",),
    "FLA fused KL": ("fla",),
    "quack cross-entropy": ("cutlass", "quack"),
    "CCE cross-entropy": ("cut_cross_entropy",),
}
GPU_ONLY = ("Liger Triton JSD", "FLA fused KL")


def contenders(device: str, dtype: str) -> dict[str, str | None]:
    """Names, each with the reason why it is left out here, or None."""
    reasons: dict[str, str | None] = dict.fromkeys(CONTENDERS)
    if device == "cpu":
        reasons |= dict.fromkeys(GPU_ONLY, "needs a GPU")
    else:
        reasons["hsd_kernels, 2 GiB chunks"] = f"for CPUs, where the default is {memory.DEFAULT_MEMORY_BYTES >> 20} MiB"
    if dtype != "bfloat16":
        reasons["hsd_kernels, linear bf16"] = "for bf16 inputs"
    return reasons


def step(loss_fn: Loss, student: Tensor, teacher: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One forward and backward: (loss, dH, dW)."""
    student, weight = student.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = loss_fn(student, teacher, weight)
    loss.backward()
    assert student.grad is not None and weight.grad is not None
    return loss.detach(), student.grad, weight.grad


def bare_gemms(
    student: Tensor, teacher: Tensor, weight: Tensor, rows: int, wide_dw: bool = False, backward: str = "dH dW"
) -> Callable[[], None]:
    """The floor, 4U FLOPs: the stacked forward GEMM and both backward GEMMs in chunks of ``rows`` tokens, outputs
    preallocated and in the input dtype, dW in fp32 with ``wide_dw``. ``backward`` "dH" is 3U, "" 2U."""
    z = student.new_empty(2 * rows, weight.shape[0])
    dh = torch.empty_like(student[:rows])
    wide_dw = wide_dw and student.is_cuda and student.dtype != torch.float32
    dw = torch.zeros_like(weight, dtype=torch.float32 if wide_dw else weight.dtype) if "dW" in backward else None

    def run() -> None:
        for start in range(0, student.shape[0], rows):
            h = student[start : start + rows]
            n = len(h)
            torch.mm(torch.cat([h, teacher[start : start + n]]), weight.t(), out=z[: 2 * n])
            if "dH" in backward:
                torch.mm(z[:n], weight, out=dh[:n])
            if dw is None:
                continue
            if wide_dw:
                torch.addmm(dw, z[:n].t(), h, out_dtype=torch.float32, out=dw)
            else:
                dw.addmm_(z[:n].t(), h)

    return run
