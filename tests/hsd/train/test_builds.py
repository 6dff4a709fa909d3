"""A killed build's lock is an error, a running or a beginning one's is not."""

import os
import subprocess
import time

import pytest

from hsd.train.builds import check_builds


def lock(root, age):
    path = root / "py311_cpu" / "op" / "lock"
    path.parent.mkdir(parents=True)
    path.touch()
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_a_killed_build_is_named(tmp_path, monkeypatch):
    path = lock(tmp_path, 600)
    with pytest.raises(ValueError, match=rf"^{path}: expected no lock .* 10 minutes ago"):
        check_builds(tmp_path)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    with pytest.raises(ValueError, match="delete the file"):
        check_builds()
    path.unlink()
    check_builds()


def test_a_build_that_begins_is_waited_for(tmp_path):
    lock(tmp_path, 5)
    check_builds(tmp_path)


@pytest.mark.skipif(not os.path.exists("/proc/self"), reason="needs /proc")
def test_a_build_that_runs_is_waited_for(tmp_path):
    path = lock(tmp_path, 600)
    compiler = subprocess.Popen(["sleep", "60"], cwd=path.parent)
    try:
        check_builds(tmp_path)
    finally:
        compiler.kill()
        compiler.wait()
    with pytest.raises(ValueError, match="expected no lock"):
        check_builds(tmp_path)


def test_no_folder_is_no_build(tmp_path):
    check_builds(tmp_path / "none")
