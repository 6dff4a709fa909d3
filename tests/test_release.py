"""What `make release-check` looks for, on lists of names; the builds themselves are made there."""

import importlib.util
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("release_check", ROOT / "tools" / "release_check.py")
assert SPEC and SPEC.loader
check = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(check)

SOURCES = ("csrc/cpu/rows.h", "tests/conftest.py", "hsd/train/update.py")
SDIST = {*check.SDIST_NEEDS, *SOURCES, "PKG-INFO"}
INFO = "hsd_kernels-1.2.3.dist-info"
PURE = {"hsd/__init__.py", "hsd_kernels/__init__.py", "hsd_kernels/py.typed", f"{INFO}/RECORD"}
PURE |= {f"{INFO}/licenses/LICENSE"}
PLATFORM = PURE | {"hsd_kernels/_cpu.cpython-311-x86_64-linux-gnu.so"}


def test_sdist():
    assert check.sdist_problems(SDIST, SOURCES) == []
    for missing in ("csrc/cpu/rows.h", "setup.py", "constraints.txt"):
        assert check.sdist_problems(SDIST - {missing}, SOURCES) == [f"sdist: expected {missing}, which is not there"]
    assert "no built file" in check.sdist_problems(SDIST | {"hsd_kernels/_cpu.abi3.so"}, SOURCES)[0]


@pytest.mark.parametrize("pure", [True, False])
def test_wheel(pure):
    def problems(names):
        return check.wheel_problems(names, "1.2.3", pure=pure)

    good = PURE if pure else PLATFORM
    assert problems(good) == []
    assert "py.typed" in problems(good - {"hsd_kernels/py.typed"})[0]
    for foreign in ("tests/test_x.py", "benchmarks/timing.py", "csrc/cpu/rows.h", "hsd_kernels-1.2.4.dist-info/RECORD"):
        assert any(f"the packages only, got {foreign}" in p for p in problems(good | {foreign}))
    assert "no native file" in problems(good | {"hsd/stray.so"})[0]
    assert problems(PLATFORM if pure else PURE)


def test_version():
    assert check.version_problems("0.1.0", "# Changelog\n\n## 0.1.0 (unreleased)\n") == []
    assert len(check.version_problems("0.1", "## 0.1.0\n")) == 2
    assert len(check.version_problems("0.1.0", "## 0.1.00\n")) == 1


def test_readme_blocks():
    page = "text\n```python\nimport hsd\nmax_steps=20\n```\n```\nplain\n```\n\n```python\nimport torch\n```\n"
    assert check.python_blocks(page) == [(3, "import hsd\nmax_steps=20\n"), (11, "import torch\n")]
    assert check.shortened("a(max_steps=20)") == "a(max_steps=1)"
    needs = [bool(check.NEEDS_TRAIN.search(block)) for _, block in check.python_blocks(page)]
    assert needs == [True, False]
    assert not check.NEEDS_TRAIN.search("from hsd_kernels import fused_hsd_kl\nfrom torch import nn\n")


def test_the_readme_has_blocks_that_compile():
    readme = (ROOT / "README.md").read_text()
    blocks = check.python_blocks(readme)
    excerpts = re.findall(r"^```py\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    assert blocks and len(blocks) + len(excerpts) >= 2
    for line, block in blocks:
        compile(block, f"README.md:{line}", "exec")
    loop = (ROOT / "examples" / "accelerate_loop.py").read_text()
    for excerpt in excerpts:  # of the loop: what it calls, the loop calls
        compile(excerpt, "README.md", "exec")
        called = set(re.findall(r"(\w+)\(", re.sub(r"#.*", "", excerpt)))
        assert called and {name for name in called if f"{name}(" not in loop} == set()


def test_the_version_is_in_one_place():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert check.version_problems(version, (ROOT / "CHANGELOG.md").read_text()) == []
    for name in ("setup.py", "CITATION.cff", "hsd_kernels/__init__.py", "hsd/__init__.py"):
        assert not re.search(r"^(__)?version\b", (ROOT / name).read_text(), re.MULTILINE), name


@pytest.mark.parametrize(
    ("environment", "pure"),
    [({}, True), ({"HSD_BUILD_CPU": "0", "PIP_BUILD_TRACKER": "x"}, True), ({"PIP_BUILD_TRACKER": "x"}, False)],
    ids=["python -m build", "pip, not wanted", "pip"],
)
def test_who_builds_the_cpp_rows(environment, pure, monkeypatch, tmp_path):
    """`bdist_wheel` of setup.py's Extension, without compiling: only the tag is looked at."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    for name in ("HSD_BUILD_CPU", "PIP_BUILD_TRACKER"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CC", "false")  # optional=True: a failed build leaves the wheel without it, but with its tag
    monkeypatch.setenv("CXX", "false")
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl") == pure
    assert not any(check.LIBRARY.fullmatch(name) for name in zipfile.ZipFile(wheel).namelist())
