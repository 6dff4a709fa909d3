"""`hsd sample`: how a run asks, which models it takes, and the layout of replies."""

import copy
import gzip
import json
from pathlib import Path

import pytest
from datasets import Dataset
from tiny_runs import SMALLER, TOKENIZER, qwen3, start_adapters, with_lora
from transformers import AutoModelForCausalLM

from hsd.cli.__main__ import main
from hsd.cli.sample import MOST, Asking, habits, read_prompts
from hsd.cli.side_by_side import COLUMN, GAP, Reply, on_screen, printable, shown, wrapped
from hsd.evaluate import Sampling, sample

CONFIG = """
model: {path: model}
data: {path: questions.jsonl}
reward: number
train: {max_completion_length: 5, temperature: 1e-6, chat_template_kwargs: {mark: "#"}, use_cpu: true, bf16: false}
"""
CHAT = copy.deepcopy(TOKENIZER)
CHAT.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}{{ mark }}"
SYSTEM = {"role": "system", "content": "1+1="}


def user(text):
    return {"role": "user", "content": text}


def save(model, folder):
    model.save_pretrained(folder)
    CHAT.save_pretrained(folder)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run whose newest model, after step 2, has LoRA adapters."""
    monkeypatch.chdir(tmp_path)
    save(qwen3(0, **SMALLER, tie_word_embeddings=False), "model")
    rows = [{"prompt": [SYSTEM, user(q)], "answer": "7"} for q in ("3+4=", "4+3=")]
    Path("questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    adapted = with_lora(AutoModelForCausalLM.from_pretrained("model"))
    start_adapters(adapted, std=2.0)
    save(adapted, "run/model")
    save(qwen3(1, **SMALLER, tie_word_embeddings=False), "run/checkpoint-1")
    for folder, step in (("model", 2), ("checkpoint-1", 1)):
        Path(f"run/{folder}/trainer_state.json").write_text(json.dumps({"global_step": step}))
    Path("run/config.yaml").write_text(CONFIG)
    return tmp_path


def replies(printed):
    """(title, reply) of each block."""
    return [tuple(block.split("\n", 1)) for block in printed.strip().split("\n\n")[1:]]


def said(model, text, tokens=5):
    loaded = AutoModelForCausalLM.from_pretrained(model)
    (rollout,) = sample(loaded, TOKENIZER, [text], Sampling(tokens, 0.0), seed=0)
    return TOKENIZER.decode(rollout, skip_special_tokens=True)


def test_a_run_is_its_newest_model_and_asks_as_it_trained(run, capsys):
    assert main(["sample", "model", "run", "run/model", "run/checkpoint-1", "--prompt", "3+4="]) == 0
    printed = capsys.readouterr().out
    found = {title.split(":")[0]: text for title, text in replies(printed)}
    assert printed.startswith("prompt: 3+4=\n\nmodel: 5 tokens, cut off\n")
    # The model that is no run is asked as the run is.
    of = {"model": "model", "run": "run/model", "run/model": "run/model", "run/checkpoint-1": "run/checkpoint-1"}
    assert found == {name: said(path, "[1+1=][3+4=]#") for name, path in of.items()}
    assert len(set(found.values())) == 3


def test_what_is_given_replaces_what_the_run_says(run, capsys):
    Path("questions.jsonl").unlink()
    assert main(["sample", "run", "--prompt", "3+4="]) == 2
    assert "questions.jsonl, which is not there (--as-is asks without" in capsys.readouterr().err
    words = ["--max_new_tokens", "3", "--n", "2", "--temperature", "0", "--as-is"]
    assert main(["sample", "run", "--prompt", "3+4=", *words]) == 0
    reply = said("run/model", "[3+4=]#", 3)
    assert replies(capsys.readouterr().out) == [(f"run ({k} of 2): 3 tokens, cut off", reply) for k in (1, 2)]


def test_without_a_run_the_tokenizer_says_how_to_ask(run, capsys):
    Path("asked.txt").write_text("3+4=\n\n5+6=\n")
    words = ["--temperature", "0", "--max-new-tokens", "4"]
    assert main(["sample", "model", "--prompts", "asked.txt", "--prompt", "1=", *words]) == 0
    printed = capsys.readouterr().out
    for text in ("1=", "3+4=", "5+6="):
        assert f"prompt: {text}\n\nmodel: 4 tokens, cut off\n{said('model', f'[{text}]', 4)}\n" in printed
    assert Asking().prompt([SYSTEM, user("3=")], TOKENIZER) == "3="  # no chat template
    assert Asking(chat=False).prompt("3=", CHAT) == "3="


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["model"], "--prompt: expected a text, or --prompts with a file of them, got none"),
        (["model", "--prompt", ""], "--prompt: expected a text"),
        (["model", "--prompts", "nowhere.txt"], "--prompts: expected a file, got nowhere.txt, which is not there"),
        (["model", "--prompt", "3=", "--n", "0"], f"--n: expected 1 to {MOST} replies, got 0"),
        (["model", "--prompt", "3=", "--n", str(MOST + 1)], f"--n: expected 1 to {MOST} replies, got {MOST + 1}"),
        (["model", "--prompt", "3=", "--temperature", "-1"], "temperature: expected a finite number"),
        (["model", "./nowhere", "--prompt", "3="], "model: expected a folder with a model, or a hub id"),
        (["model", "empty", "--prompt", "3="], "expected a model, a checkpoint or config.json in empty"),
        (["--prompt", "3="], "MODEL"),
    ],
)
def test_bad_input_is_named_before_a_model_is_loaded(run, words, named, monkeypatch, capsys):
    monkeypatch.setattr("hsd.tasks.task.load_policy", lambda *args: pytest.fail("loaded weights"))
    Path("empty").mkdir()
    assert main(["sample", *words]) == 2
    assert named in capsys.readouterr().err.splitlines()[-1]


def test_prompts_of_a_file_of_questions(tmp_path):
    path = tmp_path / "asked.jsonl"
    path.write_text('{"question": "a?", "prompt": "a?\\nShort."}\n{"prompt": [{"role": "user", "content": "b"}]}\n')
    assert read_prompts(path) == ["a?", [user("b")]]
    for row in (
        {"answer": "7"},
        {"prompt": []},
        {"prompt": [user(None)]},
        {"prompt": [user([{"type": "text", "text": "b"}])]},
        {"prompt": [user("b"), {"role": "assistant", "content": "c"}]},
    ):
        path.write_text(json.dumps(row) + "\n")
        with pytest.raises(
            ValueError, match=r"asked\.jsonl, row 1: expected a question, prompt or problem, text or mes"
        ):
            read_prompts(path)


def test_prompts_of_tables_and_of_plain_text(tmp_path):
    text = 'question,answer\n"1, 2?",3\n4?,5\n'
    for name, asked in (
        ("q.csv", ["1, 2?", "4?"]),
        ("q.CSV", ["1, 2?", "4?"]),
        ("q.txt", ["question,answer", '"1, 2?",3', "4?,5"]),
        ("csv", ["question,answer", '"1, 2?",3', "4?,5"]),
    ):
        (tmp_path / name).write_text(text)
        assert read_prompts(tmp_path / name) == asked
    (tmp_path / "q.csv.gz").write_bytes(gzip.compress(text.encode()))
    Dataset.from_list([{"problem": "1, 2?"}, {"problem": "4?"}]).to_parquet(tmp_path / "q.parquet")
    assert read_prompts(tmp_path / "q.csv.gz") == read_prompts(tmp_path / "q.parquet") == ["1, 2?", "4?"]
    (tmp_path / "q.tsv").write_text("id\tquery\n1\t2?\n")
    with pytest.raises(ValueError, match=r"q\.tsv, row 1: expected a question, .*, got the columns \['query', 'id'\]"):
        read_prompts(tmp_path / "q.tsv")


def row(text, question=None, before=()):
    return {"prompt": text if before == () else [*before, user(text)], "question": question}


def test_habits_are_what_all_questions_have_around_them():
    boxed = [row("a\n\nBox it.", "a", [SYSTEM]), row("b\n\nBox it.", "b", [SYSTEM])]
    assert habits(boxed, None) == {"before": [SYSTEM], "after": "\n\nBox it."}
    mixed = [*boxed, row("c\n\nAs a program.", "c", [user("other")])]
    assert habits(mixed, None) == {"before": (), "after": ""}
    assert habits([row("a\n\nShort."), row("b\n\nShort.")], "Short.") == {"chat": False, "after": "\n\nShort."}
    assert habits([row("a"), row("b")], "Short.") == {"chat": False, "after": ""}  # not where a prompt was ready
    assert habits([row("a", " a ")], None) == {"chat": False, "after": ""}


REPLIES = [[Reply("one two", 2, False), Reply("x", 1, False)], [Reply("three", 1, True), Reply("y", 1, False)]]


def test_columns_on_a_wide_terminal_and_blocks_elsewhere():
    wide = shown("q", ["A", "B"], REPLIES, 2 * COLUMN + GAP)
    assert wide[:5] == [
        "prompt: q",
        "",
        "A (1 of 2): 2 tokens".ljust(COLUMN + GAP) + "B (1 of 2): 1 token, cut off",
        "",
        "one two".ljust(COLUMN + GAP) + "three",
    ]
    below = ["prompt: q", "", "A (1 of 2): 2 tokens", "one two", "", "B (1 of 2): 1 token, cut off", "three", ""]
    for width in (2 * COLUMN + GAP - 1, None):
        assert shown("q", ["A", "B"], REPLIES, width)[: len(below)] == below
    assert shown("q", ["A"], REPLIES[:1], 200)[3] == "one two"


def test_lines_are_broken_by_what_they_take_on_the_screen():
    assert wrapped("one two three", 7) == ["one two", "three"] and wrapped("", 7) == [""]
    assert wrapped("onetwothree", 4) == ["onet", "woth", "ree"] and wrapped("  code", 4) == ["  co", "de"]
    assert wrapped("漢字漢字", 5) == ["漢字", "漢字"] and on_screen("e\u0301漢") == 3
    assert len(wrapped("a b" * 100_000, 40)) > 7000  # in linear time


def test_a_terminal_is_not_told_what_to_do():
    reply = [[Reply("\x1b[2Ja\tb\nc", 3, False)]]
    assert printable("\x1b[2Ja\tb\nc") == "\\x1b[2Ja   b\nc" == shown("q", ["A"], reply, 20)[3]
    assert shown("q", ["A"], reply, None)[3] == "\x1b[2Ja\tb\nc"  # a file gets the reply itself
