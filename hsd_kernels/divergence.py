"""The mathematics of one row: what is summed over the vocabulary and what its gradient is.

For one token let ``x`` be the raw head outputs and ``z = softcap * tanh(logit_scale * x / softcap) / temperature``
the logits that are compared (without a softcap ``z = logit_scale * x / temperature``). With
``ls = log_softmax(z_student)``, ``lt = log_softmax(z_teacher)``, ``ps = exp(ls)``, ``pt = exp(lt)`` every
divergence is a sum of summands ``f_v(ls_v, lt_v)``, and the gradient to the student's logits is

    dz_v = g_v - ps_v * G,    G = sum_u g_u,    g_v = d f_v / d ls_v  (up to a multiple of ps_v, which cancels)

| divergence | f_v | g_v | g_v where clipped (OPSD) | G without clip |
|---|---|---|---|---|
| forward_kl = KL(teacher || student) | pt (lt - ls) | ps - pt | ps | 0 |
| reverse_kl = KL(student || teacher) | ps (ls - lt) | ps (ls - lt) | -ps | KL |
| jsd, m = (1 - beta) ps + beta pt | beta pt (lt - lm) + (1 - beta) ps (ls - lm) | (1 - beta) ps (ls - lm) | 0 | sum g |

The multiples of ps are chosen so that equal rows give exactly zero. For the same reason, and to stay finite where both
log-probs are far below the range of exp, the mixture is taken relative to the larger side: with d = lt - ls,
lt - lm = d + (ls - lm) with ls - lm = -log1p(beta expm1(d)) for d <= 0, and ls - lm = -d + (lt - lm) with
lt - lm = -log1p((1 - beta) expm1(-d)) for d > 0: never inf - inf where one side alone is -inf.

A pointwise clip replaces f_v by min(f_v, kl_clip) before the sum. In OPSD's form f_v is the summand above: some are
negative and are not clipped, so the sum may be negative. In the non-negative form the two masses, equal in sum, are put
back into each summand, f_v = p (log p - log q) - p + q >= 0, so the clipped sum stays non-negative; its g_v is 0 where
clipped. The JSD's summands have that form already. Every row backend implements this table; the eager reference does
not use it and so checks it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
CLIP_FORMS = ("opsd", "nonnegative")


@dataclass(frozen=True)
class RowSpec:
    """What to compute for each row. ``jsd`` here always has 0 < beta < 1: `resolve` maps the end points."""

    divergence: str = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0
    kl_clip: float | None = None
    kl_clip_form: str = "opsd"
    logit_scale: float = 1.0
    softcap: float | None = None
    linear: bool = False  # the student's block of logits holds x_student - x_teacher, by linearity of the head

    @property
    def is_nonnegative(self) -> bool:
        """Whether the sum of the f_v is at least 0."""
        return self.kl_clip is None or self.kl_clip_form == "nonnegative" or self.divergence == "jsd"

    @property
    def scales(self) -> tuple[float, float]:
        """(in_scale, kappa > 0): z = kappa * y with y = in_scale * x, or its tanh under a softcap."""
        if self.softcap is not None:
            return self.logit_scale / self.softcap, self.softcap / self.temperature
        if self.logit_scale > 0.0:
            return 1.0, self.logit_scale / self.temperature
        return self.logit_scale, 1.0 / self.temperature

    @staticmethod
    def resolve(divergence: str, beta: float, **rest: Any) -> RowSpec:
        """beta = 0 is the forward KL and beta = 1 the reverse KL, as in GKD: the raw formula would vanish there."""
        if divergence == "jsd" and beta in (0.0, 1.0):
            divergence = "forward_kl" if beta == 0.0 else "reverse_kl"
        return RowSpec(divergence=divergence, beta=beta, **rest)


class RowStats(NamedTuple):
    """Per-row statistics, each (C,), fp32 (fp64 for fp64 inputs), in nats, without gradient.

    ``rows`` are the positions of these rows in the flattened (T,) input, so that a weight function can look up
    what it knows about a token. The two log-probs are None when no ``target_ids`` were given.
    """

    rows: Tensor
    kl: Tensor
    student_logps: Tensor | None
    teacher_logps: Tensor | None
    student_entropy: Tensor
    teacher_entropy: Tensor
    student_lse: Tensor
    teacher_lse: Tensor
    grad_sum: Tensor  # G in the table above
