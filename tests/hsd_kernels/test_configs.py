from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from hsd_kernels import configs


def test_nearest_lower_architecture():
    for capability, arch in ((80, 80), (89, 80), (90, 90), (100, 100), (120, 100)):
        assert configs.row_config("gradient", capability) is configs.PINNED["gradient", arch]
    with pytest.raises(ValueError, match="capability: expected at least 80, got 75"):
        configs.row_config("gradient", 75)
    with pytest.raises(ValueError, match="kernel: expected one of"):
        configs.row_config("softmax", 80)


def test_pinned_configurations_compile_without_spills(tmp_path):
    """Ahead of time, in its own process: the interpreter and the compiler cannot share one."""
    pytest.importorskip("triton")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "hsd_kernels.compile_report", "--quick"]
    result = subprocess.run(
        command, capture_output=True, text=True, env=env | {"TRITON_CACHE_DIR": str(tmp_path)}, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    _, *lines, summary = result.stdout.splitlines()
    compiled = {(line.split()[0], int(arch)) for line in lines for arch in re.findall(r" sm_(\d+) ", line)}
    assert compiled == {
        (kernel, arch) for kernel in ("statistics", "gradient", "one_read") for arch in configs.ARCHITECTURES
    }
    assert summary == f"{len(lines)} variants compiled, 0 spill"
    assert all(line.split()[-2] == "16" for line in lines), "loads are not vectorised"
    most = {
        ("one_read", "fp32"): 40,
        ("one_read", "bf16"): 47,
        ("statistics", "fp32"): 26,
        ("statistics", "bf16"): 29,
        ("gradient", "fp32"): 26,
        ("gradient", "bf16"): 29,
    }
    plain = [line.split() for line in lines if re.search(r" forward_kl (fp32|bf16) .* sm_90 ", line)]
    counts = {(kernel, logits): float(rest[-1]) for kernel, _, logits, *rest in plain}
    assert counts.keys() == most.keys()
    for form, count in counts.items():
        assert most[form] / 2 < count <= most[form], f"{form}: {count} instructions a pair of logits"


def test_import_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; import hsd_kernels.configs, hsd_kernels.compile_report"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_narrow_logits_fill_the_same_16_byte_loads():
    config = configs.RowConfig(block_v=4096, num_warps=8, num_stages=1)
    assert config.lanes(151_936, 4) == {"WIDTH": 4, "LANES": 256, "IN_LANE": 1024}
    assert config.lanes(151_936, 2) == {"WIDTH": 8, "LANES": 256, "IN_LANE": 1024}
    assert config.lanes(1, 4) == {"WIDTH": 4, "LANES": 256, "IN_LANE": 4}
    small = configs.RowConfig(block_v=256, num_warps=8, num_stages=1)
    assert small.lanes(257, 2) == {"WIDTH": 8, "LANES": 32, "IN_LANE": 16}
