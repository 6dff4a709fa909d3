"""One update under each engine on two gloo ranks of a CPU, against one process: method x teacher x engine.

    python benchmarks/bench_engines.py [--cases hsd:live ...] [--engines zero3 ...] [--json PATH]

With --json the table is also put into docs/cluster.md.

An untied Qwen3 of two layers, hidden size 32, fp32; the student starts 0.05 off the initial policy, and the reference
term has the weight 0.5. An entry is the largest error over all parameters over the largest gradient; the gradient is
what a step of SGD at learning rate 1 takes off the weights. The rollouts are the ranks' own, in one micro-batch of one
process for the comparison. A copied or gated teacher must have the student's bits after the step. Needs
DeepSpeed and the tests of this repository.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from rank_runs import joined, launch, load, one_process, saved  # noqa: E402
from timing import environment, header, save  # noqa: E402

PATH = ROOT / "tests" / "hsd" / "distributed" / "engine_job.py"
PAGE, BEGIN, END = ROOT / "docs" / "cluster.md", "<!-- engines table: begin -->", "<!-- engines table: end -->"
METHODS = ("hsd", "opsd", "sdpo", "rlsd", "grpo+opsd", "egrsd", "antisd")  # the last two have a scoring pass
TEACHERS = ("live", "fixed", "ema", "copy", "gated", "trust_region")
# Every teacher with HSD, whole and as LoRA; every other method with one of them.
CASES = [f"hsd:{t}{lora}" for lora in ("", ":lora") for t in TEACHERS] + [f"{m}:copy" for m in METHODS[1:]]
ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
BOUND = 1e-4  # above it a run is wrong and no table is written


def errors(job: Any, engine: str, names: list[str]) -> dict[str, float]:
    """By case, the largest error of any parameter's gradient over the largest gradient."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        launch(PATH, [engine, here, *names], here, seconds=3600, **job.ENVIRONMENT.get(engine, {}))
        for name in names:
            _, options, arguments = job.case(name)
            ranks = saved(here, name)
            batch = joined([b for rank in ranks for b in rank["batches"]])
            _, expected = one_process(here / "one", batch, options, **arguments)
            scale = max(g.abs().max().item() for g in expected.values())
            worst = max((rank["gradient"][n] - g).abs().max().item() for rank in ranks for n, g in expected.items())
            found[name] = worst / scale
            for student, copied in (rank["copied"] for rank in ranks if "copied" in rank):
                if any(not torch.equal(student[n], copied[n]) for n in student):
                    raise SystemExit(f"error: {engine}, {name}: expected the teacher to be the student after the step")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", metavar="METHOD:TEACHER[:lora]", default=CASES)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    facts, job = environment("cpu"), load(PATH)
    names = args.cases
    by_engine = {engine: errors(job, engine, names) for engine in args.engines}
    rows: list[dict[str, Any]] = []
    for name in names:
        method, teacher, *lora = name.split(":")
        rows.append({"method": method + ", LoRA" * len(lora), "teacher": teacher})
    lines = [f"| method | teacher | {' | '.join(args.engines)} |", "|---" * (2 + len(args.engines)) + "|"]
    for name, row in zip(names, rows, strict=True):
        row |= {engine: by_engine[engine][name] for engine in args.engines}
        lines.append("| " + " | ".join(v if isinstance(v, str) else f"{v:.0e}" for v in row.values()) + " |")
    print(header(facts), "\n\n" + "\n".join(lines))
    worst = max(v for row in rows for v in row.values() if not isinstance(v, str))
    if worst > BOUND:
        raise SystemExit(f"error: expected at most {BOUND}, got {worst}")
    if args.json is not None:
        save(args.json, facts, rows, "\n".join(lines))
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(before + BEGIN + "\n" + "\n".join(lines) + "\n" + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
