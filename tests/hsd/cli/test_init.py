"""`hsd init`: a file that `hsd train --check` accepts, its comments, its questions."""

import io
import json
from pathlib import Path

import pytest
import yaml
from tiny_runs import SMALLER, TOKENIZER, qwen3

from hsd.cli.__main__ import main
from hsd.cli.init import OTHERS, WRITTEN, declared, entry
from hsd.tasks.settings import Lora, key
from hsd.train.config import HSDConfig, options

GIVEN = ["--model", "model", "--data", "questions.jsonl", "--reward", "number"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    qwen3(0, **SMALLER).save_pretrained("model")
    TOKENIZER.save_pretrained("model")
    rows = [{"question": f"{n}+1=", "answer": str(n + 1)} for n in range(8)]
    Path("questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("sys.stdin", io.StringIO())


def test_the_file_passes_the_check_and_holds_what_was_given(capsys):
    assert main(["init", "mine.yaml", *GIVEN, "--method", "grpo", "--weight_decay", "0.1", "--lora", "{r: 4}"]) == 0
    assert capsys.readouterr().out.endswith("8 questions, 0 held out, reward number_reward\nhsd train mine.yaml\n")
    text = Path("mine.yaml").read_text()
    held = yaml.safe_load(text)
    assert held["model"] == {
        "path": "model",
        "lora": {"r": 4, "alpha": 32, "dropout": 0.0, "target_modules": "all-linear"},
    }
    assert held["data"] == {"path": "questions.jsonl"} and held["reward"] == "number"
    assert held["train"]["method"] == "grpo" and held["train"]["weight_decay"] == 0.1
    assert max(map(len, text.splitlines())) <= 120
    assert main(["train", "mine.yaml", "--check"]) == 0


def test_a_key_behind_a_hash_can_be_taken_in():
    assert main(["init", *GIVEN]) == 0
    text = Path("hsd.yaml").read_text()
    commented = [line.replace("# ", "", 1) for line in text.splitlines() if line.startswith("  # ") and ": " in line]
    keys = {line.split(":")[0].strip() for line in commented}
    assert {*OTHERS, "lora", "held_out"} <= keys and not keys & set(WRITTEN)
    for line in commented:
        text = text.replace(f"  # {line.strip()}", line)
    Path("all.yaml").write_text(text)
    assert {*OTHERS, *WRITTEN} <= yaml.safe_load(text)["train"].keys()
    assert main(["train", "all.yaml", "--check"]) == 0


def test_comments_are_the_declarations_own():
    assert main(["init", *GIVEN]) == 0
    text = Path("hsd.yaml").read_text()
    assert "  # save_total_limit: 1  # checkpoints that a finished run keeps, for more steps later; without" in text
    of_hsd = {option.name: option.help for option in options()}
    for help in (of_hsd["learning_rate"], of_hsd["teacher"], declared()["data.held_out"].metadata["help"]):
        assert f"  # {help}\n" in text
    assert "# Overrides `num_train_epochs`. If set to a positive number, the total number of" in text  # TRL's
    config = HSDConfig("x", use_cpu=True, bf16=False)
    assert f"# reference_coef: {config.reference_coef}  " in text  # the method's default, not None


def test_an_entry():
    def lines(help, value, **kwargs):
        field = key(help)
        field.name = "key"
        return list(entry(field, value, **kwargs))

    assert lines("what. More. " + "x" * 120 + ".", 1e-6) == ["  key: 1.0e-06  # what. More"]
    assert lines("", "no", given=False) == ["  # key: 'no'"]
    assert lines("w " * 70, Lora())[-1] == "  key: {r: 16, alpha: 32, dropout: 0.0, target_modules: all-linear}"
    assert lines("w " * 70, 1)[0].startswith("  # w w")
    assert lines("20%% more", [1], indent="") == ["key: [1]  # 20% more"]
    for value in ("\n\nAnswer: {answer}\n'\"# x", "a: b # c", "true", "漢\x07", {"a": [1, None]}, 1e-6):
        (line,) = lines("", value)
        assert yaml.safe_load(line) == {"key": value}


def test_a_terminal_is_asked_for_what_is_missing(monkeypatch, capsys):
    answers = iter(["model", "", "questions.jsonl"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text.split(":")[0]) or next(answers))
    asked: list[str] = []
    assert main(["init", "--reward", "number"]) == 0
    assert asked == ["model", "data", "data"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--data", "questions.jsonl"], "--model: expected a value where there is no terminal to ask on, got none"),
        (["--model", "model", "--data", "questions.jsonl"], "--reward: expected a value"),
        (["old.yaml", *GIVEN], "OUT: expected a new file, got old.yaml, which is a file that exists"),
        (["old.yaml/x.yaml", *GIVEN], "OUT: expected a new file in a folder, got old.yaml/x.yaml, where "),
        (["mine.txt", *GIVEN], "OUT: expected a file that ends in .yaml, got mine.txt"),
        (["--max_steps", "3", "mine.yaml", *GIVEN], "expected --key value, got 'mine.yaml'"),
        ([*GIVEN, "--learning_rat", "1"], "--learning_rat: unknown key, the nearest is train.learning_rate"),
        ([*GIVEN, "--method", "grpoo"], "error: --method: expected one of"),
        ([*GIVEN, "--data", "nowhere.jsonl"], "--data: expected a file, got nowhere.jsonl, which is not there"),
        (["mine.yaml", *GIVEN, "--data", "nowhere.jsonl"], "--data: expected a file, got nowhere.jsonl, which is not"),
        ([*GIVEN, "--model", "./nowhere"], "--model: expected a folder with a model, or a hub id"),
        ([*GIVEN, "--data.limit", "4"], "--data: expected 8 questions or more, one step's worth, got 4"),
    ],
)
def test_what_cannot_be_trained_is_one_line_and_leaves_no_file(words, named, capsys):
    Path("old.yaml").write_text("mine")
    assert main(["init", *words]) == 2
    assert named in capsys.readouterr().err.splitlines()[-1]
    assert [p.name for p in Path().glob("*.yaml*")] == ["old.yaml"] and Path("old.yaml").read_text() == "mine"


def test_generated_questions_bring_their_reward(monkeypatch):
    pytest.importorskip("reasoning_gym")
    data = "reasoning_gym:chain_sum,size=8,seed=0"
    assert main(["init", "--model", "model", "--data", data, "--data.chat", "false"]) == 0
    assert "reward" not in yaml.safe_load(Path("hsd.yaml").read_text())
