"""CL-EGRSD (arXiv 2605.13255): EGRSD, in which only a doubt that lasts takes weight away.

    H_t of EGRSD becomes min(H_t, ..., H_{t+W-1}), within the rollout        # W = 3 or 5 in the paper

Confidence: high (paper; no code). Whether the window counts t itself is not said; it does here, because else a sure
token before a doubtful span would lose weight.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from hsd.methods import egrsd
from hsd.methods.term import Stats, Term


def lookahead(entropy: Tensor, mask: Tensor, window: int) -> Tensor:
    """(B, T): the minimum over ``window`` tokens from each on, those of the mask; 0 outside it."""
    inside = mask.bool()
    padded = pad(entropy.masked_fill(~inside, torch.inf), (0, window - 1), value=torch.inf)
    return padded.unfold(1, window, 1).amin(-1).masked_fill(~inside, 0.0)


def advantages(s: Stats) -> Tensor:
    return egrsd.weighted(s, lookahead(s.table.teacher_entropy, s["mask"], int(s.settings["window"])))


METHOD = replace(
    egrsd.METHOD,
    name="cl_egrsd",
    terms=(Term("advantage", advantages),),
    settings={**egrsd.METHOD.settings, "window": 3},
)
