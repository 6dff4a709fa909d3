"""A method of the family: the teacher's context, its own code and its defaults."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hsd.hindsight.context import ContextParts
from hsd.hindsight.teacher_prompts import ContextOf, RolloutView

# (advantages (B, T), D (B, T) = log q(o_t) - log p(o_t), mix in [0, 1]) -> advantages (B, T)
TokenAdvantages = Callable[[Tensor, Tensor, float], Tensor]


@dataclass(frozen=True)
class Method:
    """One member of the family.

    Args:
        name: As in ``HSDConfig.method``.
        context_of: The teacher's context for a rollout. None: there is no teacher, and the loss is
            `trl.GRPOTrainer`'s own.
        draws_peers: Whether ``context_of`` looks at the peer.
        uses_feedback: Whether it looks at the environment's feedback.
        needs: Data-set columns without which the method has nothing to show.
        token_advantages: Reshapes GRPO's advantages token by token.
        defaults: Of `HSDConfig`'s fields, where the user leaves the choice to the method: what differs from HSD's, or,
            without a teacher, from `GRPOConfig`'s.
    """

    name: str
    context_of: ContextOf | None = None
    draws_peers: bool = False
    uses_feedback: bool = False
    needs: tuple[str, ...] = ()
    token_advantages: TokenAdvantages | None = None
    defaults: dict[str, Any] = field(default_factory=dict)

    @property
    def has_teacher(self) -> bool:
        return self.context_of is not None


def demonstrate(
    view: RolloutView, demonstration: Sequence[int] | str | None, feedback: str | None = None
) -> ContextParts | None:
    """The demonstration, else the feedback alone, else the answer alone; the answer where the options show it.

    The feedback stays beside the demonstration: it is shown where that one says nothing or does not fit.
    """
    if demonstration is not None:
        return ContextParts(view.answer, demonstration, feedback)
    if feedback:
        return ContextParts(feedback=feedback)
    return ContextParts(view.answer) if view.answer is not None and view.fallback == "answer" else None
