"""The questions of a step, and the steps that a generation serves."""

from types import SimpleNamespace

import pytest

from hsd.train.generations import questions_of, serves_a_multiple


def generations(accumulation, generation, iterations=1):
    """16 questions of 8 rollouts a generation."""
    of_it = {"generation_batch_size": 128, "num_generations": 8, "num_iterations": iterations}
    return SimpleNamespace(gradient_accumulation_steps=accumulation, steps_per_generation=generation, **of_it)


@pytest.mark.parametrize(
    ("args", "questions"),
    [
        (generations(2, 2), 16),
        (generations(2, 4), 8),  # a generation serves two steps
        (generations(2, 2, 2), 8),
        (generations(4, 2), 32),  # a step takes two
        (generations(2, 3), 32 / 3),
        (SimpleNamespace(), None),
    ],
)
def test_the_new_questions_of_a_step(args, questions):
    assert questions_of(args) == pytest.approx(questions)


@pytest.mark.parametrize(
    ("args", "steps", "served"),
    [
        (generations(2, 2), range(12), [0, 5, 10]),
        (generations(2, 4), range(0, 24, 2), [0, 4, 10, 14, 20]),  # the steps 5 and 15 are the second ones of 4 and 14
        (generations(4, 2), range(6), [0, 5]),
    ],
)
def test_every_multiple_is_served_by_a_generation(args, steps, served):
    assert [step for step in steps if serves_a_multiple(step, 5, args)] == served
