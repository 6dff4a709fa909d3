"""Builds csrc/cpu into hsd_kernels/ (the rest of the package is in pyproject.toml).

    python setup.py build_ext --inplace

`pip install` builds it if it can: a machine without a compiler gets the package without it, and `impl="auto"` then uses
the torch rows. `python -m build` leaves it out and makes a pure wheel. HSD_BUILD_CPU=1 builds it in both, and a failed
build is an error; HSD_BUILD_CPU=0 does not try.
"""

from __future__ import annotations

import os
import platform
import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

WANTED = os.environ.get("HSD_BUILD_CPU", "")
if WANTED not in ("", "0", "1"):
    raise ValueError(f"HSD_BUILD_CPU: expected 0, 1 or unset, got {WANTED!r}")
# Both call the same hook; pip leaves this variable in the environment (so it does from 22.1 to 26.3).
INSTALLING = "PIP_BUILD_TRACKER" in os.environ
PURE = WANTED == "0" or (WANTED == "" and "bdist_wheel" in sys.argv and not INSTALLING)

# No contraction: see csrc/cpu/simd.h. Without exceptions nothing of a C++ runtime is linked.
FLAGS = ["-O3", "-g0", "-std=c++17", "-fopenmp", "-ffp-contract=off", "-fno-exceptions", "-fvisibility=hidden"]
FLAGS += ["-Wall", "-Wextra"]
# Only these files may use these instructions; csrc/cpu/dispatch.cpp asks the machine first.
X86_FLAGS = {"avx2.cpp": ["-mavx2", "-mfma"], "avx512.cpp": ["-mavx512f"]}
X86_FLAGS["avx512_bf16.cpp"] = ["-mavx512bw", "-mavx512bf16"]
SOURCES = [f"csrc/cpu/{name}.cpp" for name in ("baseline", "avx2", "avx512", "avx512_bf16", "dispatch")]
HEADERS = [f"csrc/cpu/{name}.h" for name in ("hsd_cpu", "variants", "simd", "elementary", "rows", "columns")]


class PerFileFlags(build_ext):
    """A plain shared library, found by path and loaded with ctypes: it has no PyInit."""

    def build_extension(self, ext: Extension) -> None:
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        objects = []
        for source in ext.sources:
            own = X86_FLAGS.get(os.path.basename(source), []) if x86 else []
            objects += self.compiler.compile([source], output_dir=self.build_temp, extra_postargs=[*FLAGS, *own])
        path = self.get_ext_fullpath(ext.name)
        self.compiler.link_shared_object(objects, path, extra_postargs=["-fopenmp", "-lm"])

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []


cpu = Extension("hsd_kernels._cpu", SOURCES, depends=HEADERS, language="c++", optional=WANTED != "1")
setup(ext_modules=[] if PURE else [cpu], cmdclass={"build_ext": PerFileFlags})
