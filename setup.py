"""Builds csrc/cpu into hsd_kernels/ (the rest of the package is in pyproject.toml).

    python setup.py build_ext --inplace

`pip install` builds it if it can: without a compiler, or without torch's headers in the build's environment (pip's
isolated builds have none: --no-build-isolation), it installs the package without it, and `impl="auto"` then uses the
torch rows. `python -m build` leaves it out and makes a pure wheel. HSD_BUILD_CPU=1 builds it in both, and a failed
build is an error; HSD_BUILD_CPU=0 does not try.
"""

from __future__ import annotations

import os
import platform
import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

WANTED = os.environ.get("HSD_BUILD_CPU", "")
if WANTED not in ("", "0", "1"):
    raise ValueError(f"HSD_BUILD_CPU: expected 0, 1 or unset, got {WANTED!r}")
# Both call the same hook; pip leaves this variable in the environment (so it does from 22.1 to 26.3).
INSTALLING = "PIP_BUILD_TRACKER" in os.environ
PURE = WANTED == "0" or (WANTED == "" and "bdist_wheel" in sys.argv and not INSTALLING)

# No contraction: see csrc/cpu/simd.h.
FLAGS = ["-O3", "-g0", "-std=c++17", "-fopenmp", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra"]
# Only these files may use these instructions; csrc/cpu/operators.cpp asks the machine first.
X86_FLAGS = {"avx2.cpp": ["-mavx2", "-mfma"], "avx512.cpp": ["-mavx512f"]}
X86_FLAGS["avx512_bf16.cpp"] = ["-mavx512bw", "-mavx512bf16"]
X86_FLAGS["amx_bf16.cpp"] = ["-mavx512bw", "-mamx-tile", "-mamx-bf16"]
TORCH_2_9 = "-DTORCH_TARGET_VERSION=0x0209000000000000"  # the stable ABI of torch 2.9 and of every later one
SOURCES = [f"csrc/cpu/{name}.cpp" for name in ("baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16", "operators")]
HEADERS = [f"csrc/cpu/{name}.h" for name in ("passes", "pairs", "simd", "elementary", "rows", "columns")]


class PerFileFlags(build_ext):
    """A plain shared library, found by path and loaded with torch.ops.load_library: it has no PyInit."""

    def build_extension(self, ext: Extension) -> None:
        spec = find_spec("torch")
        if spec is None or spec.origin is None:
            raise CompileError("csrc/cpu: expected torch in the build's environment (--no-build-isolation), got none")
        torch = Path(spec.origin).parent
        own = dict(X86_FLAGS) if platform.machine().lower() in ("x86_64", "amd64") else {}
        own["operators.cpp"] = [TORCH_2_9, "-isystem", str(torch / "include")]
        objects = []
        for source in ext.sources:
            flags = [*FLAGS, *own.get(os.path.basename(source), [])]
            objects += self.compiler.compile([source], output_dir=self.build_temp, extra_postargs=flags)
        path, libraries = self.get_ext_fullpath(ext.name), [f"-L{torch / 'lib'}", "-ltorch_cpu"]
        self.compiler.link_shared_object(objects, path, extra_postargs=[*libraries, "-fopenmp"], target_lang="c++")

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []


cpu = Extension("hsd_kernels._cpu", SOURCES, depends=HEADERS, language="c++", optional=WANTED != "1")
setup(ext_modules=[] if PURE else [cpu], cmdclass={"build_ext": PerFileFlags})
