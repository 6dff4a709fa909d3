"""A group: one question, its answer, and the G scored rollouts drawn for it (arXiv 2606.15576)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# A plain string (base models) or chat messages, each with "role" and "content".
Prompt = str | list[dict[str, Any]]
ROUNDING = 1e-6  # relative


def least_success(success_reward: float) -> float:
    """The reward from which on a rollout succeeds: ``success_reward``, but for fp32's rounding."""
    # TRL's rewards are fp32: its 0.9 is 0.89999998, and weights 0.01 + 0.78 + 0.21 sum to 0.99999994.
    return success_reward - ROUNDING * max(1.0, abs(success_reward))


@dataclass(frozen=True)
class Rollout:
    """One sampled answer ``o_i`` and its score.

    Args:
        token_ids: The rollout's own tokens, prompt excluded, as sampled; at least one.
        reward: The verifier's score ``R_i``.
        mean_logp: Mean log-probability (nats) of its tokens under the policy that sampled it. Only the
            perplexity rules of :func:`hsd.hindsight.peers.choose_peers` need it.
        scored: Whether a verifier gave a verdict. Without one the rollout is neither a success nor a failure.

    Raises:
        TypeError: ``token_ids`` is not a tuple of ints, or ``reward`` or ``mean_logp`` is not a number.
        ValueError: ``token_ids`` is empty, or ``reward`` or ``mean_logp`` is not finite.
    """

    token_ids: tuple[int, ...]
    reward: float
    mean_logp: float | None = None
    scored: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.token_ids, tuple):
            raise TypeError(f"token_ids: expected a tuple of ints, got {type(self.token_ids).__name__}")
        if not self.token_ids:
            raise ValueError("token_ids: expected at least one token, got none")
        wrong = next((t for t in self.token_ids if not isinstance(t, int)), None)
        if wrong is not None:
            raise TypeError(f"token_ids: expected a tuple of ints, got an element {wrong!r}")
        _check_finite("reward", self.reward)
        if self.mean_logp is not None:
            _check_finite("mean_logp", self.mean_logp)


@dataclass(frozen=True)
class Group:
    """The G rollouts of one question. A rollout succeeds when ``reward >= success_reward``, but for fp32's rounding.

    Args:
        prompt: The question ``q``: a plain string, or a list of chat messages.
        answer: The ground-truth answer ``a*``.
        rollouts: ``o_1 .. o_G``, at least one.
        success_reward: The smallest reward that counts as ``R_i = 1``.

    Raises:
        TypeError: ``prompt``, ``answer`` or ``rollouts`` has the wrong type, or ``success_reward`` is not a
            number.
        ValueError: ``prompt`` or ``rollouts`` is empty, or ``success_reward`` is not finite.
    """

    prompt: Prompt
    answer: str
    rollouts: tuple[Rollout, ...]
    success_reward: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str | list):
            raise TypeError(f"prompt: expected a string or a list, got {type(self.prompt).__name__}")
        if not self.prompt:
            raise ValueError(f"prompt: expected a question, got {self.prompt!r}")
        if not isinstance(self.answer, str):
            raise TypeError(f"answer: expected a string, got {type(self.answer).__name__}")
        if not isinstance(self.rollouts, tuple):
            raise TypeError(f"rollouts: expected a tuple of Rollout, got {type(self.rollouts).__name__}")
        if not self.rollouts:
            raise ValueError("rollouts: expected at least one rollout, got none")
        wrong = next((r for r in self.rollouts if not isinstance(r, Rollout)), None)
        if wrong is not None:
            raise TypeError(f"rollouts: expected a tuple of Rollout, got an element {wrong!r}")
        _check_finite("success_reward", self.success_reward)

    @property
    def successes(self) -> list[int]:
        """Indices of the rollouts that succeed, ascending."""
        return [i for i, r in enumerate(self.rollouts) if r.scored and self.accepts(r.reward)]

    @property
    def failures(self) -> list[int]:
        """Indices of the rollouts that fail, ascending."""
        return [i for i, r in enumerate(self.rollouts) if r.scored and not self.accepts(r.reward)]

    def accepts(self, reward: float) -> bool:
        """Whether a rollout with this reward succeeds."""
        return reward >= least_success(self.success_reward)

    @property
    def is_mixed(self) -> bool:
        """Whether the group holds at least one success and at least one failure."""
        return bool(self.successes and self.failures)

    @property
    def success_rate(self) -> float:
        """Of the rollouts that have a verdict; 0 where none has."""
        return len(self.successes) / max(1, len(self.successes) + len(self.failures))

    def success_peers(self, i: int) -> list[int]:
        """``S_i = {j != i : R_j = 1}``, ascending. Raises ValueError unless ``0 <= i < G``."""
        if not 0 <= i < len(self.rollouts):
            raise ValueError(f"i: expected a rollout index in [0, {len(self.rollouts)}), got {i}")
        return [j for j in self.successes if j != i]


@dataclass(frozen=True)
class Member:
    """A rollout as ``group.rollouts[index]``; ``number`` counts the groups of the whole step, over all ranks."""

    group: Group
    index: int
    number: int

    @property
    def rollout(self) -> Rollout:
        return self.group.rollouts[self.index]

    @property
    def success(self) -> bool:
        return self.index in self.group.successes

    @property
    def has_peer(self) -> bool:
        """Whether another rollout of its group succeeds: what coverage counts."""
        return bool(self.group.success_peers(self.index))


def members(
    rows: Sequence[Mapping[str, Any]],
    rollouts: Sequence[Rollout],
    *,
    first: int,
    group_size: int,
    success_reward: float,
) -> list[Member]:
    """The rollouts of this process in their groups.

    Args:
        rows: Data-set rows of this process's rollouts, with "prompt" and "answer" (None is no answer).
        rollouts: Those of all processes: a group may be split between ranks, and all of them see it whole.
        first: The position of this process's first rollout among them.
    """
    found = []
    for i, row in enumerate(rows):
        number, index = divmod(first + i, group_size)
        whole = tuple(rollouts[number * group_size : (number + 1) * group_size])
        group = Group(row["prompt"], shown_answer(row["answer"]), whole, success_reward)
        found.append(Member(group, index, number))
    return found


def last_user_text(prompt: Prompt) -> str:
    """The question's own text: the prompt, or what its last message says."""
    return prompt if isinstance(prompt, str) else prompt[-1].get("content", "") if prompt else ""


def shown_answer(answer: Any) -> str:
    """What a teacher reads of a data set's ``answer``: the text, the first of several accepted ones, "" for None."""
    first = next(iter(answer), None) if isinstance(answer, list) else answer
    return "" if first is None else str(first)


def _check_finite(name: str, value: object) -> None:
    if not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")
