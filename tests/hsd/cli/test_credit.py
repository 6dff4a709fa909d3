"""`hsd credit` on tiny models: what it writes, where it finds the model, and what it refuses."""

import argparse
import json
import math
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from hsd.cli import credit
from hsd.demo import small_world
from hsd.hindsight.context import DEFAULT_TEXT_TEMPLATE
from hsd.viewer.make import sample_groups

WRITTEN = {"credit.html", "credit.json", "credit_profile.png", "credit_mass.png", "credit_silence.png", "coverage.png"}


def arguments(*words) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    credit.add_arguments(parser)
    return parser.parse_args([str(w) for w in words])


def save_model(folder, tokenizer) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "eos_token_id": tokenizer.eos_token_id}
    Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), **sizes, **heads)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


@pytest.fixture
def parity(monkeypatch):
    """A verifier that a random model satisfies about half of the time."""
    monkeypatch.setattr("hsd.verify.number_reward", lambda completions, **kw: [len(c) % 2 * 1.0 for c in completions])


def test_a_model_and_a_file_of_questions(tmp_path, parity, capsys, monkeypatch):
    save_model(tmp_path / "m", bytes_tokenizer())
    data = tmp_path / "q.jsonl"
    data.write_text("".join(json.dumps({"question": f"{i}+1?", "answer": str(i + 1)}) + "\n" for i in range(3)))
    words = (
        "--model",
        tmp_path / "m",
        "--data",
        data,
        "--out",
        tmp_path / "out",
        "--rollouts",
        6,
        "--max-new-tokens",
        9,
    )
    assert credit.run(arguments(*words, "--questions", 2, "--shown", 1)) == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == WRITTEN
    measured = json.loads((tmp_path / "out" / "credit.json").read_text())
    assert (measured["questions"], measured["group_size"]) == (2, 6)
    page = (tmp_path / "out" / "credit.html").read_text(encoding="utf-8")
    assert "m on q.jsonl" in page and page.count('"tau":') == 6
    assert "2 questions x 6 rollouts" in capsys.readouterr().out
    monkeypatch.setattr("hsd.verify.number_reward", lambda completions, **kw: [0.0 for _ in completions])
    assert credit.run(arguments(*words)) == 0  # none succeeds: the first one's figures would not be of this
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"credit.html", "credit.json", "coverage.png"}
    subject, questions = credit.load(arguments(*words), str(tmp_path / "m"))
    assert questions[0] == {"prompt": "0+1?", "answer": "1"}  # without a chat template a plain prompt
    assert subject.template == DEFAULT_TEXT_TEMPLATE and subject.sampling.max_new_tokens == 9


def test_a_run_of_hsd_train_brings_questions_rewards_and_templates(tmp_path):
    save_model(tmp_path / "model", small_world.build_tokenizer())
    (tmp_path / "config.yaml").write_text(
        "model: {path: small_world}\ndata: {path: small_world, limit: 5}\n"
        "reward: ['hsd.demo.small_world:reward', number]\n"
        "train: {max_completion_length: 7, bf16: false, use_cpu: true, reward_weights: [1.0, 0.5],\n"
        "  success_reward: 0.5,\n"
        "  with_peer_template: '[{answer}|{demonstration}]', answer_only_template: '[{answer}]'}\n"
    )
    subject, questions = credit.load(arguments(tmp_path), str(tmp_path / "model"))
    assert questions == small_world.make_questions(5, seed=42)
    assert subject.sampling.max_new_tokens == 7 and subject.template.answer_only == "[{answer}]"
    assert subject.reward(completions=["1#5", "6"], answer=["5", "7"], completion_ids=[[1], [1]]) == [1.5, 0.0]
    (group,) = sample_groups(replace(subject, reward=lambda completions, **_: [0.5, 0.4]), questions[:1], 0, size=2)
    assert (group.successes, group.failures) == ([0], [1])  # as the run counts them
    assert credit.run(arguments(tmp_path, "--questions", 2, "--shown", 1)) == 0
    assert (tmp_path / "credit" / "credit.html").exists()


def test_a_run_whose_tokenizer_has_no_pad_token(tmp_path, parity):
    save_model(tmp_path / "model", bytes_tokenizer())
    (tmp_path / "config.yaml").write_text(
        "model: {path: m}\ndata: {path: small_world, limit: 1}\nreward: number\n"
        "train: {max_completion_length: 7, bf16: false, use_cpu: true}\n"
    )
    assert credit.run(arguments(tmp_path, "--rollouts", 4)) == 0
    assert json.loads((tmp_path / "credit" / "credit.json").read_text())["failing_with_peer"] > 0


def test_a_run_of_the_demo_brings_its_questions(tmp_path, monkeypatch):
    run = tmp_path / "run"
    save_model(run / "warm_start", small_world.build_tokenizer())
    save_model(run / "model", small_world.build_tokenizer())
    (run / "arguments.json").write_text(json.dumps({"world": "small", "seed": "3"}))
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 0.5}) + "\n")
    monkeypatch.setattr(small_world, "reward", lambda completion_ids, **kw: [len(i) % 2 * 1.0 for i in completion_ids])
    assert credit.run(arguments(run, "--questions", 2, "--rollouts", 4, "--max-new-tokens", 7)) == 0
    assert {"training.png", "credit.html"} <= {p.name for p in (run / "credit").iterdir()}
    assert "Model " + str(run / "model") in (run / "credit" / "credit.html").read_text(encoding="utf-8")
    (run / "arguments.json").write_text("{")
    with pytest.raises(ValueError, match=r"arguments\.json: expected a JSON object, got '{'"):
        credit.run(arguments(run))


def test_the_newest_model_of_a_run(tmp_path):
    for step in (9, 100, 200):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "config.json").write_text("{}")
    for step in (9, 100):  # 200 was not written to its end
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert credit.newest_model(tmp_path) == tmp_path / "checkpoint-100"
    (tmp_path / "model").mkdir()
    assert credit.newest_model(tmp_path) == tmp_path / "checkpoint-100"
    (tmp_path / "model" / "adapter_config.json").write_text("{}")
    assert credit.newest_model(tmp_path) == tmp_path / "model"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), r"^run: expected a run folder, or --model with --data, got neither"),
        (("nowhere",), r"^run: expected a folder, got nowhere"),
        (("--model", "m", "--questions", "0"), r"^questions: expected at least 1, got 0"),
        (("--model", "m", "--rollouts", "1"), r"^rollouts: expected at least 2, got 1"),
        (("--model", "m", "--max-new-tokens", "0"), r"^max_new_tokens: expected at least 1, got 0"),
        (("--model", "m"), r"^data: expected a JSONL file"),
    ],
)
def test_what_is_missing_is_named(words, message):
    with pytest.raises(ValueError, match=message):
        credit.run(arguments(*words))


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^run: expected a model, a checkpoint or config.json in .*--model"):
        credit.newest_model(tmp_path)


def test_a_verdict_that_failed_is_left_out_and_no_verdict_is_no_success():
    functions = [lambda **_: [1.0, None, math.nan], lambda **_: [0.5, 1.0, None]]
    assert credit._weighted(functions, [2.0, 1.0], 1.0)() == [2.5, 1.0, 0.0]
    assert credit._weighted(functions, [2.0, 1.0], 0.0)() == [2.5, 1.0, -1.0]
