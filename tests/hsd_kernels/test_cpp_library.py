"""Which rows "auto" takes on a CPU, and a C++ library that is missing or broken."""

from __future__ import annotations

import shutil
import subprocess
import warnings

import pytest
import torch

from hsd_kernels import rows
from hsd_kernels.rows import cpp
from hsd_kernels.rows import eager as torch_rows

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def resolve(impl: str, dtype: torch.dtype = F32, device: str = "cpu"):
    return rows.resolve(impl, torch.device(device), dtype)


def test_resolve_takes_the_library_where_it_fits():
    assert resolve("auto") is resolve("auto", BF16) is resolve("cpp") is cpp
    assert resolve("auto", F64) is resolve("auto", F16) is torch_rows
    for dtype in (F64, F16):
        with pytest.raises(TypeError, match=f"^impl='cpp': expected float32 or bfloat16 inputs, got {dtype}"):
            resolve("cpp", dtype)
    with pytest.raises(ValueError, match=r"^impl='cpp': expected CPU tensors, got cuda"):
        resolve("cpp", device="cuda")


def test_missing_library(monkeypatch, tmp_path):
    monkeypatch.setattr(cpp, "FOLDER", tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve("auto") is torch_rows
    with pytest.raises(ValueError, match=r"^impl='cpp': expected the built library .*; run `python setup.py build_ext"):
        resolve("cpp")


@pytest.mark.parametrize("kind", ["no library", "another library", "another ABI"])
def test_broken_library(kind, monkeypatch, tmp_path):
    built = cpp.find()
    assert built is not None
    monkeypatch.setattr(cpp, "FOLDER", tmp_path)
    path, message = tmp_path / built.name, "a library that loads, got"
    if kind == "no library":
        path.write_bytes(b"not a library")
    elif kind == "another library":
        subprocess.run(["cc", "-shared", "-x", "c", "-", "-o", path], input=b"int other;", check=True)
    else:
        shutil.copy(built, path)
        monkeypatch.setattr(cpp, "ABI", cpp.ABI + 1)
        message = rf"hsd_cpu_abi\(\) to be {cpp.ABI}, got {cpp.ABI - 1}"
    with pytest.raises(RuntimeError, match=f"^impl='cpp': expected {message}.*{built.name}.*; run `python setup.py"):
        resolve("cpp")
    with pytest.warns(RuntimeWarning, match=f"impl='auto' takes the torch rows: impl='cpp': expected {message}"):
        assert resolve("auto") is torch_rows
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve("auto") is torch_rows, "a second warning"
