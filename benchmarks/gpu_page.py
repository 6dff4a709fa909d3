"""The committed page of a card from the rows of the GPU suite.

    python benchmarks/gpu_page.py benchmarks/results/gpu_h100.md OUT/rows.jsonl [OUT/rows.jsonl ...]

Rows for which no time was left are dropped; of two that measure the same the later one stays. Writes the page and,
beside it, the rows it was made from. The tables are `gpu_suite.py`'s.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gpu_facts
import gpu_kernel
import gpu_model
import gpu_rows
import gpu_sweep
import gpu_update
from gpu_suite import test_table
from suite import Row, load
from timing import header

KEYS = ("table", "part", "fact", "C", "divergence", "case", "shape", "axis", "contender", "kernel", "config", "rows")
KEYS += ("dW", "model")
READ = """
bf16 inputs, forward and backward. The bare GEMMs run in turns with each contender: the ratio is to those of the same
minute, since the card lowers its clock under load. `GB above` is the allocator's peak above inputs and gradients.
Errors: KL, dH and dW, relative L1 against fp64 at a small shape. Rows as made:"""


def latest(rows: list[Row]) -> list[Row]:
    """One row for each thing measured, in the order of their first appearance."""
    found: dict[str, Row] = {}
    for row in rows:
        if "no time was left" not in row.get("failed", ""):
            found[json.dumps({key: row[key] for key in KEYS if key in row})] = row
    return list(found.values())


def page(rows: list[Row], name: str) -> str:
    runs = [r for r in rows if r["table"] == "environment"]
    about = "\n".join(f"Part {r['part']}: {header({k: v for k, v in r.items() if k in SHOWN})}." for r in runs)
    sections = [
        ("Kernel", "kernel", gpu_kernel.table),
        ("Where the time goes", "kernel", gpu_model.table),
        ("Small problems, sizes, updates, error on real states", "small error scaling update", gpu_update.table),
        ("Products", "facts", gpu_facts.table),
        ("Row kernels against fp64", "rows", gpu_rows.table),
        ("Pinned configurations", "sweep", gpu_sweep.table),
        ("Tests on the card", "tests", test_table),
    ]
    made = {r["table"] for r in rows}
    text = [f"# The kernel on an {name}", about, READ.strip() + f" `gpu_{name.lower()}.jsonl`."]
    for title, tables, table in sections:
        if made & set(tables.split()):
            blocks = table(rows).split("\n\n")
            text += [f"## {title}", *(block for block in blocks if len(block.splitlines()) != 2)]  # a head alone
    return "\n\n".join(text) + "\n"


SHOWN = ("device", "commit", "torch", "triton", "transformers", "trl", "liger_kernel", "fla")


def main() -> None:
    out = Path(sys.argv[1])
    rows = latest([row for name in sys.argv[2:] for row in load(Path(name))])
    out.write_text(page(rows, out.stem.removeprefix("gpu_").upper()))
    out.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
