"""How a kernel's error is judged: against fp64, measured by what plain PyTorch loses in the same dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_within_budget(
    name: str, candidate: Tensor, same_dtype: Tensor, exact: Tensor, scale: float | None = None
) -> None:
    """max |candidate - exact| <= 2 (max |same_dtype - exact| + band), band = eps(candidate) * scale.

    ``exact`` is the fp64 result and ``same_dtype`` that of an eager evaluation in the candidate's arithmetic.
    ``scale`` is the magnitude of the numbers that were rounded on the way, by default the largest result.
    Infinities must be the same infinities and ``exact`` holds no NaN.
    """
    candidate64, same64, exact = (t.detach().cpu().double() for t in (candidate, same_dtype, exact))
    finite = exact.isfinite()
    if not torch.equal(candidate64[~finite], exact[~finite]) or not candidate64[finite].isfinite().all():
        raise AssertionError(f"{name}: expected {exact} where it is not finite, got {candidate64}")
    if not finite.any():
        return
    if scale is None:
        scale = exact[finite].abs().max().item()
    error, same_error = ((t - exact)[finite].abs().max().item() for t in (candidate64, same64))
    budget = 2.0 * (same_error + torch.finfo(candidate.dtype).eps * scale)
    if not error <= budget:
        allowed = f"{budget:.3g} (the same dtype: {same_error:.3g})"
        raise AssertionError(f"{name}: expected an error of at most {allowed}, got {error:.3g}")
