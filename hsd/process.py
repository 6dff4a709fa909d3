"""What a process needs to have children: their exit codes, the numbers 0 to 2 for its own streams, quiet libraries."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import warnings

# What libraries say in an ordinary run and nobody can act on: the logger, and how the message begins.
HARMLESS = (
    ("DeepSpeed", "Setting accelerator to CPU."),  # installed beside a machine without a GPU
    ("transformers.trainer_utils", "The tokenizer has new PAD/BOS/EOS tokens"),  # as it should: the run's tokenizer
)


def settle() -> None:
    """Make good what some launchers leave behind; any number of calls do what one does.

    With SIGCHLD ignored the system forgets how a child ended, so that a failed test reads as passed. With stdin closed
    a pipe to a child gets the number 0, which the child takes for its own stdin.
    """
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, mode in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, mode)  # the lowest free number, which is this one
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


def hush() -> None:
    """Leave out what is `HARMLESS`; any number of calls do what one does."""
    # Old names that TRL 1.16 still uses.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    for name, _ in HARMLESS:
        logging.getLogger(name).addFilter(_says_something)


def _says_something(record: logging.LogRecord) -> bool:
    return not any(record.name == name and record.getMessage().startswith(start) for name, start in HARMLESS)
