"""Checks what a release would ship, made from a fresh clone of HEAD (a few minutes):

    make release-check        or: python tools/release_check.py

1. Builds the sdist, the pure wheel and the platform wheel and looks at what is in them.
2. In the unpacked sdist, builds the C++ rows, runs their tests and collects all others.
3. Installs the pure wheel in a new environment and runs the Python blocks of README.md there, first without and then
   with the extra `train`, and with it the notebooks of examples/.
4. Installs the platform wheel in another and runs the C++ rows.
5. Runs the GPU suite on a CPU at toy size (`make gpu-dry-run`).

Everything is installed under constraints.txt. What passed is left in dist/. Needs `build` and what the tests need.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
import zipfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
LIBRARY = re.compile(r"hsd_kernels/_cpu[^/]*\.(so|pyd|dylib)")
NATIVE = re.compile(r"\.(so|pyd|dylib|dll|o|cpp|h)$")
PACKAGES = ("hsd", "hsd_kernels")
# What the sdist must hold beside the packages, so that it can be built and tested without the repository.
SDIST_NEEDS = ("setup.py", "pyproject.toml", "constraints.txt", "Makefile", "README.md", "CHANGELOG.md", "LICENSE")
SDIST_NEEDS += ("SECURITY.md", "CITATION.cff", "tools/release_check.py", "tests/conftest.py", "benchmarks/timing.py")
NEEDS_TRAIN = re.compile(r"^\s*(?:from|import) (?!torch\b|hsd_kernels\b)\w", re.MULTILINE)
STEPS = re.compile(r"\bmax_steps=\d+")

PURE = """
import torch, hsd_kernels
from hsd_kernels import native
assert native.find() is None, native.find()
h = torch.randn(4, 8)
assert hsd_kernels.fused_hsd_kl(h, h + 1, torch.randn(32, 8)) > 0
try:
    hsd_kernels.fused_hsd_kl(h, h + 1, torch.randn(32, 8), impl="cpp")
except ValueError as error:
    print(f'impl="auto" runs; {error}')
else:
    raise AssertionError('impl="cpp" ran from a pure wheel')
"""

PLATFORM = """
import torch, hsd_kernels
from hsd_kernels import native
h, weight = torch.randn(64, 32), torch.randn(999, 32)
loss = {impl: hsd_kernels.fused_hsd_kl(h, h + 1, weight, impl=impl) for impl in ("cpp", "torch")}
torch.testing.assert_close(loss["cpp"], loss["torch"])
print(f'impl="cpp" runs: {native.VARIANTS[native.variant()]}, {native.find().name}')
"""


def sdist_problems(names: Iterable[str], sources: Iterable[str]) -> list[str]:
    """What is wrong with an sdist of these files; `sources` are those that the repository has for building."""
    names = set(names)
    wanted = {*SDIST_NEEDS, *sources}
    found = [f"sdist: expected {name}, which is not there" for name in sorted(wanted - names)]
    return found + [f"sdist: expected no built file, got {name}" for name in sorted(names) if LIBRARY.fullmatch(name)]


def wheel_problems(names: Iterable[str], version: str, *, pure: bool) -> list[str]:
    """What is wrong with a wheel of these files."""
    names, kind = set(names), "pure wheel" if pure else "platform wheel"
    allowed = (*(f"{package}/" for package in PACKAGES), f"hsd_kernels-{version}.dist-info/")
    found = [f"{kind}: expected the packages only, got {n}" for n in sorted(names) if not n.startswith(allowed)]
    wanted = {"hsd_kernels/__init__.py", "hsd_kernels/py.typed", "hsd/__init__.py"}
    wanted |= {f"hsd_kernels-{version}.dist-info/licenses/LICENSE"}
    found += [f"{kind}: expected {name}, which is not there" for name in sorted(wanted - names)]
    native = {name for name in names if NATIVE.search(name)}
    library = {name for name in native if LIBRARY.fullmatch(name)}
    if not pure and len(library) != 1:
        found.append(f"{kind}: expected one hsd_kernels/_cpu library, got {sorted(library)}")
    return found + [f"{kind}: expected no native file, got {n}" for n in sorted(native - (set() if pure else library))]


def version_problems(version: str, changelog: str) -> list[str]:
    found = []
    if not re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", version):
        found.append(f"pyproject.toml: expected a version like 1.2.3 or 1.2.3rc1, got {version}")
    if not re.search(rf"^## {re.escape(version)}( |$)", changelog, re.MULTILINE):
        found.append(f"CHANGELOG.md: expected a section '## {version}', got none")
    return found


def python_blocks(text: str) -> list[tuple[int, str]]:
    """The fenced python blocks of a Markdown page, each with the line that it begins at."""
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)) + 1, match[1]) for match in found]


def notebook_code(text: str) -> str:
    """The code cells of a notebook, in order, as one script. Raises ValueError where outputs were left in it."""
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells, 1):
        if cell["outputs"] or cell["execution_count"] is not None:
            raise ValueError(f"code cell {number}: expected no output and no execution count")
    return "\n\n".join("".join(cell["source"]) for cell in cells) + "\n"


def shortened(block: str) -> str:
    """One optimizer step instead of the block's own number: whether it runs is asked here, not what it learns, which
    takes 20 steps of SmolLM2."""
    return STEPS.sub("max_steps=1", block)


def sh(*command: object, cwd: Path, **environment: str) -> str:
    """Its standard output. A command that fails ends the check with everything it said."""
    # The checker's own PYTHONPATH would put the checkout before what was installed.
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HSD_BUILD_CPU")}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=kept | environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"FAILED: {' '.join(words)}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def stop_at(problems: list[str]) -> None:
    if problems:
        raise SystemExit("\n".join(["FAILED:", *problems]))


def build(clone: Path, dist: Path) -> tuple[Path, Path, Path]:
    """The sdist, and both wheels built from it (`build` takes a wheel from the sdist, not from the tree)."""
    command = (sys.executable, "-m", "build", "--no-isolation", "--outdir")
    sh(*command, dist / "pure", clone, cwd=dist)
    sh(*command, dist / "platform", clone, cwd=dist, HSD_BUILD_CPU="1")
    (sdist,), (pure,), (platform,) = (
        list(dist.glob(pattern)) for pattern in ("pure/*.tar.gz", "pure/*.whl", "platform/*.whl")
    )
    return sdist, pure, platform


def check_contents(clone: Path, sdist: Path, pure: Path, platform: Path) -> None:
    version = tomllib.loads((clone / "pyproject.toml").read_text())["project"]["version"]
    with tarfile.open(sdist) as archive:
        in_sdist = [name.partition("/")[2] for name in archive.getnames()]
    sources = [str(p.relative_to(clone)) for part in ("csrc", "tests", *PACKAGES) for p in (clone / part).rglob("*.*")]
    problems = version_problems(version, (clone / "CHANGELOG.md").read_text())
    problems += sdist_problems(in_sdist, [name for name in sources if (clone / name).is_file()])
    if pure.name != f"hsd_kernels-{version}-py3-none-any.whl":
        problems.append(f"pure wheel: expected the tag py3-none-any, got {pure.name}")
    in_wheel = {wheel: zipfile.ZipFile(wheel).namelist() for wheel in (pure, platform)}
    problems += wheel_problems(in_wheel[pure], version, pure=True)
    problems += wheel_problems(in_wheel[platform], version, pure=False)
    stop_at(problems)
    for path, names in ((sdist, in_sdist), (pure, in_wheel[pure]), (platform, in_wheel[platform])):
        print(f"contents   {path.name}: {len(names)} entries, {path.stat().st_size / 1e3:.0f} kB", flush=True)


def check_sdist(sdist: Path, folder: Path) -> None:
    """It builds as `pip install` builds it, and its tests run from it."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (tree,) = folder.iterdir()
    sh(sys.executable, "setup.py", "build_ext", "--inplace", cwd=tree, HSD_BUILD_CPU="1")
    collected = sh(sys.executable, "-m", "pytest", "--collect-only", cwd=tree)
    files = ("tests/hsd_kernels/test_cpp_library.py", "tests/hsd_kernels/test_rows_cpp.py")
    ran = sh(sys.executable, "-m", "pytest", *files, cwd=tree)
    print(f"sdist      collects: {collected.split(chr(10))[-2]}", flush=True)
    print(f"sdist      C++ rows, built there: {ran.split(chr(10))[-2]}", flush=True)
    sh(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, sdist, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    if not any(LIBRARY.fullmatch(name) for name in names):
        raise SystemExit(
            f"FAILED: pip wheel: expected the C++ rows where there is a compiler, got none in {wheel.name}"
        )
    print(f"sdist      pip makes {wheel.name}, with the C++ rows", flush=True)


def environment(folder: Path) -> Path:
    sh(sys.executable, "-m", "venv", folder, cwd=folder.parent)
    return folder / "bin" / "python"


def install(python: Path, *what: str) -> None:
    sh(python, "-m", "pip", "install", "-q", "-c", CONSTRAINTS, *what, cwd=python.parent)


def run_blocks(python: Path, blocks: list[tuple[int, str]], cwd: Path) -> None:
    for line, block in blocks:
        short = shortened(block)
        sh(python, "-c", short, cwd=cwd)
        print(f"README:{line:<4d}runs{', with max_steps=1' if short != block else ''}", flush=True)


def run_notebooks(python: Path, folder: Path, cwd: Path) -> None:
    for path in sorted(folder.glob("*.ipynb")):
        try:
            code = notebook_code(path.read_text(encoding="utf-8"))
        except ValueError as error:
            stop_at([f"{path.name}: {error}"])
            continue
        began = time.monotonic()
        sh(python, "-c", code, cwd=cwd)
        print(f"notebook   {path.name} runs, {time.monotonic() - began:.0f} s", flush=True)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory(prefix="hsd-release-") as scratch:
        work = {name: Path(scratch) / name for name in ("dist", "sdist", "run")}
        for folder in work.values():
            folder.mkdir()
        clone = Path(scratch) / "clone"
        sh("git", "clone", "-q", ROOT, clone, cwd=Path(scratch))
        print(f"commit     {sh('git', 'log', '-1', '--format=%h %s', cwd=clone).strip()}", flush=True)
        if sh("git", "status", "--porcelain", "--untracked-files=no", cwd=ROOT):
            print("           (what is not committed is not checked)")

        sdist, pure, platform = build(clone, work["dist"])
        check_contents(clone, sdist, pure, platform)
        check_sdist(sdist, work["sdist"])

        blocks = python_blocks((clone / "README.md").read_text())
        python = environment(Path(scratch) / "pure")
        install(python, str(pure))
        print(f"pure       {sh(python, '-c', PURE, cwd=work['run']).strip()}", flush=True)
        run_blocks(python, [b for b in blocks if not NEEDS_TRAIN.search(b[1])], work["run"])
        install(python, f"{pure}[train]")
        run_blocks(python, [b for b in blocks if NEEDS_TRAIN.search(b[1])], work["run"])
        run_notebooks(python, clone / "examples", work["run"])

        python = environment(Path(scratch) / "platform")
        install(python, str(platform))
        print(f"platform   {sh(python, '-c', PLATFORM, cwd=work['run']).strip()}", flush=True)

        dry_run = ("benchmarks/gpu_suite.sh", "abc", work["run"] / "gpu_suite", sys.executable)
        ran = sh("bash", *dry_run, cwd=clone, SUITE_DEVICE="cpu")
        print(f"GPU suite  {', '.join(line for line in ran.splitlines() if line.startswith('part '))}", flush=True)

        (ROOT / "dist").mkdir(exist_ok=True)
        for path in (sdist, pure, platform):
            shutil.copy(path, ROOT / "dist")
        print("passed     dist/: " + ", ".join(path.name for path in (sdist, pure, platform)))


if __name__ == "__main__":
    main()
