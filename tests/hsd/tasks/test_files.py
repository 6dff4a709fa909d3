"""Questions and reward functions from the words of a configuration."""

import json
import math
import sys
from dataclasses import replace

import pytest

from hsd.cli.prepare import peft_config, prepare
from hsd.cli.settings import parse
from hsd.tasks import registered, small_world
from hsd.tasks.files import load_rewards, load_rows
from hsd.tasks.settings import Data, Lora


@pytest.fixture
def jsonl(tmp_path):
    def write(*rows):
        path = tmp_path / "data.jsonl"
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
        return str(path)

    return write


def test_rows_of_a_file_keep_their_columns(jsonl):
    path = jsonl({"question": "1+1?", "answer": "so\n#### 2"}, "", {"prompt": "2+2?", "answer": "4", "x": [1]})
    first, second = load_rows(Data(path), chat=False)
    assert (first["answer"], first["solution"], first["x"]) == ("2", "so", None)
    assert first["prompt"].startswith("1+1?\n\nPlease reason")
    assert (second["prompt"], second["answer"], second["x"], second["solution"]) == ("2+2?", "4", [1], None)
    assert first.keys() == second.keys()
    assert len(load_rows(Data(path, limit=1), chat=False)) == 1


def test_instruction_and_messages(jsonl):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    path = jsonl({"question": "1+1?", "answer": "2"}, {"prompt": messages, "answer": "3"})
    rows = load_rows(Data(path, instruction="Think."), chat=True)
    assert [row["prompt"] for row in rows] == [[{"role": "user", "content": "1+1?\n\nThink."}], messages]
    texts = [row["prompt"] for row in load_rows(Data(path, instruction=""), chat=False)]
    assert texts == ["1+1?", "u"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (['{"question": "q", "answer": "1"}', "{"], "line 2: expected a JSON object"),
        ([{"question": "q"}], "row 1: columns: expected 'question' and 'answer', or "),
        (["[1]"], "line 1: expected a JSON object"),
        ([], "expected at least one usable row"),
    ],
)
def test_bad_files_are_named_with_their_line(jsonl, rows, said):
    with pytest.raises(ValueError) as error:
        load_rows(Data(jsonl(*rows)), chat=False)
    assert said in str(error.value)


def test_a_missing_file_is_named():
    with pytest.raises(ValueError, match=r"data: expected a file, got .*nowhere\.jsonl, which is not there"):
        load_rows(Data("nowhere.jsonl"), chat=False)


def test_names_and_splits_are_hsd_datas():
    with pytest.raises(ValueError, match="expected a split of gsm8k among test, train"):
        load_rows(Data("gsm8k", split="dev"), chat=False)


def task_of(**sections):
    return prepare(
        parse({"train": {"use_cpu": True, "bf16": False, **sections.pop("train", {})}, **sections}), "t"
    ).task()


def test_a_registered_tasks_questions_follow_the_seed():
    tasks = [task_of(task="small_world", data={"limit": 3}, train={"seed": seed}) for seed in (0, 0, 1)]
    assert tasks[0].questions == tasks[1].questions != tasks[2].questions
    assert tasks[0].questions == small_world.make_questions(3, seed=0, added=small_world.ONE_DIGIT)
    assert len(tasks[0].held_out) == 512 and tasks[0].title == small_world.task(0).title
    for limit in (0, -2):
        with pytest.raises(ValueError, match=r"data\.limit: expected a positive number"):
            task_of(task="small_world", data={"limit": limit})
    with pytest.raises(
        ValueError,
        match=r"^task: expected one of small_world, smollm2, additions, chain_sum, the nearest is smollm2, got 'smol'",
    ):
        registered("smol", 0)


def test_settings_replace_parts_of_a_registered_task(jsonl):
    messages = [{"role": "user", "content": "1+1?"}]
    path = jsonl({"question": "1+1?", "answer": "so #### 2"}, {"question": "2+2?", "answer": "4"})
    task = task_of(
        task="smollm2",
        model={"path": "some/where"},
        data={"path": path, "chat": True, "held_out": 1},
        reward=["number", "math"],
        train={"max_completion_length": 7, "reward_weights": [1.0, 0.5], "success_reward": 0.5},
    )
    assert task.model() == "some/where" and task.title == "where on data.jsonl"
    assert [(q["prompt"], q["answer"]) for q in task.held_out] == [(messages, "2")]  # bare, as the task's own
    assert [q["answer"] for q in task.questions] == ["4"]
    assert (task.sampling.max_new_tokens, task.sampling.top_p, task.eval_samples) == (7, 0.95, 4)
    assert task.success_reward == 0.5 and list(task.reward_weights) == [1.0, 0.5]
    assert task.evaluated == task.held_out and replace(task, held_out=[]).evaluated == task.questions


def test_the_parts_of_a_task_are_all_needed_without_a_registered_one(jsonl):
    parts = {"model": {"path": "m"}, "data": {"path": jsonl({"question": "q", "answer": "1"})}, "reward": "number"}
    for name in parts:
        with pytest.raises(ValueError, match=rf"^{name}(\.path)?: expected a value, or a task among small_"):
            task_of(**{key: value for key, value in parts.items() if key != name})
    with pytest.raises(ValueError, match=r"^data\.held_out: expected a number of questions >= 0, got -1"):
        task_of(**parts | {"data": {"path": "q.jsonl", "held_out": -1}})
    with pytest.raises(ValueError, match=r"^data: expected no key but limit without data\.path"):
        task_of(task="small_world", data={"held_out": 3})


def test_a_verdict_that_failed_is_left_out_and_no_verdict_is_none():
    functions = [lambda **_: [1.0, None, math.nan], lambda **_: [0.5, 1.0, None]]
    task = replace(small_world.task(0), rewards=functions, reward_weights=[2.0, 1.0])
    assert task.reward() == [2.5, 1.0, None]
    assert replace(task, rewards=functions[1:], reward_weights=None).reward() == [0.5, 1.0, None]


def test_reward_functions_by_name_and_by_path(tmp_path, monkeypatch):
    (number,) = load_rewards("number")
    assert number(["so 4"], answer=["4"]) == [1.0]
    assert load_rewards(["hsd.tasks.small_world:reward"]) == [small_world.reward]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    (tmp_path / "my_reward_of_a_test.py").write_text("def mine(completions, **kwargs): return [0.5]\nnot_one = 3\n")
    assert load_rewards("my_reward_of_a_test:mine")[0]([""]) == [0.5]
    with pytest.raises(ValueError, match="expected a function"):
        load_rewards("my_reward_of_a_test:not_one")
    with pytest.raises(ValueError, match="expected one of"):
        load_rewards("nubmer")
    with pytest.raises(ValueError, match=r"reward: expected a module .*, got 'no_such_module:f' \(No module named"):
        load_rewards("no_such_module:f")
    for name in (":f", ":"):
        with pytest.raises(ValueError, match=f"reward: expected one of .*, got '{name}'"):
            load_rewards(name)
    with pytest.raises(ValueError, match=r"reward: expected at least one function, got \[\]"):
        load_rewards([])


def test_lora():
    config = peft_config(Lora(r=4, alpha=8))
    assert (config.r, config.lora_alpha, config.target_modules) == (4, 8, "all-linear")
