"""What an evaluation of a task counts."""

from dataclasses import replace

import pytest
from tiny_runs import QUESTIONS, TOKENIZER, qwen3

from hsd.evaluate import Sampling
from hsd.tasks import small_world
from hsd.tasks.task import Policy, Task, evaluate


@pytest.mark.parametrize(
    ("given", "least", "share"),
    [
        ([1.0, 0.0, 1.0, 0.0], 1.0, 0.5),
        ([0.5, 0.4, 0.5, 0.4], 0.5, 0.5),  # not the mean reward
        ([3.0, 0.0, 0.0, 0.0], 2.0, 0.25),  # a sum of rewards may be above 1
        ([0.5, None, 0.5, None], 0.5, 0.5),
        ([0.99999994, 0.9999, 0.0, 0.0], 1.0, 0.25),
    ],
)
def test_a_success_reaches_the_tasks_reward(given, least, share):
    task = Task("", str, QUESTIONS[:4], (), [lambda **columns: given], small_world.TEMPLATE, Sampling(4))
    found = evaluate(replace(task, success_reward=least), Policy(qwen3(), TOKENIZER), seed=0)
    assert found.success.mean == pytest.approx(share) and found.success.questions == 4
    assert [reply["reward"] for reply in found.replies if reply["reward"] is not None] == [
        r for r in given if r is not None
    ]
