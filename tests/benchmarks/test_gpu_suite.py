"""What the suite promises of its rows: each is saved as it is made, and one that fails, hangs or dies is a row too."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PART = """
import os, sys, time
from pathlib import Path
from suite import Recorder

recorder = Recorder(Path(sys.argv[1]), "cpu", deadline=float(sys.argv[2]))
print(recorder.row("t", {"n": 1}, lambda: {"value": 1})["value"])
recorder.row("t", {"n": 2}, lambda: 1 / 0)
recorder.row("t", {"n": 3}, lambda: os._exit(9))
recorder.row("t", {"n": (4,)}, lambda: time.sleep(60), seconds=0.2)
recorder.row("t", {"n": 5}, lambda: {"value": 5})
"""


def run(folder, deadline="inf"):
    path = {"PYTHONPATH": str(BENCHMARKS)}
    return subprocess.run([sys.executable, "-c", PART, folder, deadline], env=os.environ | path).returncode


def test_a_part_goes_on_after_rows_that_end_its_process(tmp_path):
    statuses = [run(tmp_path) for _ in range(4)]
    assert statuses == [9, 75, 0, 0]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [r["n"] for r in rows] == [1, 2, 3, [4], 5]
    failed = [r.get("failed") for r in rows]
    assert failed[1].startswith("ZeroDivisionError")
    assert failed[2:4] == ["the process ended in this row", "took longer than 0 s"]
    assert failed[0] is failed[4] is None


def test_no_row_is_begun_after_the_deadline(tmp_path):
    assert run(tmp_path, "0") == 1  # the first row has no value to print
    (row,) = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert row["failed"] == "no time was left"


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_model  # pyright: ignore[reportMissingImports]
    import gpu_suite  # pyright: ignore[reportMissingImports]

    return gpu_suite, gpu_model


def test_every_cuda_test_of_the_kernel_and_the_tree_is_run(modules):
    suite, _ = modules
    tests = BENCHMARKS.parent / "tests"
    marked = {str(f.relative_to(tests.parent)) for f in tests.rglob("test_*.py") if "mark.cuda" in f.read_text()}
    assert marked - {str(Path(__file__).relative_to(tests.parent))} <= set(suite.cuda_tests())


def test_the_model_says_not_measured_where_there_is_no_row(modules):
    _, model = modules
    assert "not measured" in model.table([]) and "%" not in model.table([]).split("\n\n")[1]
    shape = [8192, 4096, 151_936]
    row = {"table": "kernel", "shape": shape, "contender": "hsd_kernels, 1 GiB", "median": 0.06, "ratio": 1.16}
    assert "60.0 (1.16)" in model.table([row])


def test_the_model_predicts_the_design_that_runs(modules):
    """At one buffer, and at several: what `memory.sizes` gives this memory on a GPU (test_chunks.py)."""
    _, model = modules
    for shape, chunk, buffer in (((8192, 4096, 151_936), 384, 8192), (model.REFERENCE, 384, 4096)):
        design = model.design_of("hsd_kernels", shape)
        assert (design.chunk, design.buffer, design.logit_bytes, design.reads) == (chunk, buffer, 8, 1)
    design = model.design_of("hsd_kernels, linear bf16, 4.6 GiB", model.REFERENCE)
    assert (design.chunk, design.logit_bytes) == (512, 4) and design.buffer > 8192


def test_the_model_orders_the_designs(modules):
    """Two passes cost more than one, and short chunks more than tall ones."""
    _, model = modules
    total = [model.predict(model.CARDS["H100"], design, model.REFERENCE)["total"] for design in model.DESIGNS]
    floor = model.bare(model.CARDS["H100"], model.REFERENCE)
    assert total[0] > total[2] > total[3] > total[6] > floor
