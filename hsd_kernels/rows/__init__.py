"""Row backends: one pass for the statistics of a chunk of logits, one that turns the logits into their gradient.

Each backend module has the same two functions, over raw head outputs ``x_student, x_teacher`` of shape (C, V)
(``x_student - x_teacher`` in place of the first if ``spec.linear``):

    statistics(x_student, x_teacher, spec, bias, teacher_bias, target_ids, rows) -> RowStats
    gradient_(x_student, x_teacher, spec, bias, teacher_bias, stats, weights, out) -> None

A ``kl`` that cannot be negative may be a rounding error below 0: the driver clamps it.

``gradient_`` writes ``weights[:, None] * d kl / d x_student`` to ``out`` (C, V), apart from the logits. A row of weight
0 is all zeros, whatever its logits hold. Triton has both in one read of the logits (`one_read`).

A backend knows nothing of a ``top_k``: `Buckets` has the same functions on top of any (`passes`).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from types import ModuleType

import torch

from hsd_kernels import native
from hsd_kernels.divergence import RowSpec
from hsd_kernels.row_stats import RowStats
from hsd_kernels.rows.buckets import Buckets

MODULES = {"torch": "eager", "triton": "triton_rows", "cpp": "cpp"}  # by the name that ``impl`` has for them
IMPLS = ("auto", *MODULES)


def resolve(impl: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The row backend for ``impl``. "auto" is Triton for fp32, bf16 and fp16 on CUDA (sm_80 and later) where triton
    is installed, C++ for fp32 and bf16 on a CPU where its library is built, torch otherwise. An explicit choice that
    cannot run raises and says why; a library that is there and cannot be loaded is a warning under "auto"."""
    if impl == "auto":
        impl = _best(device, dtype)
    elif impl == "triton":
        if importlib.util.find_spec("triton") is None:
            raise ValueError("impl='triton': expected triton to be installed, it is not; use impl='torch'")
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                f"impl='triton': expected CUDA tensors (or TRITON_INTERPRET=1 for the interpreter), got {device}"
            )
        if dtype == torch.float64:
            raise TypeError("impl='triton': expected float32, bfloat16 or float16 inputs, got float64")
    elif impl == "cpp":
        if device.type != "cpu":
            raise ValueError(f"impl='cpp': expected CPU tensors, got {device}")
        if dtype not in native.DTYPES:
            raise TypeError(f"impl='cpp': expected float32 or bfloat16 inputs, got {dtype}")
        native.facts()
    return importlib.import_module(f"hsd_kernels.rows.{MODULES[impl]}")


def passes(backend: ModuleType, vocab: int, spec: RowSpec) -> ModuleType | Buckets:
    """The two functions for ``spec``: over buckets where its top_k is below ``vocab``."""
    top_k = spec.divergence.top_k
    return backend if top_k is None or top_k >= vocab else Buckets(backend)


def both_in_one_read(
    backend: ModuleType | Buckets, logits: torch.Tensor, spec: RowSpec
) -> Callable[..., RowStats] | None:
    """``statistics_and_gradient_`` of these logits where ``backend`` has it: `hsd_kernels.rows.one_read`, and buckets,
    which take the k tokens out once for both."""
    if isinstance(backend, Buckets):
        return backend.statistics_and_gradient_
    if not backend.__name__.endswith(MODULES["triton"]):
        return None
    from hsd_kernels.rows import one_read

    return one_read.statistics_and_gradient_ if one_read.serves(logits, spec) else None


def _best(device: torch.device, dtype: torch.dtype) -> str:
    if device.type == "cuda":
        fits = dtype != torch.float64 and importlib.util.find_spec("triton")
        return "triton" if fits and torch.cuda.get_device_capability(device) >= (8, 0) else "torch"
    if device.type != "cpu" or dtype not in native.DTYPES or native.find() is None:
        return "torch"
    try:
        native.facts()
    except RuntimeError as error:
        _warn_once(f"impl='auto' takes the torch rows: {error}")
        return "torch"
    return "cpp"


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)
