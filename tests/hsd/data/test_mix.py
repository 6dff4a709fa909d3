"""Mixing by ratio, and difficulty bins."""

import pytest

from hsd.data import difficulty, mix
from hsd.data.mix import with_difficulty


def stream(name: str, count: int) -> list[dict]:
    return [{"prompt": f"{name}{i}", "answer": str(i), "id": str(i)} for i in range(count)]


@pytest.mark.parametrize("ratio", [(4, 1), (1, 1), (1, 7), (3, 2)])
def test_every_prefix_keeps_the_ratio(ratio):
    rows = mix([stream("m", 100), stream("c", 60)], ratio, seed=0, length=500)
    assert len(rows) == 500
    for n in range(1, 501):
        math = sum(r["prompt"].startswith("m") for r in rows[:n])
        assert abs(math - n * ratio[0] / sum(ratio)) < 1


def test_no_row_comes_twice_by_default_and_each_once_an_epoch_else():
    rows = mix([stream("m", 10), stream("c", 3)], (4, 1), seed=1)
    prompts = [r["prompt"] for r in rows]
    assert len(set(prompts)) == len(prompts)
    assert {p for p in prompts if p[0] == "m"} == {f"m{i}" for i in range(10)}
    prompts = [r["prompt"] for r in mix([stream("m", 10), stream("c", 3)], (4, 1), seed=1, length=50)]
    math = [p for p in prompts if p[0] == "m"]
    assert len(math) == 40
    epochs = [math[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(e) == sorted(epochs[0]) for e in epochs) and epochs[0] != epochs[1]


def test_the_order_is_the_seeds_and_a_longer_mix_begins_as_a_shorter():
    streams = [stream("m", 40), stream("c", 9)]
    first = mix(streams, (4, 1), seed=5, length=60)
    assert mix(streams, (4, 1), seed=5, length=60) == first
    assert mix(streams, (4, 1), seed=5, length=90)[:60] == first  # what a resumed run relies on
    assert mix(streams, (4, 1), seed=6, length=60) != first
    assert mix(streams, (4, 1), seed=5, length=0) == []


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"row": -1}, ValueError),
        ({"row": 2}, ValueError),
        ({"row": True}, ValueError),
        ({"row": "1"}, ValueError),
        ({"reward": "1"}, TypeError),
        ({"reward": True}, TypeError),
    ],
)
def test_a_sample_of_something_else_is_refused(change, error):
    rows, sample = stream("m", 2), {"row": 1, "id": "1", "answer": "1", "reward": 1.0}
    assert with_difficulty(rows, [sample])[1]["pass_rate"] == 1.0
    with pytest.raises(error, match=next(iter(change)) + r"\b"):
        with_difficulty(rows, [sample | change])
    for column in sample:
        with pytest.raises(ValueError, match=f"samples: expected a column '{column}'"):
            with_difficulty(rows, [{k: v for k, v in sample.items() if k != column}])


def test_mix_errors():
    for streams, ratio in (([stream("m", 2)], (1, 1)), ([stream("m", 2), stream("c", 2)], (1, 0))):
        with pytest.raises(ValueError, match="ratio"):
            mix(streams, ratio, seed=0)
    with pytest.raises(ValueError, match="streams"):
        mix([stream("m", 2), []], (1, 1), seed=0)
    with pytest.raises(ValueError, match="length"):
        mix([stream("m", 2)], (1,), seed=0, length=-1)


@pytest.mark.parametrize(
    ("rate", "expected"),
    [(0, "hard"), (0.19, "hard"), (0.2, "medium"), (0.5, "medium"), (0.51, "easy"), (1, "easy")],
)
def test_difficulty(rate, expected):
    assert difficulty(rate) == expected


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_difficulty_wants_a_share(rate):
    with pytest.raises(ValueError, match="pass_rate"):
        difficulty(rate)


def test_with_difficulty():
    rows = stream("m", 3)
    samples = [
        {"row": i, "id": str(i), "answer": str(i), "reward": reward}
        for i, reward in [(0, 1.0), (0, 0.0), (0, 1.0), (1, None), (1, 0.0), (2, None)]
    ]
    binned = with_difficulty(rows, samples)
    assert (binned[0]["pass_rate"], binned[0]["difficulty"]) == (pytest.approx(2 / 3), "easy")
    assert (binned[1]["pass_rate"], binned[1]["difficulty"]) == (0.0, "hard")
    assert binned[2] == rows[2] and "pass_rate" not in rows[0]
    with pytest.raises(ValueError, match="expected those of these 3 rows"):
        with_difficulty(rows, [samples[0] | {"answer": "5"}])
    with pytest.raises(ValueError, match="got row 3"):
        with_difficulty(rows, [samples[0] | {"row": 3}])
