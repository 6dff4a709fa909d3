"""reasoning-gym's generators as questions, its scorers as a reward."""

import inspect
import re
import sys
import tomllib
from pathlib import Path

import pytest

from hsd.data import load
from hsd.tasks.files import complete
from hsd.tasks.settings import Data, Model, Settings
from hsd.train.config import HSDConfig
from hsd.verify import reasoning_gym_reward, reasoning_gym_success
from hsd.verify.generators import EVALUATES_REPLIES, final_text, generator

GCD = "reasoning_gym:gcd,max_value=20"


def test_a_name_gives_the_same_questions_every_time():
    rows = load(GCD, limit=5)
    assert [row["id"] for row in rows] == list("01234") and rows == load(GCD, limit=5)
    assert rows != load(f"{GCD},seed=1", limit=5)
    assert all(row["prompt"] == row["question"] and row["generator"] == GCD for row in rows)
    assert len(load(f"{GCD},size=7")) == 7
    styles = load('reasoning_gym:fraction_simplification,styles=["plain","latex_inline"]', limit=9)
    assert {"$" in row["question"] for row in styles} == {False, True}


@pytest.mark.parametrize(
    "name", ["gcd", "number_sorting", "word_sorting", "leg_counting", "spell_backward", "gsm_symbolic"]
)
def test_the_answer_scores_1_and_another_less(name):
    rows = load(f"reasoning_gym:{name}", limit=4)
    right = [f"Let us see.\nAnswer: {row['answer']}" for row in rows]
    columns = {"generator": [row["generator"] for row in rows], "id": [row["id"] for row in rows]}
    assert reasoning_gym_reward(right, **columns) == [1.0] * 4
    assert max(reasoning_gym_reward(["no idea"] * 4, **columns)) < 1
    assert reasoning_gym_success([*right[:3], "no idea"], **columns) == [1.0, 1.0, 1.0, 0.0]
    with pytest.raises(ValueError, match=r"^id: expected 4 entries, got 3"):
        reasoning_gym_reward(right, generator=columns["generator"], id=columns["id"][:3])


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        ("<think>\nanswer: 3</think>\nThe answer is **12**.", "12"),
        ("It is <answer> a b \n c </answer>, I think", "a b \n c"),
        ("Answer: ['1', '2']", "['1', '2']"),
        ("12", "12"),
        ("so\n\nolleh.", "olleh"),
        ("<think> answer: 12", None),
        ("It is <answer> 12", None),
        (" \n", None),
    ],
)
def test_what_is_scored(reply, text):
    assert final_text(reply) == text


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("reasoning_gym:gdc", "data: expected a generator among ab, acre, .*, the nearest is gcd, got 'gdc'"),
        ("reasoning_gym:xyzzy", "zebra_puzzles, got 'xyzzy'"),
        ("reasoning_gym:gcd,maximum=3", "data: expected gcd,key=value with keys .*max_value.*, got 'maximum=3'"),
        ("reasoning_gym:gcd,maxvalue=3", ", the nearest is max_value, got 'maxvalue=3'"),
        ("reasoning_gym:gcd,20", "data: expected gcd,key=value with keys .*, got '20'"),
        ("reasoning_gym:gcd,max_value=0", "data: expected values that gcd accepts, got .*'max_value': 0"),
        ("reasoning_gym:gcd,max_value=high", "data: expected values that gcd accepts, got .*'high'"),
        ("reasoning_gym:countdown", "data: expected a generator whose scorer does not run the reply as Python"),
    ],
)
def test_bad_names(name, said):
    with pytest.raises(ValueError, match=said):
        load(name)


def test_a_missing_package_names_the_extra_that_brings_it(monkeypatch):
    extras = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert extras["gym"] == ["reasoning-gym"]
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(
        ValueError, match=r'^data: expected the package reasoning-gym \(pip install "hsd-kernels\[gym\]"\) for '
    ):
        load("reasoning_gym:gcd,max_value=77")


def test_every_scorer_that_runs_replies_is_refused():
    from reasoning_gym.factory import DATASETS

    runs = set()
    for name, (kind, _) in DATASETS.items():
        code = inspect.getsource(kind.score_answer)
        if re.search(r"\b(eval|exec|sympify|(sp|sympy)\.parse_expr)\(|= \w*\(?parse_expr\(answer", code):
            runs.add(name)
    assert runs - EVALUATES_REPLIES == {"number_sorting"}  # which evaluates its own answer
    assert EVALUATES_REPLIES <= DATASETS.keys()
    generator("reasoning_gym:number_sorting")


def test_a_runs_reward_is_the_generators_scorer():
    settings = Settings(model=Model("m"), data=Data(GCD, limit=8, held_out=2, chat=False))
    task = complete(settings, None, HSDConfig(output_dir="x", use_cpu=True, bf16=False))
    assert (len(task.questions), len(task.held_out)) == (6, 2)
    (asked,) = task.questions[:1]
    assert task.reward(completions=[asked["answer"]], **{k: [v] for k, v in asked.items()}) == [1.0]
