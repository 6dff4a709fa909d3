import pytest

from hsd.tasks import times_table
from hsd.verify import number_reward


def factors(question):
    a, _, b = question["prompt"][0]["content"].removeprefix("What is ").removesuffix("?").partition(" * ")
    return int(a), int(b)


def test_questions_are_the_whole_table():
    questions = times_table.make_questions()
    assert questions[0] == {"prompt": [{"role": "user", "content": "What is 2 * 2?"}], "answer": "4"}
    assert sorted(map(factors, questions)) == [(a, b) for a in range(2, 13) for b in range(2, 10)]
    assert all(int(q["answer"]) == factors(q)[0] * factors(q)[1] for q in questions)


@pytest.mark.parametrize("seed", range(4))
def test_split_is_a_partition_that_keeps_twins_together(seed):
    train, test = times_table.split(seed)
    assert len(test) - times_table.HELD_OUT in (0, 1)
    assert sorted(map(factors, train + test)) == sorted(map(factors, times_table.make_questions()))
    assert not {frozenset(factors(q)) for q in train} & {frozenset(factors(q)) for q in test}


def test_split_depends_on_the_seed_alone():
    assert times_table.split(0) == times_table.split(0) != times_table.split(1)


def test_reward_takes_chat_completions():
    completions = [[{"role": "assistant", "content": text}] for text in ("3 * 4 is 12.", "3 * 4 = 34")]
    assert number_reward(completions, ["12", "12"]) == [1.0, 0.0]
