"""What a method's loss is made of: terms with scheduled coefficients, and the statistics that they read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from torch import Tensor

from hsd_kernels import RowStats

# A number; [start, end, steps]; or knots [[step, value], ...], linear between them and constant outside.
Schedule = float | list[float] | list[list[float]]
KINDS = ("divergence", "advantage", "sampled")


def scheduled(value: Schedule, step: int) -> float:
    """``value`` at an optimizer step, counted from 0."""
    if not isinstance(value, list | tuple):
        return float(value)
    if not isinstance(value[0], list | tuple):
        start, end, steps = value
        return start + (end - start) * min(step / steps, 1.0)  # type: ignore[operator]
    knots: Any = value
    if step <= knots[0][0]:
        return float(knots[0][1])
    for (a, low), (b, high) in pairwise(knots):
        if step < b:
            return low + (high - low) * (step - a) / (b - a)
    return float(knots[-1][1])


@dataclass(frozen=True)
class Stats:
    """What the function of a term reads. All without gradient, log-probs and entropies in nats.

    The tensors are those of B rollouts with T tokens at most: (B, T) a token, (B, 1) a rollout, () a number. A
    divergence's weight is asked chunk by chunk, and there every tensor but a number is (C,), a token each.
    Of tokens without a teacher (masked, or no context) the teacher's columns are 0, and so is D.

    ``stats[name]`` is a column: "advantages", "reward", "scored" (whether the rollout has a verdict), "success",
    "has_context" (and "has_context_0", ... where there are several), "length", "group_success" (the group's success
    rate), "group_size", "tau" (-1 for none), "position", "mask", and what `Method.on_batch` returned.
    """

    rows: RowStats | None  # student and the teacher of the first context, at kl_temperature
    columns: Mapping[str, Tensor]
    settings: Mapping[str, Any] = field(default_factory=dict)  # method_args
    step: int = 0
    mix: float = 0.0  # advantage_mix at this step
    contexts: tuple[RowStats, ...] = ()  # of each context, where there are several

    def __getitem__(self, name: str) -> Tensor:
        return self.columns[name]

    @property
    def table(self) -> RowStats:
        assert self.rows is not None
        return self.rows

    @property
    def advantages(self) -> Tensor:
        """GRPO's, or those of `Method.on_batch`."""
        return self.columns["advantages"]

    @property
    def kl(self) -> Tensor:
        """The divergence of the configuration, or, in a divergence's weight, of that term."""
        return self.table.kl

    @property
    def d(self) -> Tensor:
        """D = log q(o_t) - log p(o_t), teacher minus student."""
        return d_of(self.table)

    @property
    def student_logps(self) -> Tensor:
        assert self.table.student_logps is not None
        return self.table.student_logps

    @property
    def teacher_logps(self) -> Tensor:
        assert self.table.teacher_logps is not None
        return self.table.teacher_logps


def d_of(rows: RowStats) -> Tensor:
    """D = log q(o_t) - log p(o_t) of one context."""
    assert rows.teacher_logps is not None and rows.student_logps is not None
    return rows.teacher_logps - rows.student_logps


@dataclass(frozen=True)
class Term:
    """One summand of a loss.

    Args:
        kind: with w the mean over tokens or rollouts (``loss_mean`` for divergences, ``policy_mean`` for the others),

            - "divergence": ``sum w fn(stats) L``, L the full-vocabulary divergence; ``fn`` gives a detached weight.
            - "advantage": ``fn(stats)`` is summed over all terms of this kind to the advantages of one clipped
              surrogate.
            - "sampled": ``sum w fn(logps, stats)``, with logps (B, T) of the rollout's tokens at kl_temperature, the
              only argument with a gradient.
        fn: None is a weight of 1, or GRPO's advantages. "sampled" needs one.
        coef: multiplies ``divergence_coef`` (divergence) or ``policy_coef`` (advantage, sampled).
        divergence: fields of `hsd_kernels.Divergence` that differ from the configuration's.
        context: the number of the context whose teacher the divergence is from.
        rows: over the extra rows of a draw instead of the rollouts, with their own mean (`hsd.methods.draw.Row`). Their
            columns are those of the rollout that a row belongs to, but for its own "mask", "length", "position", and
            "slot", its number among that rollout's rows. No "advantage" has rows.
        teacher: whether ``fn`` reads a teacher's statistics. At a step at which no term reads them there is no forward
            pass of the teacher, and `Stats.rows` is None.
    """

    kind: Literal["divergence", "advantage", "sampled"]
    fn: Callable[..., Tensor] | None = None
    coef: Schedule = 1.0
    divergence: Mapping[str, Any] = field(default_factory=dict)
    context: int = 0
    rows: bool = False
    teacher: bool = True

    @property
    def reads_teacher(self) -> bool:
        return self.kind == "divergence" or (self.fn is not None and self.teacher)


TERMS = (Term("divergence"), Term("advantage"))


def active(
    terms: Sequence[Term], kind: str, outer: float, step: int, *, rows: bool = False
) -> list[tuple[Term, float]]:
    """The terms of a kind whose coefficient, ``outer`` times their own, is not 0 at this step."""
    found = [(term, outer * scheduled(term.coef, step)) for term in terms if term.kind == kind and term.rows == rows]
    return [(term, coef) for term, coef in found if coef != 0.0]
