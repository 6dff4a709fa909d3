"""One command line for everything: ``hsd COMMAND ...``, or ``python -m hsd.cli COMMAND ...``.

A command is a module ``hsd/cli/NAME.py`` with ``HELP`` (a line), ``add_arguments(parser)`` and ``run(args) -> int``,
which returns the exit code. It is imported when it is called, and imports torch, if it must, when it runs.
"""

from __future__ import annotations

import argparse
import importlib
import os
import select
import sys
from types import ModuleType
from typing import NoReturn

from hsd.hub import asking
from hsd.named import nearest
from hsd.process import hush, settle

COMMANDS = (
    "init",
    "train",
    "plan",
    "eval",
    "sample",
    "merge",
    "credit",
    "compare",
    "methods",
    "data",
    "doctor",
    "demo",
)


class Parser(argparse.ArgumentParser):
    """Bad arguments are one line, like every other bad input."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def main(argv: list[str] | None = None) -> int:
    """The exit code: 2 for bad input, which is one line on stderr, 130 for Ctrl-C, 141 where nobody reads on.

    ``--traceback`` or HSD_TRACEBACK=1 shows where it came from.
    """
    settle()
    hush()
    words = list(sys.argv[1:] if argv is None else argv)
    traceback = "--traceback" in words or os.environ.get("HSD_TRACEBACK", "0") not in ("", "0")
    try:
        with asking():  # the hub once in a command
            code = dispatch([word for word in words if word != "--traceback"])
        sys.stdout.flush()
        return code
    except (ValueError, TypeError, OSError, ImportError) as error:
        if isinstance(error, BrokenPipeError) and reader_has_gone():
            return 141  # as a shell says of SIGPIPE
        if traceback:
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"error: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if traceback:
            raise
        print("interrupted", file=sys.stderr)
        return 130


def reader_has_gone() -> bool:
    """Whether who reads our output, such as `head`, has had enough; the rest then goes nowhere."""
    output, poll = 1, select.poll()
    poll.register(output, 0)
    gone = any(event & select.POLLERR for _, event in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return gone


def dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return 0 if words else 2
    name = words[0]
    if name not in COMMANDS:
        raise ValueError(f"command: expected one of {', '.join(COMMANDS)}{nearest(name, COMMANDS)}, got {name!r}")
    module = load(name)
    parser = Parser(prog=f"hsd {name}", description=module.HELP, allow_abbrev=False)
    module.add_arguments(parser)
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    if getattr(module, "TAKES_OVERRIDES", False):
        return with_overrides(module, *parser.parse_known_args(words[1:]))
    return module.run(parser.parse_args(words[1:]))


def with_overrides(module: ModuleType, args: argparse.Namespace, overrides: list[str]) -> int:
    """Run a command of settings; an error about one of them names the key as the user typed it."""
    args.overrides = overrides
    try:
        return module.run(args)
    except ValueError as error:
        from hsd.cli.settings import as_typed

        raise ValueError(as_typed(str(error), getattr(args, "config", None), args.overrides)) from error


def overview() -> str:
    lines = ["usage: hsd COMMAND ...", ""]
    lines += [f"  {name:<9}{load(name).HELP}" for name in COMMANDS]
    return "\n".join([*lines, "", "`hsd COMMAND --help` says more; --traceback shows where an error comes from."])


def load(name: str) -> ModuleType:
    return importlib.import_module(f"hsd.cli.{name}")


if __name__ == "__main__":
    sys.exit(main())
