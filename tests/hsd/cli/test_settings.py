"""YAML and overrides: files, nearest names, types, and YAML's own traps."""

from dataclasses import fields
from pathlib import Path

import pytest

from hsd.cli.settings import as_typed, known_keys
from hsd.cli.settings import load as read
from hsd.tasks.settings import Lora
from hsd.train.config import HSDConfig

GOOD = """
model: {path: some/model}
data: {path: train.jsonl}
reward: number
train:
  learning_rate: 1e-5
  bf16: false
"""


@pytest.fixture
def load(tmp_path):
    path = tmp_path / "run.yaml"

    def load(text, *overrides):
        path.write_text(text)
        return read(path, overrides)

    return load


def test_sections_with_their_defaults(load):
    settings = load(GOOD)
    assert settings.model.path == "some/model" and settings.model.dtype == "float32" and settings.model.lora is None
    assert settings.data.split is None and settings.reward == "number"
    assert settings.train == {"learning_rate": 1e-5, "bf16": False}
    assert load(GOOD.replace("reward: number", "reward: [math, code]")).reward == ["math", "code"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"model: \xff", r"run\.yaml: expected YAML in UTF-8, got "),
        (b"model: a\x00b", r"run\.yaml: expected YAML in UTF-8, got "),
        (b"model: a\nreward: 2024-13-01", r"run\.yaml: expected YAML in UTF-8, got month must be "),
        (b"train:\n  - a\n  b: 1", r"run\.yaml: expected YAML in UTF-8, got .*line 3"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, text, said):
    (tmp_path / "run.yaml").write_bytes(text)
    with pytest.raises(ValueError, match=f"(?s){said}"):
        read(tmp_path / "run.yaml")


def test_a_text_in_the_place_of_a_section_is_its_path(load):
    text = "model: some/model\ndata: train.jsonl\nreward: number\n"
    assert load(text) == load("model: {path: some/model}\ndata: {path: train.jsonl}\nreward: number\n")
    settings = load(text, "--data.limit", "4", "--model", "other")
    assert (settings.model.path, settings.data.path, settings.data.limit) == ("other", "train.jsonl", 4)
    for words in (("--data", "q.jsonl", "--data.limit", "4"), ("--data.limit", "4", "--data", "q.jsonl")):
        assert (load(text, *words).data.path, load(text, *words).data.limit) == ("q.jsonl", 4)
    both = load("model: {path: a, dtype: bfloat16}", "--model", "b").model
    assert (both.path, both.dtype) == ("b", "bfloat16")
    for wrong in ("data: [a.jsonl]", "data: 5"):
        with pytest.raises(ValueError, match=r"run\.yaml: data: expected a path or the keys path, split, .*, got "):
            load(wrong)
    with pytest.raises(ValueError, match=r"model\.lora: expected the keys r, alpha, dropout, target_modules"):
        load("model: {path: m, lora: 4}")
    with pytest.raises(ValueError, match=r"run\.yaml: train: expected "):
        load("train: fast")


@pytest.mark.parametrize(
    ("text", "overrides", "key"),
    [
        ("data: q.jsonl", [], "run.yaml: data"),
        ("data: {path: q.jsonl}", [], "run.yaml: data.path"),
        ("task: small_world", [], "run.yaml: data.path"),
        ("data: q.jsonl", ["--data.path", "r.jsonl"], "--data.path"),
        ("data: {path: q.jsonl}", ["--data", "r.jsonl"], "--data"),
        ("data: q.jsonl", ["--data.limit", "3"], "run.yaml: data"),
        (None, ["--data.path", "q.jsonl"], "--data.path"),
    ],
)
def test_an_error_of_the_data_names_the_key_as_it_was_typed(tmp_path, monkeypatch, text, overrides, key):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(text or "")
    config = Path("run.yaml") if text else None
    assert as_typed("data: expected a file", config, overrides) == f"{key}: expected a file"
    assert as_typed("train.seed: expected 1", config, overrides) == "train.seed: expected 1"  # at its default
    model = as_typed("model: expected a folder", config, ["--model.path", "m"])
    assert model == "--model.path: expected a folder"
    assert as_typed("limit: expected 1", config, ["--limit", "0"]) == "--limit: expected 1"


@pytest.mark.parametrize(
    ("overrides", "message", "said"),
    [
        (["--train.top_p", "2"], "run.yaml: train.top_p: expected 1", "--train.top_p: expected 1"),
        (["--top-p=2"], "run.yaml: train.top_p: expected 1", "--top_p: expected 1"),
        ([], "run.yaml: train.top_p: expected 1", "run.yaml: train.top_p: expected 1"),
        (["--seed", "2"], "train.top_p: expected 1: 2", "run.yaml: train.top_p: expected 1: 2"),
        ([], "use_cpu: expected 1", "run.yaml: train.use_cpu: expected 1"),  # which is false there
        (["--use_vllm", "1"], "use_vllm: expected 1", "--use_vllm: expected 1"),
        (["--lora", "{r: 4}"], "model.lora.target_modules: expected 1", "--lora: expected 1"),
        (["--model", "m"], "model.lora.target_modules: expected 1", "run.yaml: model.lora.target_modules: expected 1"),
        (["--epsilon", "1"], "run.yaml: train.top_p, epsilon: expected both", "train.top_p, --epsilon: expected both"),
        (["--max_teacher_prompt_length", "9"], "max_length: expected 1", "--max_teacher_prompt_length: expected 1"),
        (["--top_p", "1"], "nowhere: expected 1", "nowhere: expected 1"),
        (["--top_p", "1"], "no colon", "no colon"),
    ],
)
def test_an_error_names_the_option_that_gave_the_key_and_else_the_file(tmp_path, monkeypatch, overrides, message, said):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("model: {path: m, lora: {target_modules: [x]}}\ntrain: {top_p: 2, use_cpu: false}\n")
    assert as_typed(message, Path("run.yaml"), overrides) == said


def test_a_key_inside_an_option_is_named_with_the_option(load):
    with pytest.raises(ValueError, match=r"^--lora: model\.lora\.r: expected greater than or equal to 1, got 0"):
        load(GOOD, "--lora", "{r: 0}")


def test_every_field_of_the_config_is_a_key():
    assert {f"train.{f.name}" for f in fields(HSDConfig)} <= set(known_keys())


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("learning_rate: 1e-5", float, 1e-5),  # YAML 1.1 reads text: no dot
        ("learning_rate: 1", float, 1.0),
        ("max_steps: 1000.0", int, 1000),
        ("bf16: no", bool, False),
        ("reference_refresh_steps: null", type(None), None),
        ("report_to: none", str, "none"),  # text is allowed here, and means none to transformers
        ("report_to: [tensorboard]", list, ["tensorboard"]),
        ("chat_template_kwargs: {enable_thinking: false}", dict, {"enable_thinking": False}),
        ("method_args: {a: 1e-3, b: [2E+4, 1e], c: 1e-3x}", dict, {"a": 0.001, "b": [2e4, "1e"], "c": "1e-3x"}),
        ("lr_scheduler_kwargs: ~", type(None), None),
        ("save_strategy: steps", str, "steps"),
    ],
)
def test_values_take_the_type_of_their_field(load, text, kind, value):
    train = load(
        GOOD.replace("bf16: false", text) if "learning" not in text else GOOD.replace("learning_rate: 1e-5", text)
    ).train
    (name,) = [key for key in train if key == text.partition(":")[0]]
    assert train[name] == value and type(train[name]) is kind


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max_steps: 1.5", "run.yaml: train.max_steps: expected a valid integer, got a number with a fractional part"),
        ("top_p: high", "run.yaml: train.top_p: expected a valid number"),
        ("use_cpu: 3", "run.yaml: train.use_cpu: expected a valid boolean"),
        ("run_name: 5", "train.run_name: expected a valid string, got 5"),
        ("reward_weights: [1, x]", "run.yaml: train.reward_weights: expected a valid number"),
        (
            "policy_coef: x",
            "train.policy_coef: expected a valid number, unable to parse string as a number or a valid list",
        ),
        ("save_strategy: sometimes", None),  # HSDConfig refuses it
        ("learning_rat: 1", "run.yaml: train.learning_rat: unknown key, the nearest is train.learning_rate"),
        ("path: x", "run.yaml: train.path: unknown key, the nearest is model.path or data.path"),
        ("xyzzy: 1", "run.yaml: train.xyzzy: unknown key"),
    ],
)
def test_what_is_wrong_is_named_with_its_file(load, text, said):
    if said is None:
        assert load(GOOD.replace("bf16: false", text)).train["save_strategy"] == "sometimes"
        return
    with pytest.raises(ValueError) as error:
        load(GOOD.replace("bf16: false", text))
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected sections"),
        ("[1, 2]", "expected sections"),
        (GOOD.replace("{path: some/model}", "5"), "run.yaml: model: expected a path or the keys path, dtype"),
        (GOOD + "\nlearning_rate: 1", "learning_rate: unknown key, the nearest is train.learning_rate"),
        (GOOD + "\nmodle: 1", "modle: unknown key, the nearest is model"),
        (GOOD.replace("{path: some/model}", "{path: m, lora: {rank: 8}}"), "model.lora.rank: unknown key"),
        (GOOD.replace("{path: some/model}", "{path: m, lora: 8}"), "model.lora: expected the keys r, alpha"),
        (GOOD.replace("{path: some/model}", "{path: m, dtype: fp8}"), "model.dtype: expected 'float32', 'bfloat16' or"),
    ],
)
def test_sections_are_checked(load, text, said):
    with pytest.raises(ValueError) as error:
        load(text)
    assert said in str(error.value)


def test_a_file_without_a_train_section_is_the_defaults(load):
    assert load(GOOD[: GOOD.index("train:")]).train == {}


@pytest.mark.parametrize(
    "words",
    [
        ["--learning_rate", "3e-5"],
        ["--train.learning_rate", "3e-5"],
        ["--learning-rate=3e-5"],
        ["--train.learning_rate=3e-5"],
    ],
)
def test_overrides(load, words):
    assert load(GOOD, *words).train == {"learning_rate": 3e-5, "bf16": False}


def test_overrides_take_the_type_of_their_field(load):
    words = ["--run_name", "12", "--max_steps", "5", "--bf16", "true", "--reward", "a.b:c"]
    words += [
        "--reference_refresh_steps",
        "none",
        "--model.path",
        "other",
        "--lora",
        "{r: 4}",
        "--alpha",
        "8",
        "--limit",
        "7",
        "--report_to",
        "[tensorboard]",
    ]
    settings = load(GOOD, *words, "--policy_coef", "[1, 0, 50]")
    assert settings.train == {
        "learning_rate": 1e-5,
        "bf16": True,
        "run_name": "12",
        "max_steps": 5,
        "reference_refresh_steps": None,
        "report_to": ["tensorboard"],
        "policy_coef": [1.0, 0.0, 50.0],
    }
    assert settings.reward == "a.b:c" and settings.model.path == "other" and settings.data.limit == 7
    assert settings.model.lora == Lora(r=4, alpha=8)
    assert load(GOOD.replace("{path: some/model}", "{path: m, lora: {r: 4}}"), "--lora", "none").model.lora is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--path", "x"], "--path: expected one of --model.path, --data.path"),
        (["--learning_rat", "1"], "--learning_rat: unknown key, the nearest is train.learning_rate"),
        (["--learning_rate"], "--learning_rate: expected a value, got none"),
        (["--learning_rate", "--bf16", "true"], "--learning_rate: expected a value, got none"),
        (["--learning_rate", "fast"], "--learning_rate: train.learning_rate: expected a valid number"),
        (
            ["--teacher", "frozen"],
            "--teacher: train.teacher: expected 'live', 'ema', 'fixed', 'trust_region', 'copy' or 'gated'",
        ),
        (["other.yaml"], "arguments: expected --key value, got 'other.yaml'"),
    ],
)
def test_bad_overrides_are_named(load, words, said):
    with pytest.raises(ValueError) as error:
        load(GOOD, *words)
    assert said in str(error.value)


def test_a_negative_number_is_a_value(load):
    assert load(GOOD, "--max_steps", "-1").train["max_steps"] == -1


def test_an_empty_text_is_a_text_where_there_may_be_one(load):
    assert load(GOOD).data.instruction is None and load(GOOD, "--instruction", "null").data.instruction is None
    assert load(GOOD, "--instruction", "").data.instruction == load(GOOD, "--instruction=").data.instruction == ""
    assert load(GOOD, "--limit", "").data.limit is None


def test_a_missing_file_is_named():
    with pytest.raises(ValueError, match=r"^nowhere\.yaml: expected a YAML file, got No such file"):
        read(Path("nowhere.yaml"))
