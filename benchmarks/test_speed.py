"""The kernel table's work as pytest-benchmark suites, for profiling one contender at a time; not part of `make test`:

python -m pytest benchmarks/test_speed.py --benchmark-group-by=param:shape [-k "hsd_kernels and float32"]
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark")
sys.path.insert(0, str(Path(__file__).parent))
from contenders import CONTENDERS, contenders, step
from workloads import gaussian

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(8192, 4096, 151936), (1024, 2048, 151936)] if DEVICE == "cuda" else [(256, 256, 32768), (1024, 128, 8192)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONTENDERS)
def test_forward_and_backward(benchmark, name, dtype, shape):
    reason = contenders(DEVICE, dtype)[name]
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    tensors = gaussian(shape, getattr(torch, dtype), DEVICE)

    def run():
        step(CONTENDERS[name], *tensors)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
