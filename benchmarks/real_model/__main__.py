"""SmolLM2-135M-Instruct on additions or chains: HSD's teachers and divergences beside GRPO, from the same start.

    python -m benchmarks.real_model --seeds 0 1 2                     # every row of plan.py, about 4 minutes each
    python -m benchmarks.real_model --rows "hsd fixed" --seeds 0      # some of them
    python -m benchmarks.real_model --task chain_sum --seeds 0 1 2    # the harder task
    python -m benchmarks.real_model --report                          # of what is finished

Every run is a process with one thread and leaves one JSON file in ``--out``, where the report reads it. On a GPU
(PYTORCH_NVML_BASED_CUDA_CHECK=1, since the queue forks) several ``--workers`` share it.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

from benchmarks.real_model import run as work
from benchmarks.real_model.plan import PLANS, STEPS, key
from benchmarks.small_world.queue import Job, drain
from benchmarks.small_world.run import quiet
from hsd.progress import say

RESULTS = Path(__file__).parents[1] / "results" / "real_model"


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    failed = []
    if not args.report:
        quiet()
        failed = drain(args.out, jobs(args), args.workers, say)
    from benchmarks.real_model import report

    say(report.write(args.out, args.task))
    if failed:
        sys.exit(f"{len(failed)} runs failed, see {args.out / 'logs'}: {', '.join(failed)}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_model")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="of plan.py, and start")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int)
    parser.add_argument("--task", default="additions", choices=PLANS)
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--report", action="store_true", help="train nothing: report what is finished")
    parser.add_argument("--out", type=Path, help="where runs and report go")
    args = parser.parse_args(argv)
    known = ["start", *(row.name for row in PLANS[args.task])]
    args.rows = args.rows or known
    if unknown := set(args.rows) - {*known}:
        parser.error(f"--rows: expected rows among {', '.join(known)}, got {', '.join(sorted(unknown))}")
    args.steps = args.steps or STEPS[args.task]
    args.out = args.out or (RESULTS if args.task == "additions" else RESULTS / args.task)
    return args


def jobs(args: argparse.Namespace) -> list[Job]:
    """Seed by seed; the start is the initial policy's success."""
    todo = []
    for seed in args.seeds:
        if "start" in args.rows:
            asked = {"name": "start", "seed": seed, "task": args.task}
            todo.append(Job(key("start", seed), asked, partial(work.start, args.task, seed)))
        for row in (row for row in PLANS[args.task] if row.name in args.rows):
            options = {k: v for k, v in asdict(row).items() if k != "expected"}
            asked = options | {"seed": seed, "steps": args.steps, "task": args.task}
            scratch = Path("runs") / "real_model" / args.task / key(row.name, seed)
            train = partial(work.train, row, args.task, seed, args.steps, scratch)
            todo.append(Job(key(row.name, seed), asked, train))
    return todo


if __name__ == "__main__":
    main()
