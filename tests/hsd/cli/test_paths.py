"""Every command that writes to a path that the user names says which argument cannot be written, before it works."""

import json
from pathlib import Path

import pytest
from tiny_runs import SMALLER, TOKENIZER, qwen3

from hsd.cli.__main__ import main

CONFIG = """
model: {path: model}
data: {path: questions.jsonl}
reward: number
train: {max_steps: 1, per_device_train_batch_size: 8, use_cpu: true, bf16: false}
"""
MODEL = ["--model", "model", "--data", "questions.jsonl"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    qwen3(0, **SMALLER).save_pretrained("model")
    TOKENIZER.save_pretrained("model")
    rows = [{"question": f"{n}+1=", "answer": str(n + 1)} for n in range(8)]
    Path("questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("run.yaml").write_text(CONFIG)
    Path("file").touch()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["credit", *MODEL, "--out", "file"], "--out: expected a folder, got file, which is a file"),
        (["eval", *MODEL, "--reward", "number", "--out", "file/x"], "--out: expected a folder in a folder, got file/x"),
        (["train", "run.yaml", "--output_dir", "file/x"], "--output_dir: expected a folder in a folder, got file/x"),
        (["train", "run.yaml", "--check", "--output_dir", "file"], "--output_dir: expected a folder, got file"),
        (["demo", "small", "--output_dir", "file/x"], "--output_dir: expected a folder in a folder, got file/x"),
        (
            ["data", "prepare", "questions.jsonl", "--out", "model"],
            "--out: expected a file, got model",
        ),
        (["data", "mix", "questions.jsonl", "--ratio", "1", "--out", "file/x"], "--out: expected a file in a folder"),
        (
            ["data", "decontaminate", "questions.jsonl", "--against", "gsm8k", "--out", "x", "--report", "file/x"],
            "--report: expected a file in a folder",
        ),
    ],
)
def test_a_path_that_cannot_be_written_is_one_line(here, words, named, monkeypatch, capsys):
    monkeypatch.setattr("hsd.policy.pretrained.load", lambda *args: pytest.fail("loaded weights"))
    monkeypatch.setattr("hsd.tasks.task.load", lambda *args: pytest.fail("loaded weights"))
    before = sorted(Path().rglob("*"))
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {named}") and "Errno" not in line
    assert sorted(Path().rglob("*")) == before


def test_missing_folders_are_made(here):
    assert main(["data", "prepare", "questions.jsonl", "--out", "new/deep/x.jsonl"]) == 0
    assert len(Path("new/deep/x.jsonl").read_text().splitlines()) == 8
