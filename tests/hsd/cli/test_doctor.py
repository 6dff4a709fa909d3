import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hsd.cli import doctor

BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"trl", "transformers", "accelerate", "datasets", "peft", "matplotlib"}:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
import argparse
from hsd.cli import doctor
assert "torch" not in sys.modules
sys.exit(doctor.run(argparse.Namespace(json=True)))
"""


@pytest.fixture(scope="module")
def bare():
    """The report of an installation without the trainer's extras."""
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, timeout=120)
    return done, json.loads(done.stdout or "{}")


def test_it_works_without_the_trainers_extras(bare):
    done, report = bare
    assert done.returncode == 0, done.stderr
    assert "transformers is blocked" in report["tree attention"]["all"]["why"]
    assert set(report["row kernels"]) >= {"cpu float32", "cpu bfloat16", "C++ library"}
    assert report["verifiers"]["level"] in ("strong", "partial", "limits")


def test_missing_packages_are_named(monkeypatch):
    def version(name):
        if name in ("vllm", "trl"):
            raise doctor.metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(doctor.metadata, "version", version)
    text = doctor.render({"packages": doctor.packages()})
    assert "(missing: trl; run `pip install -c constraints.txt --no-build-isolation -e '.[train]'`)" in text
    assert "(missing: vllm)" in text and "torch 1.0" in text


INSTALLED = """
import importlib.metadata
from hsd.cli import doctor
from hsd_kernels import native
version = importlib.metadata.version
def without_trl(name):
    if name == "trl":
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = without_trl
print(doctor.render({"packages": doctor.packages(), "row kernels": doctor.row_kernels()}))
"""


def test_an_installation_by_pip_is_told_commands_of_pip(tmp_path):
    root = Path(__file__).parents[3]
    for package in ("hsd", "hsd_kernels"):  # as in a wheel: no setup.py, no library
        shutil.copytree(root / package, tmp_path / package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", INSTALLED], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert "missing: trl; run `pip install 'hsd-kernels[train]'`" in done.stdout, done.stderr
    assert "not built; run `HSD_BUILD_CPU=1 pip install --force-reinstall" in done.stdout
    assert "setup.py" not in done.stdout and "constraints.txt" not in done.stdout


def test_the_rows_are_those_that_run(monkeypatch):
    from hsd_kernels import native

    monkeypatch.setattr(native, "find", lambda: None)
    rows = doctor.row_kernels()
    assert rows["cpu bfloat16"]["impl"] == "torch" and rows["C++ library"]["built"] is False
    assert native.BUILD in doctor.render({"row kernels": rows})


def test_a_library_that_does_not_load_is_broken_and_hides_nothing(monkeypatch, tmp_path, capsys):
    from hsd_kernels import native

    broken = tmp_path / "_cpu.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(native, "find", lambda: broken)
    monkeypatch.setattr(doctor, "verifiers", lambda: 1 / 0)
    assert doctor.run(argparse.Namespace(json=True)) == 1
    report = json.loads(capsys.readouterr().out)
    assert "that loads, got" in report["row kernels"]["C++ library"]["broken"]
    assert report["row kernels"]["cpu float32"]["impl"] == "torch"
    assert report["verifiers"]["broken"].startswith("ZeroDivisionError") and "python" in report["machine"]


def test_the_products_are_those_that_run(monkeypatch):
    from hsd_kernels import gemm

    products = ("cpu bfloat16, logits", "cpu bfloat16, dH", "cpu bfloat16, dW")
    for machine, expected in (
        (gemm.Machine("avx512", vdpbf16ps=True, tiles=False, mkl=True), ["vdpbf16ps", "torch", "vdpbf16ps"]),
        (gemm.Machine("amx", vdpbf16ps=True, tiles=True, mkl=True), ["tiles", "torch", "tiles"]),
        (gemm.Machine("none", vdpbf16ps=False, tiles=False, mkl=False), ["torch", "torch", "torch"]),
    ):
        monkeypatch.setattr(gemm, "machine", lambda machine=machine: machine)
        found = doctor.matrix_products()
        assert [found[name]["impl"] for name in products] == expected and found["bf16 instructions"] == machine.bf16


def test_tree_attention_asks_the_trainers_own_rule():
    pytest.importorskip("transformers")
    found = doctor.tree_attention()
    assert found["cuda bfloat16"]["backend"] == "varlen" and found["cpu, many branches"]["backend"] == "gather"


def test_arguments_and_the_printed_report(capsys):
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    assert doctor.HELP and parser.parse_args(["--json"]).json is True
    assert doctor.run(parser.parse_args([])) == 0
    text = capsys.readouterr().out
    assert all(title in text for title in ("packages", "row kernels", "matrix products", "code sandbox"))
