"""The small world as an experiment: every method from the same warm starts, and ablations of HSD.

    python -m benchmarks.small_world            # about an hour on two quiet cores; all but the runs of 300 steps
    python -m benchmarks.small_world --quick    # under five minutes: does it all work?
    python -m benchmarks.small_world --report   # of what is finished
    python -m benchmarks.small_world --part league main    # these runs alone, with a report of their own
    python -m benchmarks.small_world --part main divergence --rows hsd grpo jsd    # of them, these rows

Every run is a process with one thread and leaves one JSON file in ``--out``; the same command goes on after a kill. The
report, its pictures and all results in one file are written to ``--results``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; each run is one thread

from benchmarks.small_world import before, report
from benchmarks.small_world import run as work
from benchmarks.small_world.plan import APART, FULL, QUICK, Run, Scale, queue
from benchmarks.small_world.queue import Job, drain
from hsd.progress import say

HERE = Path(__file__).parent


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    scale = QUICK if args.quick else FULL
    parts = {run.part for run in queue(scale)}
    if not parts >= {*args.part}:
        sys.exit(f"--part: expected some of {', '.join(sorted(parts))}, got {' '.join(args.part)}")
    if not (names := {run.name for run in queue(scale)}) >= {*args.rows}:
        sys.exit(f"--rows: expected some of {', '.join(sorted(names))}, got {' '.join(args.rows)}")
    wanted = {*args.part} or (parts if args.quick else parts - {*APART})
    runs = [run for run in queue(scale) if run.part in wanted and (not args.rows or run.name in args.rows)]
    todo = jobs(args.out, scale, runs)
    failed = []
    if not args.report:
        work.quiet()
        failed = drain(args.out, todo, args.workers, say)
    command = (
        "python -m benchmarks.small_world"
        + " --quick" * args.quick
        + " --part " * bool(args.part)
        + " ".join(args.part)
        + " --rows " * bool(args.rows)
        + " ".join(f'"{row}"' if " " in row else row for row in args.rows)
    )
    say(report.write(args.out, args.results, todo, command))
    if failed:
        sys.exit(f"{len(failed)} runs failed, see {args.out / 'logs'}: {', '.join(failed)}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.small_world")
    parser.add_argument("--quick", action="store_true", help="one seed, a few steps")
    parser.add_argument("--report", action="store_true", help="train nothing: report what is finished")
    told = "only these runs, with a report of their own: long, chains, league main, ..."
    parser.add_argument("--part", nargs="+", default=[], metavar="PART", help=told)
    parser.add_argument(
        "--rows", nargs="+", default=[], metavar="ROW", help="only these rows of the parts: hsd, jsd, ..."
    )
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--out", type=Path, help="where runs and warm starts go (runs/small_world)")
    parser.add_argument("--results", type=Path, help="where the report goes (benchmarks/small_world/results)")
    args = parser.parse_args(argv)
    args.out = args.out or Path("runs") / ("small_world_quick" if args.quick else "small_world")
    args.results = args.results or (args.out if args.quick else HERE / "results" / (args.part or [""])[0])
    return args


def jobs(out: Path, scale: Scale, runs: Sequence[Run]) -> list[Job]:
    """The queue: each warm start just before the first run that begins with it."""
    todo: dict[str, Job] = {}
    for run in runs:
        folder = out / "warm_starts" / run.warm
        if run.warm not in todo:
            asked = {"seed": run.seed, "warm_steps": run.warm_steps, "terms": run.terms, "scale": scale.identity}
            start = partial(before.warm_start, folder, run.seed, run.warm_steps, scale, run.terms)
            todo[run.warm] = Job(run.warm, asked, start)
        train = partial(work.train, run, scale, folder, out / "scratch" / run.key)
        todo[run.key] = Job(run.key, {"run": asdict(run), "scale": scale.identity}, train, needs=run.warm)
    return list(todo.values())


if __name__ == "__main__":
    main()
