"""What a process needs to have children: their exit codes, and the numbers 0 to 2 for its own streams."""

from __future__ import annotations

import os
import signal
import sys
import threading


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
