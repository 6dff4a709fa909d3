"""YAML and overrides: nearest names, lines, types, and YAML's own traps."""

from dataclasses import fields
from pathlib import Path

import pytest

from hsd.cli.settings import Lora, names, read
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
        return read(path, overrides)[0]

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
        (b"model: \xff", r"run\.yaml: expected UTF-8 text, got "),
        (b"model: a\x00b", r"run\.yaml: expected YAML, got "),
        (b"model: a\nreward: 2024-13-01", r"run\.yaml, line 2: reward: month must be .*, got '2024-13-01'"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, text, said):
    (tmp_path / "run.yaml").write_bytes(text)
    with pytest.raises(ValueError, match=said):
        read(tmp_path / "run.yaml")


def test_every_field_of_the_config_is_a_key():
    assert {f"train.{f.name}" for f in fields(HSDConfig)} <= set(names())


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("learning_rate: 1e-5", float, 1e-5),  # YAML 1.1 reads text: no dot
        ("learning_rate: 1", float, 1.0),
        ("max_steps: 1e3", int, 1000),
        ("max_steps: 1000.0", int, 1000),
        ("bf16: no", bool, False),
        ("kl_clip: none", type(None), None),
        ("report_to: none", str, "none"),  # text is allowed here, and means none to transformers
        ("report_to: [tensorboard]", list, ["tensorboard"]),
        ("chat_template_kwargs: {enable_thinking: false}", dict, {"enable_thinking": False}),
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
        ("max_steps: true", "line 7: train.max_steps: expected a whole number, got True"),
        ("max_steps: 1.5", "line 7: train.max_steps: expected a whole number, got 1.5"),
        ("top_p: high", "line 7: train.top_p: expected a number, got 'high'"),
        ("use_cpu: 1", "line 7: train.use_cpu: expected true or false, got 1"),
        ("run_name: 5", "train.run_name: expected text or none, got 5"),
        ("reward_weights: [1, x]", "expected a list (a number each) or none, got [1, 'x']"),
        ("save_strategy: sometimes", None),  # transformers refuses it
        ("learning_rat: 1", "line 7: train.learning_rat: unknown key, the nearest is train.learning_rate"),
        ("path: x", "line 7: train.path: unknown key, the nearest is model.path or data.path"),
        ("xyzzy: 1", "line 7: train.xyzzy: unknown key"),
        ("learning_rate: 2e-5", "line 7: learning_rate: expected once, got it again"),
        ("- x", "run.yaml, line 7: expected YAML"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(load, text, said):
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
        (GOOD.replace("reward: number", ""), "reward: expected a value, got none"),
        (GOOD.replace("{path: some/model}", "{dtype: float32}"), "model.path: expected a value, got none"),
        (GOOD.replace("model: {path: some/model}", ""), "model.path: expected a value, got none"),
        (GOOD.replace("{path: some/model}", "some/model"), "line 2: model: expected keys and values"),
        (GOOD + "\nlearning_rate: 1", "learning_rate: unknown key, the nearest is train.learning_rate"),
        (GOOD + "\nmodle: 1", "modle: unknown key, the nearest is model"),
        (GOOD.replace("{path: some/model}", "{path: m, lora: {rank: 8}}"), "model.lora.rank: unknown key"),
        (GOOD.replace("{path: some/model}", "{path: m, lora: 8}"), "model.lora: expected keys and values or none"),
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
    words = ["--run_name", "12", "--max_steps", "5", "--bf16", "true", "--kl_clip", "none", "--reward", "a.b:c"]
    words += [
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
        "kl_clip": None,
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
        (["--learning_rate", "fast"], "--learning_rate: train.learning_rate: expected a number, got 'fast'"),
        (["other.yaml"], "expected --key value after the configuration, got 'other.yaml'"),
    ],
)
def test_bad_overrides_are_named(load, words, said):
    with pytest.raises(ValueError) as error:
        load(GOOD, *words)
    assert said in str(error.value)


def test_a_negative_number_is_a_value(load):
    assert load(GOOD, "--max_steps", "-1").train["max_steps"] == -1


def test_a_missing_file_is_named():
    with pytest.raises(OSError, match=r"nowhere\.yaml"):
        read(Path("nowhere.yaml"))
