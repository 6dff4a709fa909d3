"""What the way of keeping two logits costs dz = softmax(z_s) - softmax(z_t): error against fp64 for bf16 inputs.

    python benchmarks/bench_logit_forms.py --workload runs/smollm2_states.pt [--tokens 1024] [--json PATH]

Plain PyTorch and no kernel; every product is summed in fp32. d is z_s - z_t by a product of h_s - h_t, rounded to the
operands' dtype first. Tokens are sorted by their exact KL at the temperature. The error of a quartile is relative L1:
of dz in fp32, and of dz rounded to bf16 as the kernel stores it.
"""

from __future__ import annotations

from typing import Any

import torch
import workloads
from bench_error import asked
from timing import save
from torch import Tensor

BF16 = torch.bfloat16
TEMPERATURES = (1.0, 0.5)
# Bytes a pair of logits, and the arithmetic of a step that trains the head, U = 2 N D V.
FORMS = {
    "both in fp32": "8, 4U",
    "both in bf16": "4, 4U",
    "z_t and d in bf16 (`logits_dtype=torch.bfloat16`)": "4, 4U",
    "z_t in fp32, d in bf16": "6, 4U",
    "z_t in fp32, d in bf16, of h_s - h_t in two parts": "6, 5U",
    "z_t in fp32, d in fp32": "8, 4U",
    "z_t in fp32, d in fp16, of fp16 operands": "6, 4U and an fp16 head",
    "z_t and d in fp16, of fp16 operands": "4, 4U and an fp16 head",
}


def kept(student: Tensor, teacher: Tensor, weight: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(z_s, z_t) of each form in fp32, as a row pass would form them."""

    def product(h: Tensor) -> Tensor:
        return h.float() @ weight.to(h.dtype).float().T

    z_s, z_t = product(student), product(teacher)
    difference = student.float() - teacher.float()
    once = difference.to(BF16)
    d = product(once)
    d_of_two = d + product((difference - once).to(BF16))
    d_half = product(difference.half()).half()

    def plus(z: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        return z + d.float(), z

    return [
        (z_s, z_t),
        (z_s.to(BF16).float(), z_t.to(BF16).float()),
        plus(z_t.to(BF16).float(), d.to(BF16)),
        plus(z_t, d.to(BF16)),
        plus(z_t, d_of_two.to(BF16)),
        plus(z_t, d),
        plus(z_t, d_half),
        plus(product(teacher.half()).half().float(), d_half),
    ]


def quartiles(tensors: workloads.Workload, temperature: float) -> Tensor:
    """(forms, 2, 4): error of dz, and of dz rounded to bf16, in the quartiles of the KL."""
    student, teacher, weight = tensors
    kl, mass, errors = [], [], []
    for h_s, h_t in zip(student.split(64), teacher.split(64), strict=True):
        ls, lt = ((h.double() @ weight.double().T / temperature).log_softmax(-1) for h in (h_s, h_t))
        exact = ls.exp() - lt.exp()
        kl.append((lt.exp() * (lt - ls)).sum(-1))
        mass.append(exact.abs().sum(-1))
        found = []
        for sides in kept(h_s, h_t, weight):
            p_s, p_t = ((z / temperature).softmax(-1) for z in sides)
            dz = p_s - p_t
            found += [(x.double() - exact).abs().sum(-1) for x in (dz, dz.to(BF16))]
        errors.append(torch.stack(found))
    parts = torch.cat(kl).argsort().chunk(4)
    masses, error = torch.cat(mass), torch.cat(errors, -1)
    return torch.stack([error[:, at].sum(-1) / masses[at].sum() for at in parts], -1).unflatten(0, (-1, 2))


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| temperature | logits kept: error of dz (rounded to bf16) | bytes a pair, products "
        "| lowest quartile | second | third | highest |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        cells = [f"{100 * a:.2f} % ({100 * b:.2f} %)" for a, b in zip(r["dz"], r["rounded"], strict=True)]
        lines.append("| " + " | ".join([str(r["temperature"]), r["form"], FORMS[r["form"]], *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    tensors, facts, path = asked(__doc__)
    rows = [
        {"temperature": t, "form": form, "dz": errors[0].tolist(), "rounded": errors[1].tolist()}
        for t in TEMPERATURES
        for form, errors in zip(FORMS, quartiles(tensors, t), strict=True)
    ]
    print(table(rows))
    if path:
        save(path, facts, rows, table(rows))


if __name__ == "__main__":
    main()
