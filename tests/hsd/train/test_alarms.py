"""Each alarm on a made-up collapse, and silence on runs that are fine."""

import math
import random

import pytest

from hsd.train.alarms import WINDOW, alarms, repeated_tail

SUCCESS, ENTROPY, CLIPPED = "hsd/success_rate", "hsd/student_entropy", "completions/clipped_ratio"
LENGTH, TAILS, HELPED = "completions/mean_length", "hsd/repeated_tail", "hsd/failing_with_peer"


def line(start: float, end: float, n: int) -> list[float]:
    return [start + (end - start) * i / (n - 1) for i in range(n)]


def history(**columns: list) -> list[dict]:
    keys = {"success": SUCCESS, "entropy": ENTROPY, "clipped": CLIPPED}
    keys |= {"length": LENGTH, "tails": TAILS, "helped": HELPED}
    named = {keys[name]: values for name, values in columns.items()}
    return [dict(zip(named, row, strict=True)) for row in zip(*named.values(), strict=True)]


HEALTHY = history(success=line(0.26, 0.72, 40), entropy=line(0.3, 0.1, 40), clipped=line(0.02, 0.04, 40))


def test_a_healthy_run_raises_none_at_any_step():
    wobble = [{**row, SUCCESS: row[SUCCESS] + 0.08 * (-1) ** i} for i, row in enumerate(HEALTHY)]
    for run in (HEALTHY, wobble):
        for step in range(len(run) + 1):
            assert alarms(run[:step]) == {}


def test_success_that_falls_back():
    run = history(success=line(0.26, 0.5, 20) + line(0.5, 0.02, 20))
    found = alarms(run)
    assert found.keys() == {"success"}
    assert "0.4" in found["success"] and "0.0" in found["success"]  # best and last
    assert alarms(run[:28]) == {}  # still above half of the best


def test_rollouts_without_a_verdict_from_the_first_step_on():
    def run(*shares):
        return [{"hsd/unscored": share} for share in shares]

    assert alarms(run(1.0)).keys() == {"no verdict"} and "100% of the rollouts" in alarms(run(1.0))["no verdict"]
    assert alarms(run(*[0.0] * 20, *[0.51] * WINDOW)).keys() == {"no verdict"}
    assert alarms(run(0.5)) == alarms(run(*[0.0] * 4, 1.0)) == alarms([{}]) == {}


def test_a_hopeless_task_is_no_fall():
    assert alarms(history(success=[0.04] * 10 + [0.0] * 10)) == {}
    assert alarms(history(success=[0.0] * 20)) == {}


@pytest.mark.parametrize(("end", "verb"), [(0.005, "collapsed"), (1.5, "grew")])
def test_entropy_that_leaves_its_range(end, verb):
    found = alarms(history(entropy=[0.3] * WINDOW + line(0.3, end, 30) + [end] * WINDOW))
    assert found.keys() == {"entropy"}
    assert verb in found["entropy"] and "0.3" in found["entropy"] and str(end) in found["entropy"]


@pytest.mark.parametrize("end", [0.06, 0.6])
def test_entropy_may_fall_to_a_fifth_and_double(end):
    assert alarms(history(entropy=line(0.3, end, 30))) == {}


def test_rollouts_that_run_into_the_limit():
    found = alarms(history(clipped=line(0.02, 0.9, 20)))
    assert found.keys() == {"length"}
    assert "3%" in found["length"] or "11%" in found["length"]
    assert alarms(history(clipped=line(0.02, 0.4, 20))) == {}
    assert alarms(history(clipped=[0.6] * 10 + [0.9] * 10)) == {}  # they always did


def test_all_at_once():
    run = history(success=[0.4] * 5 + [0.0] * 5, entropy=[0.3] * 5 + [0.001] * 5, clipped=[0.0] * 5 + [1.0] * 5)
    assert alarms(run).keys() == {"success", "entropy", "length"}
    assert alarms(run[: 2 * WINDOW - 1]) == {}  # too short to compare two windows


def test_one_bad_step_is_no_collapse():
    run = [dict(row) for row in HEALTHY]
    run[-1] |= {SUCCESS: 0.3, ENTROPY: 0.0, CLIPPED: 0.9}
    assert alarms(run) == {}


def steady(questions: int, seed: int, size: int = 8, success: float = 0.2, steps: int = 60) -> list[dict]:
    """Success of groups whose questions differ and whose policy stays as it is."""
    rng, rows = random.Random(seed), []
    for _ in range(steps):
        right = [
            sum(rng.random() < p for _ in range(size)) for p in (rng.betavariate(0.8, 3.2) for _ in range(questions))
        ]
        mixed = sum(0 < n < size for n in right) / questions
        rows.append({SUCCESS: sum(right) / (questions * size), "hsd/mixed_groups": mixed})
    return rows


def raised(run: list[dict], questions: float | None) -> bool:
    return any(alarms(run[:step], questions) for step in range(len(run) + 1))


def test_the_number_of_questions_tells_a_fall_from_chance():
    """4 questions a step: success of a policy that stays as it is falls by half in most runs, by chance."""
    runs = [steady(4, seed) for seed in range(20)]
    assert sum(raised(run, None) for run in runs) >= 15
    assert sum(raised(run, 4) for run in runs) <= 1
    fall = history(success=[0.9] * 10 + [0.1] * 10)
    assert alarms(fall, 4).keys() == {"success"}
    assert "0.900, the mean of the best 5 steps, which ended 10 steps ago, to 0.100" in alarms(fall, 4)["success"]
    small = history(success=[0.1] * 10 + [0.02] * 10)
    assert alarms(small, 4) == {} and alarms(small, 64).keys() == {"success"}
    fewer = history(helped=[0.4] * 10 + [0.1] * 10, success=[0.2] * 20)
    assert alarms(fewer, 4) == {} and alarms(fewer, 64).keys() == {"coverage"}


def test_groups_that_are_all_alike_teach_nothing():
    def run(success, mixed):
        return [{SUCCESS: success, "hsd/mixed_groups": m} for m in mixed]

    dead = alarms(run(0.0, [0.25] + [0.0] * 12), 4)
    assert dead.keys() == {"alike"} and "failure since 12 steps" in dead["alike"]
    assert "since 10 steps" in alarms(run(0.0, [0.0] * 10), 4)["alike"]  # from the start
    assert alarms(run(0.0, [0.25] + [0.0] * 9), 4) == {}
    assert alarms(run(0.0, [0.0] * 12 + [0.25]), 4) == {}
    assert alarms(run(1.0, [0.25] + [0.0] * 12), 4) == {}  # all is learned
    assert alarms([{SUCCESS: 0.0}] * 12, 4) == {}  # not measured


@pytest.mark.parametrize("missing", [None, math.nan], ids=["None", "NaN"])
def test_steps_without_a_value_are_passed_over(missing):
    assert alarms([{}] * 20) == {}
    assert alarms([{SUCCESS: missing, ENTROPY: missing, CLIPPED: missing}] * 20) == {}
    assert alarms([{**row, SUCCESS: missing} if i % 3 else row for i, row in enumerate(HEALTHY)]) == {}
    fallen = history(success=[missing] * 5 + [0.5] * 10 + [missing, 0.0, 0.0, missing, 0.0])
    assert alarms(fallen).keys() == {"success"}


def test_a_model_that_has_learned_may_be_sure():
    """Seed 0 of the small world ends at success 0.996 with a tenth of its entropy: no collapse."""
    learned = [{"hsd/success_rate": 0.4 + 0.6 * t / 49, "hsd/student_entropy": 0.06 * 0.94**t} for t in range(50)]
    assert alarms(learned) == {}
    lost = [row | {"hsd/success_rate": 0.4 - 0.15 * t / 49} for t, row in enumerate(learned)]
    assert set(alarms(lost)) == {"entropy"}


def test_rollouts_that_grow_while_success_does_not():
    found = alarms(history(length=line(100, 300, 20), success=[0.3] * 20))
    assert found.keys() == {"length"} and "tokens" in found["length"]
    assert alarms(history(length=line(100, 300, 20), success=line(0.3, 0.5, 20))) == {}  # longer and better
    assert alarms(history(length=line(100, 180, 20), success=[0.3] * 20)) == {}
    both = alarms(history(length=line(100, 300, 20), success=[0.3] * 20, clipped=line(0.0, 1.0, 20)))
    assert "limit" in both["length"]


def test_rollouts_that_end_in_repetition():
    found = alarms(history(tails=line(0.0, 0.4, 20)))
    assert found.keys() == {"repetition"} and "36%" in found["repetition"]
    assert alarms(history(tails=line(0.0, 0.09, 20))) == {}
    assert alarms(history(tails=[0.3] * 10 + [0.5] * 10)) == {}  # they always did


def test_coverage_that_falls_without_success():
    found = alarms(history(helped=line(0.9, 0.1, 20), success=[0.2] * 20))
    assert found.keys() == {"coverage"} and "90%" not in found["coverage"] and "18%" in found["coverage"]
    assert alarms(history(helped=line(0.9, 0.1, 20), success=line(0.2, 0.6, 20))) == {}  # only hard questions fail
    assert alarms(history(helped=line(0.9, 0.6, 20), success=[0.2] * 20)) == {}


TEXT = [(7 * i * i + i) % 101 for i in range(200)]


@pytest.mark.parametrize("period", [1, 2, 3, 7, 12, 32])
def test_a_tail_of_four_copies_is_repeated(period):
    cycle = [1000 + i for i in range(period)]
    copies = max(4, -(-20 // period))
    assert repeated_tail(TEXT + cycle * copies)
    assert repeated_tail(TEXT + cycle * copies + [5000])  # an end token
    assert repeated_tail(TEXT + cycle * 40 + cycle[: period // 2])  # cut in the middle
    assert not repeated_tail(TEXT + cycle * copies + [5000, 5001])
    assert not repeated_tail(TEXT + cycle * copies + TEXT)
    if period > 5:
        assert not repeated_tail(TEXT + cycle * 3)


def test_what_is_no_repeated_tail():
    assert not repeated_tail([])
    assert not repeated_tail([1] * 19)
    assert repeated_tail([1] * 20)
    assert not repeated_tail(TEXT)
    assert not repeated_tail([*range(33)] * 4)  # longer than a short cycle
    # A table's rule and a row of zeros are short.
    assert not repeated_tail(TEXT + [3, 4] * 8)
