"""Metrics of a batch where something is missing: a verdict, a context, a token, a finite gap."""

import math

import pytest
import torch

from hsd.train.metrics import group_metrics, initial_gap, teacher_success


def flags(text):
    return torch.tensor([c == "1" for c in text])


def test_a_group_is_mixed_where_it_has_a_success_and_a_failure():
    success, unscored = flags("100010001111"), flags("000001110000")
    found = group_metrics(success, flags("0" * 12), unscored, 4)
    assert found["mixed_groups"].item() == pytest.approx(
        1 / 3
    )  # the second has no failure, only rollouts without verdict
    assert found["success_rate"].item() == pytest.approx(6 / 9) and found["unscored"] == 0.25


def test_replies_that_do_not_count_are_in_neither_part_of_the_share():
    rewards = [0.99999994, 0.9999, 1.0, 1.0]  # the first is 1 but for fp32's rounding
    assert teacher_success(rewards, flags("1110"), 1.0).item() == pytest.approx(2 / 3)
    assert math.isnan(teacher_success(rewards, flags("0000"), 1.0))


@pytest.mark.parametrize(
    ("gaps", "size"),
    [
        ([], None),
        ([math.nan, math.nan], None),
        ([1.0, math.nan, 2.0], "1.5 nats a token"),
        ([3e38, 3e38], "3e+38 nats a token"),
        ([1.0, math.inf, math.nan], "infinitely far"),
    ],
)
def test_the_first_gap_is_a_finite_number_or_words_or_left_out(gaps, size):
    told = None if size is None else f"before step 1 student and teacher are {size} apart (forward_kl)"
    assert initial_gap(gaps, "forward_kl") == told
