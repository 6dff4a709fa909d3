"""The order of questions: TRL's, but a run resumed in a later pass over the data goes on in that pass's order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from trl.trainer.utils import RepeatSampler


class EpochSampler(RepeatSampler):
    """`trl.trainer.utils.RepeatSampler` whose n-th pass has the same shuffle in whatever process it begins.

    TRL's draws one shuffle a pass from a generator that a new process starts over. ``passes()`` says how many are done.
    """

    def __init__(self, *args: Any, passes: Callable[[], int], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.passes = passes

    def __iter__(self):
        if self.shuffle:
            self.generator.manual_seed(self.seed)  # type: ignore[arg-type]
            for _ in range(self.passes()):
                torch.randperm(self.num_samples, generator=self.generator)
        return super().__iter__()
