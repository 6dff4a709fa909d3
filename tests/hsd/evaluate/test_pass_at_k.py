"""pass@k, and samples that the verifier failed on."""

from itertools import combinations

import pytest

from hsd.evaluate.interval import interval
from hsd.evaluate.pass_at_k import pass_at_k, summarize


@pytest.mark.parametrize("samples", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_k_subsets_with_a_success(samples):
    for correct in range(samples + 1):
        outcomes = [1] * correct + [0] * (samples - correct)
        for k in range(1, samples + 1):
            subsets = list(combinations(outcomes, k))
            assert pass_at_k(samples, correct, k) == pytest.approx(sum(map(max, subsets)) / len(subsets))


@pytest.mark.parametrize("case", [(4, 5, 1), (4, -1, 1), (4, 1, 0), (4, 1, 5)])
def test_pass_at_k_errors(case):
    with pytest.raises(ValueError, match="expected 0 <= correct"):
        pass_at_k(*case)


def test_the_interval_is_over_questions():
    once = summarize([[1.0], [0.0], [1.0], [0.0]] * 10)
    copies = summarize([[1.0] * 8, [0.0] * 8, [1.0] * 8, [0.0] * 8] * 10)
    assert copies["interval"] == pytest.approx(once["interval"]) and copies["pass@1"] == once["pass@1"] == 0.5
    assert copies["pass@8"]["value"] == 0.5  # eight copies of an answer find nothing new


def test_summary_of_several_samples():
    summary = summarize([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert summary["pass@1"] == pytest.approx(1 / 6)
    assert summary["pass@2"]["value"] == pytest.approx((2 / 3) / 2)
    assert summary["pass@3"]["value"] == pytest.approx(0.5)
    assert summary["verifier_failures"] == 0 and "pass@1_bounds" not in summary
    assert {k for k in summarize([[1.0] * 16]) if k.startswith("pass@")} == {f"pass@{k}" for k in (1, 2, 4, 8, 16)}


def test_a_failed_verifier_makes_no_success():
    summary = summarize([[1.0, None], [0.0, 0.0], [None, None], [1.0, 1.0]])
    wrong, right = [0.5, 0.0, 0.0, 1.0], [1.0, 0.0, 1.0, 1.0]
    assert summary["verifier_failures"] == 3
    assert summary["pass@1"] == pytest.approx(sum(wrong) / 4)
    assert summary["pass@1_bounds"] == pytest.approx([sum(wrong) / 4, sum(right) / 4])
    assert summary["interval"] == (interval(wrong, 2)[0], interval(right, 2)[1])
    assert summary["pass@2"]["value"] == pytest.approx((1 + 0 + 0 + 1) / 4)
    nothing = summarize([[None]])
    assert nothing["pass@1"] is None and nothing["interval"] is None and nothing["verifier_failures"] == 1


def test_a_gold_that_only_right_answers_are_judged_by_does_not_read_as_all_right():
    summary = summarize([[1.0]] + [[None]] * 9)
    assert summary["pass@1"] == pytest.approx(0.1) and summary["pass@1_bounds"] == pytest.approx([0.1, 1.0])
    assert summary["interval"][0] < 0.1 and summary["interval"][1] == 1.0


@pytest.mark.parametrize("reward", [0.5, 2.0, -1.0, float("nan")])
def test_graded_rewards_are_refused(reward):
    with pytest.raises(ValueError, match="expected 0, 1 or None"):
        summarize([[reward]])
