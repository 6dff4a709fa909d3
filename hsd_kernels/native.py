"""The C++ operators of csrc/cpu: their schemas, the one library that implements them, and what it finds on this CPU.

The library registers implementations by torch's stable ABI; one build serves every torch from 2.9 on. It holds the
passes for AVX-512, for AVX2 with FMA and for any machine. No result depends on the number of threads.
"""

from __future__ import annotations

import functools
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

ABI = 8  # HSD_CPU_ABI in csrc/cpu/operators.cpp: of these schemas and what they mean
FOLDER = Path(__file__).parent
IS_CHECKOUT = (FOLDER.parent / "setup.py").is_file()
_FROM_CHECKOUT = "python setup.py build_ext --inplace"
# A wheel has no sources: pip takes the sdist, and builds against the installed torch.
_FROM_SDIST = "pip install --force-reinstall --no-deps --no-build-isolation --no-binary hsd-kernels hsd-kernels"
BUILD = f"HSD_BUILD_CPU=1 {_FROM_CHECKOUT if IS_CHECKOUT else _FROM_SDIST}"
VARIANTS = ("baseline", "avx2", "avx512")
DTYPES = (torch.float32, torch.bfloat16)

_ROWS = "Tensor x_student, Tensor x_teacher, Tensor? bias, Tensor? teacher_bias"
_FORM = (
    "int divergence, float beta, float? clip, bool is_nonnegative, float? log_floor, bool is_linear, bool has_softcap, "
    "float in_scale, float kappa"
)
_RUN = "int variant, int threads"

# Of torch.ops.hsd_cpu, which return nothing but what they write.
SCHEMAS = (
    # `Facts`
    "facts() -> (int, int, bool, bool)",
    # out: the COLUMNS of hsd_kernels/row_stats.py. The log-probs of a target outside the vocabulary are NaN.
    f"statistics(Tensor(a!) out, {_ROWS}, Tensor? target_ids, *, {_FORM}, {_RUN}) -> ()",
    # out lies apart from the logits.
    f"gradient(Tensor(a!) out, {_ROWS}, Tensor student_top, Tensor teacher_top, "
    "Tensor student_log_sum, Tensor teacher_log_sum, Tensor grad_sum, Tensor weights, *, "
    f"{_FORM}, float chain, {_RUN}) -> ()",
    # out = a w^T and out = or, with adds, += a^T w: bf16 into fp32, by AVX512_BF16 or on AMX tiles.
    "project_out(Tensor(a!) out, Tensor a, Tensor w, *, bool tiles, int threads) -> ()",
    "accumulate(Tensor(a!) out, Tensor a, Tensor w, *, bool adds, bool tiles, int threads) -> ()",
    # L1 norm and largest magnitude of each column: NaN where one of its elements is.
    f"column_norms(Tensor(a!) mass, Tensor(b!) largest, Tensor dz, *, {_RUN}) -> ()",
    # x[:, i] = x[:, columns[i]], columns ascending.
    "take_columns(Tensor(a!) x, Tensor columns, *, int threads) -> ()",
    # For tests: function 0 exp, 1 expm1, 2 log1p, 3 tanh.
    "elementary(Tensor(a!) out, Tensor x, *, int function, int variant) -> ()",
)
_library = torch.library.Library("hsd_cpu", "DEF")
for _schema in SCHEMAS:
    _library.define(_schema)  # pyright: ignore[reportUnknownMemberType]


class Facts(NamedTuple):
    """What a loaded library says of itself and of this CPU."""

    abi: int
    fastest: int  # in VARIANTS
    has_products: bool  # AVX512_BF16
    has_tiles: bool  # AMX_BF16, and the system lets this process use it


def find() -> Path | None:
    """The built library, None where there is none. A process looks once: a call asks 17 times."""
    return _built(FOLDER)


@functools.cache
def _built(folder: Path) -> Path | None:
    paths = (folder / f"_cpu{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next((path for path in paths if path.exists()), None)


@functools.cache
def load(path: Path) -> Facts:
    """Raises RuntimeError for a file that is no library, another one or one of another ABI."""
    found = None
    try:
        torch.ops.load_library(path)  # pyright: ignore[reportUnknownMemberType]
        found = Facts(*torch.ops.hsd_cpu.facts())
        got = f"ABI {found.abi}"
    except OSError as error:
        got = str(error)
    except NotImplementedError:
        got = "a library without the operators"
    if found is None or found.abi != ABI:
        raise RuntimeError(f"impl='cpp': expected a library of ABI {ABI} that loads, got {got} ({path}); run `{BUILD}`")
    return found


def facts() -> Facts:
    """Raises ValueError where the library was not built and RuntimeError where it was and is broken."""
    path = find()
    if path is None:
        raise ValueError(
            f"impl='cpp': expected the built library {FOLDER / '_cpu.*'}, got none (a pure wheel has none); run "
            f"`{BUILD}`" + f" in {FOLDER.parent}" * IS_CHECKOUT
        )
    return load(path)


def available() -> bool:
    """Whether the library is there and loads (`hsd_kernels.rows` warns of one that does not)."""
    try:
        facts()
    except (ValueError, RuntimeError):
        return False
    return True


def takes(t: Tensor) -> bool:
    """Whether the library is there and takes this matrix."""
    return t.device.type == "cpu" and t.dtype in DTYPES and t.stride(1) == 1 and available()


def variant() -> int:
    """Number in VARIANTS of the fastest that this machine runs."""
    return facts().fastest


def run() -> dict[str, int]:
    """How a pass runs: in the fastest variant, on torch's threads."""
    return {"variant": variant(), "threads": torch.get_num_threads()}
