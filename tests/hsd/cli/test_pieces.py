"""Questions and reward functions from the words of a configuration."""

import json
import sys

import pytest

from hsd.cli.pieces import load_model, load_rewards, load_rows, peft_config
from hsd.cli.settings import Data, Lora, Model
from hsd.demo import small_world


@pytest.fixture
def jsonl(tmp_path):
    def write(*rows):
        path = tmp_path / "data.jsonl"
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
        return str(path)

    return write


def test_rows_of_a_file_keep_their_columns(jsonl):
    path = jsonl({"question": "1+1?", "answer": "so\n#### 2"}, "", {"prompt": "2+2?", "answer": "4", "x": [1]})
    first, second = load_rows(Data(path), seed=0, chat=False)
    assert (first["answer"], first["solution"], first["x"]) == ("2", "so", None)
    assert first["prompt"].startswith("1+1?\n\nPlease reason")
    assert (second["prompt"], second["answer"], second["x"], second["solution"]) == ("2+2?", "4", [1], None)
    assert first.keys() == second.keys()
    assert len(load_rows(Data(path, limit=1), seed=0, chat=False)) == 1


def test_instruction_and_messages(jsonl):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    path = jsonl({"question": "1+1?", "answer": "2"}, {"prompt": messages, "answer": "3"})
    rows = load_rows(Data(path, instruction="Think."), seed=0, chat=True)
    assert [row["prompt"] for row in rows] == [[{"role": "user", "content": "1+1?\n\nThink."}], messages]
    texts = [row["prompt"] for row in load_rows(Data(path, instruction=""), seed=0, chat=False)]
    assert texts == ["1+1?", "u"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (['{"question": "q", "answer": "1"}', "{"], "line 2: expected a JSON object"),
        ([{"question": "q"}], "row 1: ValueError: row: expected fields of a known data set"),
        (["[1]"], "line 1: expected a JSON object"),
        ([], "expected at least one usable row"),
    ],
)
def test_bad_files_are_named_with_their_line(jsonl, rows, said):
    with pytest.raises(ValueError) as error:
        load_rows(Data(jsonl(*rows)), seed=0, chat=False)
    assert said in str(error.value)


def test_a_missing_file_is_named():
    with pytest.raises(ValueError, match=r"data: expected a file or one of gsm8k.*nowhere\.jsonl"):
        load_rows(Data("nowhere.jsonl"), seed=0, chat=False)


def test_names_and_splits_are_hsd_datas():
    with pytest.raises(ValueError, match="expected a split of gsm8k among test, train"):
        load_rows(Data("gsm8k", split="dev"), seed=0, chat=False)


def test_the_small_worlds_questions_follow_the_seed():
    rows = [load_rows(Data("small_world", limit=3), seed=seed, chat=False) for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]
    assert rows[0] == small_world.make_questions(3, seed=0)
    for limit in (0, -2):
        with pytest.raises(ValueError, match=r"data\.limit: expected a positive number"):
            load_rows(Data("small_world", limit=limit), seed=0, chat=False)


def test_reward_functions_by_name_and_by_path(tmp_path, monkeypatch):
    (number,) = load_rewards("number")
    assert number(["so 4"], answer=["4"]) == [1.0]
    assert load_rewards(["hsd.demo.small_world:reward"]) == [small_world.reward]
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
    with pytest.raises(ValueError, match=r"reward: expected at least one function, got \[\]"):
        load_rewards([])


def test_lora_and_dtype():
    config = peft_config(Lora(r=4, alpha=8))
    assert (config.r, config.lora_alpha, config.target_modules) == (4, 8, "all-linear")
    assert peft_config(None) is None
    with pytest.raises(ValueError, match=r"model\.dtype"):
        load_model(Model("x", dtype="fp8"), 0, cache=None)
