"""`hsd train CONFIG.yaml [--key value ...]`: train; the same command goes on with a run that was stopped.

The run's folder is ``train.output_dir``, else runs/NAME-OF-THE-CONFIG; `hsd.cli.folder` says what is in it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HELP = "train a model as a YAML file says; the same command resumes"
TAKES_OVERRIDES = True
OVERRIDES = "Any key can be set from here: --train.learning_rate 1e-5, or --learning_rate 1e-5 where it is unique."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument(
        "--check",
        action="store_true",
        help="check all but the weights and print the configuration",
    )
    parser.epilog = OVERRIDES


def run(args: argparse.Namespace) -> int:
    from hsd.cli.folder import as_yaml
    from hsd.cli.prepare import check, left_out, prepare
    from hsd.cli.run import train
    from hsd.cli.settings import load

    job = prepare(load(args.config, args.overrides), args.config.stem, source=str(args.config), check=args.check)
    if args.check:
        if job.left_out:
            print(left_out(job), file=sys.stderr)
        print(f"checked, all but the weights: {check(job)}", file=sys.stderr)
        print(as_yaml(job), end="")
        return 0
    return train(job)
