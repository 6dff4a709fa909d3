"""Part a: the row kernels as the card computes them, ex2.approx and div.full included, against fp64.

The head is an identity, so that the logits are the hidden states, dH is dz and no product rounds anything (fp32, no
TF32). Beside the Triton rows stand the torch rows, plain fp32 arithmetic on the same card.
"""

from __future__ import annotations

import math

import torch
from contenders import fused
from suite import Recorder, Row, markdown
from torch import Tensor

SIZES = {"cuda": (64, 8192), "cpu": (4, 192)}
ALLOWED = 2.0  # times the error of plain fp32 arithmetic, plus
FLOOR = 1e-6  # of dz, relative
ROUNDING = 2**-23  # of the largest logit, of a divergence
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
# name: (spread of the logits, distance of the teacher, 1 - p_top or None, common offset)
CASES: dict[str, tuple[float, float, float | None, float]] = {
    "flat": (2.0, 0.5, None, 0.0),
    "near": (2.0, 1e-3, None, 0.0),
    "offset 100": (2.0, 0.5, None, 100.0),
    "steep": (40.0, 2.0, None, 0.0),
    "confident 1e-2": (2.0, 0.1, 1e-2, 0.0),
    "confident 1e-5": (2.0, 0.1, 1e-5, 0.0),
    "confident 1e-8": (2.0, 0.1, 1e-8, 0.0),
}


def logits(case: str, device: str) -> tuple[Tensor, Tensor]:
    """Student and teacher, fp32, teacher near the student; ``p_top`` of the student by one raised logit."""
    spread, distance, left, offset = CASES[case]
    n, vocab = SIZES[device]
    g = torch.Generator().manual_seed(len(case))
    student = torch.randn(n, vocab, generator=g) * spread + offset
    noise = distance * torch.randn(n, vocab, generator=g)
    if left is not None:
        at = torch.arange(n)
        rest = student.double().scatter(1, at[:, None], -torch.inf).logsumexp(-1)
        student[at, at] = (rest + math.log(1 / left - 1)).float()
    return student.to(device), (student + noise).to(device)


def exact(student: Tensor, teacher: Tensor, divergence: str) -> tuple[Tensor, Tensor]:
    """Per-row divergence and its gradient in fp64 by autograd."""
    leaf = student.double().requires_grad_()
    ls, lt = leaf.log_softmax(-1), teacher.double().log_softmax(-1)
    if divergence == "forward_kl":
        rows = (lt.exp() * (lt - ls)).sum(-1)
    elif divergence == "reverse_kl":
        rows = (ls.exp() * (ls - lt)).sum(-1)
    else:
        lm = torch.logaddexp(ls, lt) - torch.tensor(2.0).double().log()
        rows = 0.5 * ((ls.exp() * (ls - lm)).sum(-1) + (lt.exp() * (lt - lm)).sum(-1))
    (dz,) = torch.autograd.grad(rows.sum(), leaf)
    return rows.detach(), dz


def errors(case: str, divergence: str, impl: str, device: str) -> Row:
    """Mean absolute error of the rows' divergences, relative L1 error of dz."""
    student, teacher = logits(case, device)
    want_rows, want_dz = exact(student, teacher, divergence)
    leaf = student.clone().requires_grad_()
    identity = torch.eye(student.shape[1], device=device)
    loss = fused(leaf, teacher, identity, divergence=divergence, reduction="none", impl=impl)
    loss.sum().backward()
    assert leaf.grad is not None
    dz = ((leaf.grad.double() - want_dz).abs().sum() / want_dz.abs().sum()).item()
    return {"KL": (loss.detach().double() - want_rows).abs().mean().item(), "dz": dz}


def run(recorder: Recorder) -> None:
    if not recorder.wants("rows"):
        return
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    for divergence in DIVERGENCES:
        for case in CASES:

            def measure(case: str = case, divergence: str = divergence) -> Row:
                plain = errors(case, divergence, "torch", recorder.device)
                ours = errors(case, divergence, "triton" if recorder.device == "cuda" else "auto", recorder.device)
                free = {"KL": ROUNDING * logits(case, "cpu")[0].abs().max().item(), "dz": FLOOR}
                red = [k for k in ours if not ours[k] <= ALLOWED * plain[k] + free[k]]
                return {"plain": plain, "ours": ours, "red": red}

            recorder.row("rows", {"divergence": divergence, "case": case}, measure)
    torch.backends.cuda.matmul.allow_tf32 = tf32


def table(rows: list[Row]) -> str:
    cells = []
    for r in [r for r in rows if r["table"] == "rows"]:
        start = [r["divergence"], r["case"]]
        if "failed" in r:
            cells.append([*start, f"failed: {r['failed']}", "", ""])
            continue
        pairs = [f"{r['ours'][k]:.1e} ({r['plain'][k]:.1e})" for k in ("KL", "dz")]
        cells.append([*start, *pairs, f"RED: {', '.join(r['red'])}" if r["red"] else ""])
    return markdown(
        ["row kernels, fp32 logits", "case", "mean error of KL (plain fp32)", "relative error of dz", ""], cells
    )
