"""What storing and rounding cost: error against fp64 for bf16 inputs, by KL quartile.

    python benchmarks/bench_error.py --workload runs/smollm2_states.pt [--tokens 1024] [--json PATH]

Tokens are sorted by their exact KL; dH of a quartile is compared with that of fp64 arithmetic on the same bf16 inputs:
relative L1 error. Where the teacher nearly agrees, the lowest quartile, the gradient is a small difference of large
numbers, and that is where the forms differ. The loss column is the relative error of the quartile's KL.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import workloads
from contenders import CONTENDERS, Loss, contenders, step
from timing import environment, header, save


def quartile_errors(loss: Loss, tensors: workloads.Workload) -> list[tuple[float, float]]:
    """(relative error of the KL, relative L1 error of dH) per quartile of the tokens."""
    from hsd_kernels.reference import hsd_kl

    found = []
    for part in by_kl(tensors):
        exact = step(hsd_kl, *(t.double() for t in part))
        got = step(loss, *part)
        pairs = zip(got[:2], exact[:2], strict=True)
        kl, dh = (((a.double() - b).abs().sum() / b.abs().sum()).item() for a, b in pairs)
        found.append((kl, dh))
    return found


def by_kl(tensors: workloads.Workload) -> list[workloads.Workload]:
    """Four problems: the tokens of each quartile of the exact KL."""
    from hsd_kernels.reference import hsd_kl

    student, teacher, weight = tensors
    rows = [
        hsd_kl(s.double(), t.double(), weight.double(), reduction="none")
        for s, t in zip(student.split(64), teacher.split(64), strict=True)
    ]
    quartiles = torch.cat(rows).argsort().chunk(4)
    return [(student[at], teacher[at], weight) for at in quartiles]


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| bf16 inputs: error of dH (of the KL) | lowest quartile | second | third | highest |",
        "|---|---|---|---|---|",
    ]
    for r in rows:
        cells = r.get("failed") or " | ".join(f"{100 * dh:.2f} % ({100 * kl:.2f} %)" for kl, dh in r["quartiles"])
        lines.append(f"| {r['contender']} | {cells} |" + (" | | |" if "failed" in r else ""))
    return "\n".join(lines)


def asked(about: str | None) -> tuple[workloads.Workload, dict[str, Any], Path | None]:
    """From the command line: bf16 states, the facts above the table, and where it goes."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", required=True, help="a file of smollm2_states.py")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    facts = environment("cpu") | {"workload": Path(args.workload).stem, "tokens": args.tokens}
    print(header(facts))
    return workloads.recorded(args.workload, args.tokens, torch.bfloat16, "cpu"), facts, args.json


def main() -> None:
    tensors, facts, path = asked(__doc__)
    rows: list[dict[str, Any]] = []
    for name, reason in contenders("cpu", "bfloat16").items():
        try:
            found = {"failed": reason} if reason else {"quartiles": quartile_errors(CONTENDERS[name], tensors)}
        except Exception as error:  # a peer that cannot run is a row that says why
            found = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
        rows.append({"contender": name} | found)
    print(table(rows))
    if path:
        save(path, facts, rows, table(rows))


if __name__ == "__main__":
    main()
