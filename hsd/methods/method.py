"""What tells one method of the family from another: what the teacher is shown, and the defaults of the objective."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hsd.hindsight.groups import Group

# (advantages (B, 1), D (B, T) = log q(o_t) - log p(o_t), mix in [0, 1]) -> advantages (B, T)
TokenAdvantages = Callable[[Tensor, Tensor, float], Tensor]

# The options of `HSDConfig` that a method decides where the user does not. HSD's values; the others override some.
HSD_DEFAULTS: dict[str, Any] = {
    "teacher": "live",
    "teacher_ema_rate": 0.005,
    "show_answer": True,
    "fallback": "answer",
    "peer_rule": "auto",
    "divergence": "forward_kl",
    "jsd_beta": 0.5,
    "kl_temperature": 1.0,
    "kl_clip": 0.0,
    "loss_mean": "rollout",
    "importance_cap": 0.0,
    "divergence_coef": 1.0,
    "policy_coef": 0.0,
    "advantage_mix": 0.0,
    "reference_coef": 0.001,
}


@dataclass(frozen=True)
class Method:
    """One member of the family.

    Args:
        name: as in ``HSDConfig.method``.
        demonstration: where the teacher's demonstration comes from: "peer" (a success of the same group), the name
            of a data-set column, or None.
        needs: data-set columns without which the method has nothing to say.
        feedback: show the environment's feedback where there is no demonstration.
        token_advantages: reshapes GRPO's advantages token by token.
        trl_loss: the loss is `trl.GRPOTrainer`'s own; there is no teacher.
        defaults: what differs from `HSD_DEFAULTS` (or, with ``trl_loss``, from `GRPOConfig`).
    """

    name: str
    demonstration: str | None = None
    needs: tuple[str, ...] = ()
    feedback: bool = False
    token_advantages: TokenAdvantages | None = None
    trl_loss: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Shown:
    """What the teacher sees of one rollout's privileged context; a text, or a peer's token ids."""

    answer: str | None = None
    demonstration: Sequence[int] | str | None = None
    feedback: str | None = None


def shown_to_teacher(
    method: Method,
    group: Group,
    peer: int | None,
    row: Mapping[str, Any],
    feedback: str | None = None,
    *,
    show_answer: bool = True,
    fallback: str = "answer",
) -> Shown | None:
    """The privileged context of a rollout with this ``peer`` (None: it has none) and data-set ``row``.

    A blank answer (LiveCodeBench has none) is not shown. None where there is nothing to show, so that the rollout is
    left out of the loss: no demonstration, no feedback, and either no answer is shown or ``fallback`` is "mask".
    """
    show_answer = show_answer and bool(group.answer.strip())
    if method.demonstration == "peer":
        demonstration: Any = None if peer is None else group.rollouts[peer].token_ids
    else:
        demonstration = row.get(method.demonstration) if method.demonstration else None
    feedback = feedback if method.feedback else None
    if demonstration is not None:  # one that says nothing, or does not fit, leaves the feedback
        return Shown(group.answer if show_answer else None, demonstration, feedback)
    if feedback:
        return Shown(feedback=feedback)
    return Shown(group.answer) if show_answer and fallback == "answer" else None
