import pytest

from hsd.tasks import additions, registered
from hsd.train.config import HSDConfig


def summands(question):
    a, _, b = question["prompt"][-1]["content"].removeprefix("What is ").removesuffix("?").partition(" + ")
    return int(a), int(b)


@pytest.mark.parametrize("seed", range(4))
def test_split_is_a_partition_of_all_sums_that_keeps_twins_together(seed):
    train, test = additions.split(seed)
    assert len(test) - additions.HELD_OUT in (0, 1)
    assert sorted(map(summands, train + test)) == [(a, b) for a in range(2, 21) for b in range(2, 10)]
    assert not {frozenset(summands(q)) for q in train} & {frozenset(summands(q)) for q in test}
    assert all(int(q["answer"]) == sum(summands(q)) for q in train + test)


def test_split_depends_on_the_seed_alone():
    assert additions.split(0) == additions.split(0) != additions.split(1)


def test_task_is_registered_and_its_settings_are_those_of_a_configuration(tmp_path):
    task = registered("additions", 0)
    config = HSDConfig(str(tmp_path), **task.config)
    assert (config.temperature, config.kl_temperature, config.max_completion_length) == (0.6, 0.6, 12)
    replies = [[{"role": "assistant", "content": text}] for text in ("5 + 3 = 8.", "The answer is 9", "Hello")]
    assert task.reward(completions=replies, answer=["8"] * 3, completion_ids=[[0]] * 3) == [1.0, 0.0, 0.0]
