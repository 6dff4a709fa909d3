"""The lock files of killed builds, for which torch waits without an end and without a word."""

from __future__ import annotations

import os
import time
from pathlib import Path

STARTING = 60.0  # seconds within which a build that has a lock need not have a compiler yet


def check_builds(root: Path | None = None) -> None:
    """Raise ValueError for a lock file that no process on this machine works behind.

    DeepSpeed compiles operators when they are first used (`torch.utils.cpp_extension.load`). A build that is killed
    leaves its lock, and every later run waits for it.

    Args:
        root: Where torch builds; by default TORCH_EXTENSIONS_DIR or its folder in the user's cache.
    """
    if root is None:
        from torch.utils.cpp_extension import get_default_build_root

        root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in sorted(root.glob("**/lock")):
        try:
            age = time.time() - lock.stat().st_mtime
        except FileNotFoundError:  # the build has just ended
            continue
        if age > STARTING and not _in_use(lock.parent):
            raise ValueError(
                f"{lock}: expected no lock of a build that does not run, got one of {age / 60:.0f} minutes ago, for "
                "which this run would wait for ever; delete the file, unless another machine builds there"
            )


def _in_use(folder: Path) -> bool:
    """Whether a process works in ``folder``, as torch's ninja does. Without /proc: whether it changed in an hour."""
    processes = Path("/proc")
    if not (processes / "self").exists():
        return time.time() - max(p.stat().st_mtime for p in folder.iterdir()) < 3600
    for process in processes.glob("[0-9]*"):
        try:
            if (process / "cwd").resolve() == folder.resolve():
                return True
        except OSError:  # another user's, or one that has ended
            continue
    return False
