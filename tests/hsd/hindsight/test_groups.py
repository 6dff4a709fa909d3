"""Rollouts and groups: who succeeded, who may be shown to whom."""

import dataclasses
import math
from typing import Any

import pytest

from hsd.hindsight.groups import Group, Rollout, members


def make_group(*rewards: float, success_reward: float = 1.0) -> Group:
    rollouts = tuple(Rollout((10 + i, 2), reward) for i, reward in enumerate(rewards))
    return Group("1 + 1 =", "2", rollouts, success_reward)


def test_successes_failures_and_peers():
    group = make_group(1.0, 0.0, 1.0, 0.0, 1.0)
    assert group.successes == [0, 2, 4]
    assert group.failures == [1, 3]
    assert group.is_mixed
    assert group.success_peers(1) == [0, 2, 4]
    assert group.success_peers(2) == [0, 4]


def test_a_lone_success_has_no_peer():
    group = make_group(0.0, 1.0, 0.0)
    assert group.success_peers(1) == []
    assert group.success_peers(0) == [1]


@pytest.mark.parametrize(
    ("rewards", "mixed"),
    [((1, 1), False), ((0, 0), False), ((0, 1), True), ((1,), False)],
)
def test_is_mixed(rewards: tuple[float, ...], mixed: bool):
    assert make_group(*rewards).is_mixed is mixed


def test_success_is_reaching_the_success_reward():
    group = make_group(0.49, 0.5, 0.9, success_reward=0.5)
    assert group.successes == [1, 2]
    assert group.failures == [0]


def test_chat_prompt_is_accepted_and_fields_are_frozen():
    group = Group([{"role": "user", "content": "q"}], "a", (Rollout((1,), 1.0),))
    with pytest.raises(dataclasses.FrozenInstanceError):
        group.answer = "b"  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("i", [-1, 3])
def test_success_peers_refuses_an_index_outside_the_group(i: int):
    with pytest.raises(ValueError, match=rf"^i: expected .*\[0, 3\), got {i}"):
        make_group(1, 0, 0).success_peers(i)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"token_ids": [1, 2]}, TypeError, "token_ids: .* got list"),
        ({"token_ids": (1, "b")}, TypeError, "token_ids: .* got an element 'b'"),
        ({"token_ids": ()}, ValueError, "token_ids: expected at least one"),
        ({"reward": "1"}, TypeError, "reward: expected a number, got str"),
        ({"reward": math.nan}, ValueError, "reward: expected a finite number, got nan"),
        ({"mean_logp": -math.inf}, ValueError, "mean_logp: expected a finite number, got -inf"),
    ],
)
def test_rollout_errors(fields: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=rf"^{message}"):
        Rollout(**({"token_ids": (1,), "reward": 0.0} | fields))


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"prompt": 3}, TypeError, "prompt: .* got int"),
        ({"prompt": []}, ValueError, r"prompt: expected a question, got \[\]"),
        ({"answer": 2}, TypeError, "answer: expected a string, got int"),
        ({"rollouts": []}, TypeError, "rollouts: .* got list"),
        ({"rollouts": ()}, ValueError, "rollouts: expected at least one"),
        ({"rollouts": ((1, 2),)}, TypeError, r"rollouts: .* got an element \(1, 2\)"),
        ({"success_reward": math.inf}, ValueError, "success_reward: expected a finite number, got inf"),
    ],
)
def test_group_errors(fields: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=rf"^{message}"):
        Group(**({"prompt": "q", "answer": "a", "rollouts": (Rollout((1,), 0.0),)} | fields))


@pytest.mark.parametrize(
    ("answer", "shown"),
    [("7", "7"), (None, ""), (7, "7"), (["7", "seven"], "7"), ([""], ""), ([], ""), ("[7, 8]", "[7, 8]")],
)
def test_a_teacher_reads_the_first_of_several_accepted_answers(answer, shown):
    rollouts = [Rollout((1,), 0.0), Rollout((2,), 1.0)]
    rows = [{"prompt": "q", "answer": answer}] * 2
    found = members(rows, rollouts, first=0, group_size=2, success_reward=1.0)
    assert [member.group.answer for member in found] == [shown, shown]
