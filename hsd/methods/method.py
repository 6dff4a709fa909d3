"""A method of the family: the teacher's contexts, the terms of its loss, its state and its defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from hsd.hindsight.context import Content, Context
from hsd.hindsight.teacher_prompts import Contexts, RolloutView, parts
from hsd.methods.draw import Draw
from hsd.methods.term import TERMS, Stats, Term


class _Required:
    def __repr__(self) -> str:
        return "required"


REQUIRED: Any = _Required()  # a setting that the source does not publish


class State(Protocol):
    """What a method remembers between steps: plain numbers and lists, equal on all ranks, saved in checkpoints."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Generation:
    """The rollouts of one generation, for `Method.on_batch`.

    ``stats`` are of this rank's rollouts; its ``rows`` are None unless the method scores. ``gather`` makes of values
    (n,) of this rank those of all ranks (N,), in the same order on each.
    """

    stats: Stats
    gather: Callable[[Tensor], Tensor]

    def tokens(self, values: Tensor) -> Tensor:
        """Of the rollouts' tokens that have a teacher, over all ranks; ``values`` is (B, T)."""
        return self.gather(values[(self.stats["mask"] * self.stats["has_context"]).bool()])

    def rollouts(self, values: Tensor) -> Tensor:
        """Of all ranks' rollouts; ``values`` is (B, 1)."""
        return self.gather(values.reshape(-1))


# -> columns of `Stats`, by name: () for the batch, (B,) for its rollouts or (B, T) for their tokens
OnBatch = Callable[[Generation, Any], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Method:
    """One member of the family.

    Args:
        name: As in ``HSDConfig.method``.
        contexts: The teacher's contexts for a rollout. None: there is no teacher, and the loss is a policy gradient.
        terms: Of the loss; by default the divergence and the policy gradient, each with its coefficient.
        max_contexts: How many contexts a rollout has at most, each a forward of the teacher.
        draws_peers: Whether ``contexts`` looks at the peer.
        uses_feedback: Whether it looks at the environment's feedback.
        needs: Data-set columns without which the method has nothing to show.
        on_batch: Called with each generation and the state, before the terms read either: columns of its own for
            `Stats`, and, under "advantages", other advantages (B,) than GRPO's.
        draw: Called with each scored group, before the contexts: `hsd.methods.draw`.
        marks: Names of the columns that it leaves.
        max_rows: How many extra rows a rollout has at most, each a forward of student and teacher.
        scores: Whether ``on_batch`` reads student and teacher: a pass without gradient over the generation.
        state: Makes the state at the start of a run. ``on_batch`` changes it in training, and a copy in evaluation.
        settings: Numbers and wordings of its own and their defaults, `REQUIRED` where the source publishes none;
            ``method_args`` of `HSDConfig` changes them.
        defaults: Of `HSDConfig`'s fields, where the user leaves the choice to the method: what differs from HSD's, or,
            without a teacher, from `GRPOConfig`'s.
    """

    name: str
    contexts: Contexts | None = None
    terms: tuple[Term, ...] = TERMS
    max_contexts: int = 1
    draws_peers: bool = False
    uses_feedback: bool = False
    needs: tuple[str, ...] = ()
    on_batch: OnBatch | None = None
    draw: Draw | None = None
    marks: tuple[str, ...] = ()
    max_rows: int = 0
    scores: bool = False
    state: Callable[[], State] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)

    @property
    def has_teacher(self) -> bool:
        return self.contexts is not None


def demonstrate(view: RolloutView, demonstration: Content | None, feedback: str | None = None) -> list[Context]:
    """The demonstration, else the feedback alone, else the ``fallback``; the answer where the options show it.

    A blank text is no demonstration. The feedback stays beside the demonstration: it is shown where that one does not
    fit.
    """
    if demonstration.strip() if isinstance(demonstration, str) else demonstration:
        return [Context(parts(answer=view.answer, demonstration=demonstration, feedback=feedback))]
    if feedback:
        return [Context(parts(feedback=feedback))]
    if view.fallback == "solution":
        return [Context(parts(answer=view.answer, demonstration=view.row["solution"]))]
    return [Context(parts(answer=view.answer))] if view.answer is not None and view.fallback == "answer" else []


def nothing(view: RolloutView) -> list[Context]:
    """The ``contexts`` of a method whose rollouts have no divergence: its teacher reads extra rows alone."""
    return []


def other_successes(view: RolloutView) -> Sequence[int]:
    """Indices of the group's successes but the rollout itself."""
    return view.group.success_peers(view.i)
