"""One part of the GPU suite in one process: see gpu_suite.sh, which starts it.

    python benchmarks/gpu_suite.py PART OUT

SUITE_DEVICE cuda or cpu (a dry run at toy size), SUITE_DEADLINE seconds since the epoch after which no row is begun,
SUITE_WHEELS a folder of wheels that join the path, SUITE_ONLY names of tables.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

if os.environ.get("SUITE_WHEELS"):
    from suite import add_wheels

    add_wheels(os.environ["SUITE_WHEELS"])

import gpu_facts
import gpu_kernel
import gpu_model
import gpu_rows
import gpu_sweep
import gpu_update
import torch
from suite import Recorder, Row, reason_of
from timing import environment, header

ROOT = Path(__file__).resolve().parents[1]
SHOWN = 10_000  # characters of tables on standard output
TEST_SECONDS = 210
PARTS = {"a": (gpu_facts, gpu_rows), "b": (gpu_kernel, gpu_sweep), "c": (gpu_update,)}


def cuda_tests() -> list[str]:
    """Files that hold tests for a GPU, by name: collecting the others would import what a plain image lacks."""
    folders = (ROOT / "tests/hsd_kernels", ROOT / "tests/hsd/policy/tree")
    files = [f for folder in folders for f in sorted(folder.glob("test_*.py"))]
    found = [f for f in files if "mark.cuda" in f.read_text() or "triton_rows" in f.read_text()]
    return [str(f.relative_to(ROOT)) for f in found]


def run_tests(recorder: Recorder, out: Path) -> None:
    """All in one pytest; on a GPU by eight workers, since most of the time goes into compiling."""
    device = recorder.device
    files = cuda_tests() if device == "cuda" else [f for f in cuda_tests() if f.endswith("test_cuda.py")]
    command = ["timeout", "-k", "5", str(TEST_SECONDS), sys.executable, "-m", "pytest", "-rfE", "--tb=short"]
    command += ["--continue-on-collection-errors", *files]
    if device == "cuda":
        try:
            import xdist  # noqa: F401  # pyright: ignore[reportMissingImports]

            command += ["-n", "8"]
        except ImportError:
            pass

    def test() -> Row:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        with (out / "tests.log").open("w") as log:
            status = subprocess.call(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        lines = (out / "tests.log").read_text().splitlines()
        bad = [line[:200] for line in lines if re.match(r"(FAILED|ERROR) ", line)]
        row = {"summary": lines[-1] if lines else "", "bad": bad}
        return row if status == 0 else row | {"failed": f"pytest: exit {status}, {row['summary']}"}

    recorder.row("tests", {"files": files}, test, seconds=TEST_SECONDS + 20)


def test_table(rows: list[Row]) -> str:
    lines = []
    for r in [r for r in rows if r["table"] == "tests"]:
        lines += [f"tests: {r.get('failed') or r['summary']} ({len(r['files'])} files)", *r.get("bad", [])]
    return "\n".join(lines)


# What matters most comes last: where output is cut, the beginning goes.
TABLES = {
    "a": (gpu_facts.table, gpu_rows.table, test_table),
    "b": (gpu_sweep.table, gpu_model.table, gpu_kernel.table),
    "c": (gpu_update.table,),
}


def main() -> None:
    part, out = sys.argv[1], Path(sys.argv[2])
    device = os.environ.get("SUITE_DEVICE", "cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("SUITE_DEVICE: expected a GPU for 'cuda', found none; 'cpu' is a dry run")
    deadline = float(os.environ.get("SUITE_DEADLINE", "inf"))
    recorder = Recorder(out, device, deadline, os.environ.get("SUITE_ONLY", ""))
    facts = environment(device)
    recorder.row("environment", {"part": part}, lambda: dict(facts))
    for module in PARTS[part]:
        module.run(recorder)
    if part == "a" and recorder.wants("tests"):
        run_tests(recorder, out)
    tables = [lambda rows: header(facts), *TABLES[part]]
    text = "\n\n".join(filter(None, (shown(table, recorder.rows) for table in tables)))
    (out / f"tables_{part}.md").write_text(text + "\n")
    print(text[-SHOWN:])
    faults = recorder.faults()
    for row in faults:
        print("FAULT:", " ".join(str(value) for value in row.values())[:200])
    if faults:
        raise SystemExit(f"{len(faults)} rows failed")


def shown(table: Callable[[list[Row]], str], rows: list[Row]) -> str:
    """A table that cannot be made must not cost the others."""
    try:
        return table(rows)
    except Exception as error:
        return f"{table.__module__}: no table, {reason_of(error)}"


if __name__ == "__main__":
    main()
