"""Files and folders that appear whole or not at all, and the paths that a user names for them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside ``path`` for a file or a folder. It is renamed to ``path`` when the block ends, and removed if the
    block raises.

    A folder does not replace one that has files: OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    _remove(part)  # that of a process that was killed
    try:
        yield part
        part.replace(path)
    except BaseException:
        _remove(part)
        raise


def _remove(part: Path) -> None:
    if part.is_dir():
        shutil.rmtree(part)
    part.unlink(missing_ok=True)


def check_file(name: str, path: Path, *, new: bool = False) -> None:
    """Raise ValueError, which begins with the argument's ``name``, unless a file can be written to ``path``."""
    _check(name, path, "file", new)


def check_folder(name: str, path: Path, *, new: bool = False) -> None:
    """As `check_file`, for a folder to write into; one that exists is fine, unless it must be ``new``."""
    _check(name, path, "folder", new)


def _check(name: str, path: Path, kind: str, new: bool) -> None:
    expected = f"{name}: expected a {'new ' * new}{kind}"
    try:
        found = "folder" if path.is_dir() else "file" if path.exists() else None
    except OSError as error:  # the name is too long, or the folder closed
        raise ValueError(f"{expected}, got {path}: {error.strerror}") from error
    if found is None and path.is_symlink():
        raise ValueError(f"{expected}, got {path}, which is a link to nowhere")
    if found is not None and (new or found != kind):
        raise ValueError(f"{expected}, got {path}, which is a {found}{' that exists' * (found == kind)}")
    places = [path.absolute()] * (kind == "folder") + [*path.absolute().parents]
    above = next(p for p in places if p.exists() or p.is_symlink())
    if not above.is_dir():
        raise ValueError(f"{expected} in a folder, got {path}, where {above} is no folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"{expected} that can be written, got {path}, where {above} is read-only")
