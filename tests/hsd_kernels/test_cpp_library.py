"""Which rows "auto" takes on a CPU, a C++ library that is missing or broken, and its operators as torch sees them."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from hsd_kernels import native, rows
from hsd_kernels.rows import cpp
from hsd_kernels.rows import eager as torch_rows

SOURCE = Path(__file__).parents[2] / "csrc" / "cpu" / "operators.cpp"
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
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve("auto") is torch_rows
    assert not native.available() and not native.takes(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"^impl='cpp': expected the built library .*; run `HSD_BUILD_CPU=1 py"):
        resolve("cpp")


# In a process of its own: what a library registers stays.
BROKEN = """
import sys, warnings
from pathlib import Path
import torch
from hsd_kernels import native, rows
native.FOLDER, native.ABI = Path(sys.argv[1]), int(sys.argv[2])
try:
    rows.resolve("cpp", torch.device("cpu"), torch.float32)
except RuntimeError as error:
    print(error)
for _ in range(2):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows.resolve("auto", torch.device("cpu"), torch.float32)
    print([str(w.message).partition(": expected")[0] for w in caught])
assert not native.available()
"""


@pytest.mark.parametrize("kind", ["no library", "another library", "another ABI"])
def test_broken_library(kind, tmp_path):
    built = native.find()
    assert built is not None
    path, abi = tmp_path / built.name, native.ABI
    if kind == "no library":
        path.write_bytes(b"not a library")
    elif kind == "another library":
        subprocess.run(["cc", "-shared", "-x", "c", "-", "-o", path], input=b"int other;", check=True)
    else:
        path.symlink_to(built)
        abi += 1
    command = [sys.executable, "-c", BROKEN, str(tmp_path), str(abi)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    error, first, second = done.stdout.strip().splitlines()
    got = {"no library": ".*", "another library": "a library without the operators", "another ABI": f"ABI {abi - 1}"}
    expected = f"impl='cpp': expected a library of ABI {abi} that loads, got "
    assert error.startswith(expected) and error.endswith(f"({path}); run `{native.BUILD}`")
    if kind != "no library":
        assert error.removeprefix(expected).startswith(got[kind])
    assert first == str(["impl='auto' takes the torch rows: impl='cpp'"]) and second == "[]"


@pytest.mark.parametrize("schema", native.SCHEMAS, ids=lambda s: s.partition("(")[0])
def test_every_schema_has_its_implementation(schema):
    """Torch compares the number of arguments, at the first call. Their order and types are compared here."""
    parsed = torch._C.parse_schema(schema)
    assert native.facts().abi == native.ABI
    key = "CompositeExplicitAutograd" if parsed.name == "facts" else "CPU"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"hsd_cpu::{parsed.name}", key)

    source = SOURCE.read_text().replace("\\\n", " ")
    macros = dict(re.findall(r"^#define (ROWS|FORM|RUN)\s+(.*)$", source, re.MULTILINE))
    (found,) = re.findall(rf"^\S+(?: \S+)* {parsed.name}\(([^()]*)\) \{{", source, re.MULTILINE)
    found = re.sub(r"\b(ROWS|FORM|RUN)\b", lambda m: macros[m[0]], found)
    names = {"Tensor?": "MaybeTensor", "int": "int64_t", "float": "double", "float?": "MaybeFloat"}
    types = [str(a.type).replace("Optional[", "").replace("]", "?") for a in parsed.arguments]
    wanted = [f"{names.get(t, t)} {a.name}" for t, a in zip(types, parsed.arguments, strict=True)]
    assert [" ".join(part.split()) for part in found.split(",") if part.strip()] == wanted


def test_a_compiled_caller():
    """torch.compile calls an operator that changes its arguments without a fake of ours."""
    dz = torch.randn(9, 70, generator=torch.Generator().manual_seed(0))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def norms(dz):
        mass, largest = dz.new_zeros(70, dtype=F64), dz.new_zeros(70)
        torch.ops.hsd_cpu.column_norms(mass, largest, dz, variant=0, threads=1)
        return mass, largest

    mass, largest = norms(dz)
    torch.testing.assert_close(mass, dz.double().abs().sum(0), rtol=1e-6, atol=0.0)
    assert torch.equal(largest, dz.abs().amax(0))
