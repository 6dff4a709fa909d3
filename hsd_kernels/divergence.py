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

A pointwise clip replaces f_v by min(f_v, clip) before the sum. In OPSD's form f_v is the summand above: some are
negative and are not clipped, so the sum may be negative. In the non-negative form the two masses, equal in sum, are put
back into each summand, f_v = p (log p - log q) - p + q >= 0, so the clipped sum stays non-negative; its g_v is 0 where
clipped. The JSD's summands have that form already. Every row backend implements this table; the eager reference does
not use it and so checks it.

With ``top_k`` the sum is over buckets: the k tokens, and the rest as one (``rest="tail"``), or the k tokens alone with
both sides renormalised on them (`rows.buckets`). g and G are those of the bucket's log-probs. Of a tail with
mass P each token's dz is ``ps_v (g_tail / P - G)``; a token outside renormalised support has none. A ``floor`` r
replaces a bucket's lt by max(lt, ls + log r), constant in the student, so that the teacher's masses may sum to more
than 1 and a KL may be negative. G of the forward KL is then not 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from hsd_kernels.head import Head
from hsd_kernels.values import check_choice, check_positive, check_share

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
CLIP_FORMS = ("opsd", "nonnegative")
SIDES = ("student", "teacher")
RESTS = ("tail", "renormalise")


@dataclass(frozen=True)
class Divergence:
    """Which divergence between the teacher and the student, per token and over the whole vocabulary, in nats.

    Args:
        kind: "forward_kl" = KL(teacher || student), HSD's objective; "reverse_kl" = KL(student || teacher);
            "jsd" = beta KL(teacher || m) + (1 - beta) KL(student || m), m = (1 - beta) student + beta teacher.
        beta: the teacher's share of the mixture, in [0, 1]; 0 is the forward and 1 the reverse KL. Only for "jsd".
        temperature: divides the logits of both sides, > 0. There is no factor temperature^2.
        clip: pointwise clip: every vocabulary summand is replaced by min(., clip) before the sum. None for none.
        clip_form: "opsd" clips the summands p log(p / q), so that the per-token value may be negative;
            "nonnegative" clips p log(p / q) - p + q, which have the same sum and none below 0.
        top_k: compare the k likeliest tokens of ``top_of`` instead of the vocabulary; None, or V and more, for all.
        top_of: "student" or "teacher".
        rest: what becomes of the other tokens: one bucket, the "tail", or nothing ("renormalise": both sides are
            divided by their mass on the k tokens).
        floor: the teacher's log-prob of each bucket is at least the student's plus log(floor), not renormalised. None
            for none.

    Raises:
        ValueError, TypeError: naming the field.

    Source: the loss of Hindsight Self-Distillation, arXiv 2606.15576; JSD and clip as in OPSD, arXiv 2601.18734; top k
    and tail: SDPO, arXiv 2601.20802; renormalised: RCSD, arXiv 2606.19327; floor: RESD, arXiv 2605.12741.
    """

    kind: str = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0
    clip: float | None = None
    clip_form: str = "opsd"
    top_k: int | None = None
    top_of: str = "student"
    rest: str = "tail"
    floor: float | None = None

    def __post_init__(self) -> None:
        check_choice("divergence.kind", self.kind, DIVERGENCES)
        check_share("divergence.beta", self.beta)
        check_positive("divergence.temperature", self.temperature)
        check_positive("divergence.clip", self.clip, optional=True)
        check_choice("divergence.clip_form", self.clip_form, CLIP_FORMS)
        check_positive("divergence.top_k", self.top_k, optional=True, integer=True)
        check_choice("divergence.top_of", self.top_of, SIDES)
        check_choice("divergence.rest", self.rest, RESTS)
        check_positive("divergence.floor", self.floor, optional=True)
        if self.floor is not None and self.floor > 1e38:  # fp32 has no larger probabilities
            raise ValueError(f"divergence.floor: expected at most 1e38, got {self.floor}")

    @property
    def is_nonnegative(self) -> bool:
        """Whether the sum of the f_v is at least 0."""
        return self.floor is None and (self.clip is None or self.clip_form == "nonnegative" or self.kind == "jsd")

    @property
    def sums_summands(self) -> bool:
        """Whether each f_v must be made of both log-probs. A KL as it is needs sums of the logits alone."""
        return self.kind == "jsd" or self.clip is not None or self.floor is not None

    @property
    def log_floor(self) -> float | None:
        return None if self.floor is None else math.log(self.floor)

    def resolved(self) -> Divergence:
        """beta = 0 is the forward KL and beta = 1 the reverse KL, as in GKD: the raw formula would vanish there."""
        if self.kind != "jsd" or 0.0 < self.beta < 1.0:
            return self
        return replace(self, kind="forward_kl" if self.beta == 0.0 else "reverse_kl")


@dataclass(frozen=True)
class RowSpec:
    """What a row pass computes: a divergence, and how a head's raw outputs become logits. A "jsd" here always has
    0 < beta < 1 (`of` maps the end points)."""

    divergence: Divergence = field(default_factory=Divergence)
    logit_scale: float = 1.0
    softcap: float | None = None
    linear: bool = False  # the student's block of logits holds x_student - x_teacher, by linearity of the head

    @staticmethod
    def of(divergence: Divergence, head: Head, linear: bool = False) -> RowSpec:
        return RowSpec(divergence.resolved(), head.logit_scale, head.softcap, linear)

    @property
    def scales(self) -> tuple[float, float]:
        """(in_scale, kappa > 0): z = kappa * y with y = in_scale * x, or its tanh under a softcap."""
        temperature = self.divergence.temperature
        if self.softcap is not None:
            return self.logit_scale / self.softcap, self.softcap / temperature
        if self.logit_scale > 0.0:
            return 1.0, self.logit_scale / temperature
        return self.logit_scale, 1.0 / temperature

    @property
    def chain(self) -> float:
        """d z / d x but for the softcap."""
        return self.logit_scale / self.divergence.temperature
