"""A peak is of what was measured, and not of what was freed before it."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PROGRAM = """
import torch
from timing import peak_bytes, reset_peak

inputs = torch.ones(64 << 20)  # 256 MiB, freed
del inputs
base = reset_peak("cpu")
measured = torch.ones(16 << 20)  # 64 MiB
del measured
print((peak_bytes("cpu") - base) >> 20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets a peak")
def test_a_peak_forgets_what_was_freed_before():
    found = subprocess.run([sys.executable, "-c", PROGRAM], cwd=BENCHMARKS, capture_output=True, text=True, check=True)
    assert 60 <= int(found.stdout) < 80
