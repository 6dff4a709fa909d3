"""The one table of row statistics: what a row pass returns, a weight function is shown and a caller reads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RowStats(NamedTuple):
    """Per-row statistics, each (C,), fp32 (fp64 for fp64 inputs), in nats, without gradient.

    ``rows`` are the positions of these rows in the flattened (T,) input, so that a weight function can look up what it
    knows about a token. The two log-probs are None when no ``target_ids`` were given. "Student" and "teacher" are the
    first and the second distribution: with a reference policy, its statistics are the "teacher" of a table of its own.
    """

    rows: Tensor
    kl: Tensor  # the divergence, whichever it is
    student_logps: Tensor | None  # log-prob of target_ids
    teacher_logps: Tensor | None
    student_entropy: Tensor
    teacher_entropy: Tensor
    student_lse: Tensor  # log sum exp of the logits z = kappa * y: kappa * top + log_sum, rounded
    teacher_lse: Tensor
    student_top: Tensor  # the largest y of the row (`RowSpec.scales`)
    teacher_top: Tensor
    student_log_sum: Tensor  # log sum exp(kappa * (y - top)), at least 0
    teacher_log_sum: Tensor
    grad_sum: Tensor  # G of `hsd_kernels.divergence`

    def stack(self) -> Tensor:
        """(len(COLUMNS), C), zeros where a column is None."""
        zero = torch.zeros_like(self.kl)
        columns = self._asdict()
        return torch.stack([zero if columns[name] is None else columns[name] for name in COLUMNS])

    @staticmethod
    def unstack(table: Tensor, rows: Tensor, with_targets: bool) -> RowStats:
        """From (len(COLUMNS), ...), as views."""
        columns = dict(zip(COLUMNS, table.unbind(0), strict=True))
        absent = dict.fromkeys(() if with_targets else TARGET_COLUMNS)
        return RowStats(rows=rows, **(columns | absent))  # pyright: ignore[reportArgumentType]


COLUMNS = tuple(name for name in RowStats._fields if name != "rows")
TARGET_COLUMNS = ("student_logps", "teacher_logps")
