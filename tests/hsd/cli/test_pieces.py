"""Questions and reward functions from the words of a configuration."""

import json
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

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
    path = jsonl(
        {"question": "1+1?", "answer": 2, "kind": "math"}, "", {"prompt": "2+2?", "answer": "so\n#### 4", "x": [1]}
    )
    rows = load_rows(Data(path), seed=0, chat=False)
    assert rows == [
        {"answer": "2", "kind": "math", "prompt": "1+1?", "x": None},
        {"answer": "4", "kind": None, "prompt": "2+2?", "x": [1]},
    ]
    assert len(load_rows(Data(path, limit=1), seed=0, chat=False)) == 1


def test_a_question_becomes_a_message_and_messages_stay(jsonl):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    path = jsonl({"question": "1+1?", "answer": "2"}, {"prompt": messages, "answer": "3"})
    rows = load_rows(Data(path, instruction="Think."), seed=0, chat=True)
    assert [row["prompt"] for row in rows] == [[{"role": "user", "content": "1+1?\n\nThink."}], messages]
    assert load_rows(Data(path, instruction="Think."), seed=0, chat=False)[0]["prompt"] == "1+1?\n\nThink."


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (['{"question": "q", "answer": "1"}', "{"], "line 2: expected JSON"),
        ([{"question": "q"}], "line 1: expected 'prompt' or 'question', and 'answer', got ['question']"),
        ([{"answer": "1"}], "line 1: expected 'prompt' or 'question'"),
        (["[1]"], "line 1: expected 'prompt' or 'question', and 'answer', got list"),
        ([], "expected at least one question"),
    ],
)
def test_bad_files_are_named_with_their_line(jsonl, rows, said):
    with pytest.raises(ValueError) as error:
        load_rows(Data(jsonl(*rows)), seed=0, chat=False)
    assert said in str(error.value)


def test_a_missing_file_is_named():
    with pytest.raises(ValueError, match=r"data\.path: expected a JSONL file.*nowhere\.jsonl"):
        load_rows(Data("nowhere.jsonl"), seed=0, chat=False)


def test_names_are_hsd_datas(monkeypatch):
    asked = []
    module = ModuleType("hsd.data")
    row = {"prompt": "q", "answer": "1", "kind": "math"}
    module.load = lambda name, split=None: asked.append((name, split)) or [row]
    module.__spec__ = ModuleSpec("hsd.data", None)
    monkeypatch.setitem(sys.modules, "hsd.data", module)
    assert load_rows(Data("gsm8k", split="train"), seed=0, chat=False)[0]["kind"] == "math"
    assert asked == [("gsm8k", "train")]


def test_the_small_worlds_questions_follow_the_seed():
    rows = [load_rows(Data("small_world", limit=3), seed=seed, chat=False) for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]
    assert rows[0] == small_world.make_questions(3, seed=0)


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
    with pytest.raises(ModuleNotFoundError):
        load_rewards("no_such_module:f")


def test_lora_and_dtype():
    config = peft_config(Lora(r=4, alpha=8))
    assert (config.r, config.lora_alpha, config.target_modules) == (4, 8, "all-linear")
    assert peft_config(None) is None
    with pytest.raises(ValueError, match=r"model\.dtype"):
        load_model(Model("x", dtype="fp8"), 0, cache=None)
