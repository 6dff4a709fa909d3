"""``hsd data``: questions from the hub or local files, decontaminated, binned by difficulty, mixed.

hsd data prepare openai/gsm8k:train --out gsm8k.jsonl
hsd data decontaminate gsm8k.jsonl --against math-500 gsm8k --out clean.jsonl --report report.json
hsd data bins clean.jsonl --samples runs/eval/clean/samples.jsonl --out binned.jsonl
hsd data mix math.jsonl code.jsonl --ratio 4:1 --out train.jsonl
"""

from __future__ import annotations

import argparse
import datetime
from collections import Counter
from pathlib import Path

from hsd.data.decontaminate import decontaminate
from hsd.data.mix import mix, with_difficulty
from hsd.data.sources import load_source
from hsd.files import check_file
from hsd.json_files import read_jsonl, write_json, write_jsonl
from hsd.progress import counted

HELP = "prepare, decontaminate, bin and mix questions"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="command", required=True)

    prepare = commands.add_parser("prepare", help="a data set in the row form, as JSONL")
    prepare.add_argument("data", metavar="NAME|FILE", help="a name with an optional :split, or a JSONL file")
    prepare.add_argument("--limit", type=int, help="only the first n questions")
    prepare.add_argument("--level", nargs="+", help="only these levels (APPS: introductory interview)")
    prepare.add_argument("--since", metavar="DATE", help="only from this day on (LiveCodeBench), as 2024-08-01")
    prepare.add_argument("--before", metavar="DATE", help="only before this day, as 2025-01-01")
    prepare.add_argument("--out", required=True, type=Path)

    clean = commands.add_parser("decontaminate", help="drop training questions that evaluation sets also have")
    clean.add_argument("train", metavar="TRAIN", help="JSONL file or name")
    clean.add_argument("--against", required=True, nargs="+", metavar="EVAL", help="JSONL files or names")
    clean.add_argument("--out", required=True, type=Path, help="the rows that stay, in the row form")
    clean.add_argument("--report", required=True, type=Path, help="JSON: counts, and both texts of each removed row")

    bins = commands.add_parser("bins", help="add pass_rate and difficulty from an evaluation's samples")
    bins.add_argument("data", metavar="FILE")
    bins.add_argument("--samples", required=True, type=Path, help="samples.jsonl of `hsd eval` on this file")
    bins.add_argument("--out", required=True, type=Path)

    mix = commands.add_parser("mix", help="interleave files by ratio")
    mix.add_argument("data", nargs="+", metavar="FILE")
    mix.add_argument("--ratio", required=True, help="such as 4:1")
    mix.add_argument("--seed", type=int, default=0)
    mix.add_argument("--length", type=int, help="rows in all (as many as come before a row would repeat)")
    mix.add_argument("--out", required=True, type=Path)


def run(args: argparse.Namespace) -> int:
    for name in ("out", "report"):
        if (path := getattr(args, name, None)) is not None:
            check_file(f"--{name}", path)
    return {"prepare": _prepare, "decontaminate": _decontaminate, "bins": _bins, "mix": _mix}[args.command](args)


def _prepare(args: argparse.Namespace) -> int:
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit: expected a positive number of rows, got {args.limit}")
    since, before = _day("--since", args.since), _day("--before", args.before)
    loaded = load_source(args.data)
    print(loaded)
    rows = loaded.rows
    for column, wanted in (("level", args.level), ("date", since or before)):
        if wanted and not any(column in row for row in rows):
            raise ValueError(f"{column}: the rows of {loaded.name} have none")
    rows = [r for r in rows if not args.level or r.get("level") in args.level]
    rows = [r for r in rows if not since or r.get("date", "") >= since]
    rows = [r for r in rows if not before or "" < r.get("date", "") < before]
    if not rows:
        raise ValueError(f"--level, --since, --before: expected to leave a row of {loaded.name}, got none")
    print(f"{args.out}: {counted(write_jsonl(args.out, rows[: args.limit]), 'row')}")
    return 0


def _day(name: str, text: str | None) -> str | None:
    """As the rows have it, 2024-08-01: days are compared as texts."""
    try:
        return text and datetime.date.fromisoformat(text).isoformat()
    except ValueError:
        raise ValueError(f"{name}: expected a day such as 2024-08-01, got {text!r}") from None


def _decontaminate(args: argparse.Namespace) -> int:
    if args.out.resolve() == args.report.resolve():
        raise ValueError(f"--report: expected another file than --out, got {args.report}")
    train = load_source(args.train)
    against = {}
    for name in args.against:
        loaded = load_source(name)
        if loaded.name in against:
            raise ValueError(f"--against: expected different names, got {loaded.name} twice")
        against[loaded.name] = loaded.rows
    kept, report = decontaminate(train.rows, against)
    write_jsonl(args.out, (train.rows[i] for i in kept))
    write_json(args.report, {"train": train.name, "unusable": train.unusable} | report)
    print(f"{train}\nagainst " + ", ".join(f"{name} ({counted(len(rows), 'row')})" for name, rows in against.items()))
    for rule, count in report["removed"].items():
        print(f"  {rule}: {count} removed ({report['rules'][rule]})")
    if report["answers_not_comparable"]:
        print(f"  {counted(len(report['answers_not_comparable']), 'answer')} could not be compared; the rows stay")
    print(f"  {report['kept']} of {report['train_rows']} stay; every removed pair is in {args.report}")
    return 0


def _bins(args: argparse.Namespace) -> int:
    rows = with_difficulty(load_source(args.data).rows, read_jsonl(args.samples))
    write_jsonl(args.out, rows)
    counts = Counter(row.get("difficulty", "not judged") for row in rows)
    print(", ".join(f"{name}: {counts[name]}" for name in ("easy", "medium", "hard", "not judged") if counts[name]))
    return 0


def _mix(args: argparse.Namespace) -> int:
    try:
        ratio = [int(part) for part in args.ratio.split(":")]
    except ValueError:
        raise ValueError(f"--ratio: expected integers such as 4:1, got {args.ratio!r}") from None
    if args.length is not None and args.length < 1:
        raise ValueError(f"--length: expected a positive number of rows, got {args.length}")
    streams = [load_source(name) for name in args.data]
    rows = mix([s.rows for s in streams], ratio, seed=args.seed, length=args.length)
    write_jsonl(args.out, rows)
    counts = Counter(row["source"] for row in rows)
    print(f"{args.out}: {counted(len(rows), 'row')}, " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    return 0
