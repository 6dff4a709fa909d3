"""`hsd credit` on tiny models: what it writes, where it finds the model, and what it refuses."""

import argparse
import json
from dataclasses import replace

import pytest
from tiny_runs import SMALLER, qwen3, with_lora
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hsd.cli import credit
from hsd.cli.folder import find_run, newest_model
from hsd.hindsight.context import DEFAULT_TEXT_TEMPLATE
from hsd.tasks import small_world
from hsd.tasks.task import Policy
from hsd.viewer.make import sample_groups

WRITTEN = {"credit.html", "credit.json", "credit_profile.png", "credit_mass.png", "credit_silence.png", "coverage.png"}


def arguments(*words) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    credit.add_arguments(parser)
    return parser.parse_args([str(w) for w in words])


def save_model(folder, tokenizer) -> Policy:
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    model = qwen3(0, **SMALLER, vocab_size=len(tokenizer), **special)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Policy(model, tokenizer)


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
    task = find_run(None, str(tmp_path / "m"), str(data), 9)[1]
    first = task.questions[0]
    assert (first["prompt"], first["answer"]) == ("0+1?", "1")  # without a chat template a plain prompt
    assert task.template == DEFAULT_TEXT_TEMPLATE and task.sampling.max_new_tokens == 9
    assert find_run(None, str(tmp_path / "m"), str(data), None)[1].sampling.max_new_tokens == 512


def test_a_run_brings_questions_rewards_and_templates(tmp_path):
    policy = save_model(tmp_path / "model", small_world.build_tokenizer())
    (tmp_path / "config.yaml").write_text(
        "task: small_world\nreward: ['hsd.tasks.small_world:reward', number]\n"
        "train: {max_completion_length: 7, bf16: false, use_cpu: true, reward_weights: [1.0, 0.5], seed: 3,\n"
        "  success_reward: 0.5,\n"
        "  with_peer_template: '[{answer};{demonstration}]', answer_only_template: '[{answer};]'}\n"
    )
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "hsd/success_rate": 0.5}) + "\n")
    task = find_run(tmp_path, str(tmp_path / "model"), None, None)[1]
    assert task.evaluated == small_world.make_questions(512, seed=3, held_out=True, added=small_world.ONE_DIGIT)
    assert task.title == small_world.task(0).title
    assert task.sampling.max_new_tokens == 7 and task.template.answer_only == "[{answer};]"
    assert task.reward(completions=["1#5", "6"], answer=["5", "7"], completion_ids=[[1], [1]]) == [1.5, 0.0]
    halves = replace(task, rewards=[lambda completions, **_: [0.5, 0.4]], reward_weights=None)
    (group,) = sample_groups(halves, policy, task.evaluated[:1], 0, size=2)
    assert (group.successes, group.failures) == ([0], [1])  # as the run counts them
    unsure = replace(task, rewards=[lambda completions, **_: [None, 0.0, 1.0]], reward_weights=None)
    (group,) = sample_groups(unsure, policy, task.evaluated[:1], 0, size=3)
    assert (group.successes, group.failures) == ([2], [1])
    assert credit.run(arguments(tmp_path, "--questions", 2, "--shown", 1)) == 0
    assert {"training.png", "credit.html"} <= {p.name for p in (tmp_path / "credit").iterdir()}
    assert "Model " + str(tmp_path / "model") in (tmp_path / "credit" / "credit.html").read_text(encoding="utf-8")
    assert credit.run(arguments(tmp_path / "model", "--questions", 2, "--shown", 1)) == 0
    assert not (tmp_path / "model" / "credit").exists()
    (tmp_path / "q.jsonl").write_text('{"question": "1+1=", "answer": "2"}\n')
    other = find_run(tmp_path, str(tmp_path / "model"), str(tmp_path / "q.jsonl"), None)[1]
    assert [q["prompt"] for q in other.evaluated] == ["1+1="] and other.template == task.template
    (tmp_path / "config.yaml").write_text("{")
    with pytest.raises(ValueError, match=r"config\.yaml: expected YAML"):
        credit.run(arguments(tmp_path))


def test_a_lora_run_has_adapters_inside_the_model_that_is_loaded(tmp_path, parity):
    policy = save_model(tmp_path / "base", bytes_tokenizer())
    with_lora(policy.model).save_pretrained(tmp_path / "model")
    config = tmp_path / "model" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}))
    policy.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "q.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n')
    (tmp_path / "config.yaml").write_text(
        f"model: {{path: base, lora: {{r: 4}}}}\ndata: {{path: {tmp_path / 'q.jsonl'}}}\nreward: number\n"
        "train: {max_completion_length: 7, bf16: false, use_cpu: true}\n"
    )
    assert credit.run(arguments(tmp_path, "--rollouts", 4)) == 0
    assert json.loads((tmp_path / "credit" / "credit.json").read_text())["failing_with_peer"] > 0


def test_where_no_rollout_has_a_verdict_nothing_is_claimed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hsd.verify.number_reward", lambda completions, **kw: [None for _ in completions])
    save_model(tmp_path / "m", bytes_tokenizer())
    (tmp_path / "q.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n')
    words = ("--model", tmp_path / "m", "--data", tmp_path / "q.jsonl", "--out", tmp_path / "out")
    assert credit.run(arguments(*words, "--rollouts", 2, "--max-new-tokens", 3)) == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"credit.html", "credit.json"}
    assert "Without a verdict and in no share: 2 of" in capsys.readouterr().out


def test_a_run_whose_tokenizer_has_no_pad_token(tmp_path, parity):
    save_model(tmp_path / "model", bytes_tokenizer())
    (tmp_path / "q.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n')
    (tmp_path / "config.yaml").write_text(
        f"model: {{path: m}}\ndata: {{path: {tmp_path / 'q.jsonl'}}}\nreward: number\n"
        "train: {max_completion_length: 7, bf16: false, use_cpu: true}\n"
    )
    assert credit.run(arguments(tmp_path, "--rollouts", 4)) == 0
    assert json.loads((tmp_path / "credit" / "credit.json").read_text())["failing_with_peer"] > 0


def test_the_newest_model_of_a_run(tmp_path):
    for step in (9, 100, 200):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "config.json").write_text("{}")
    for step in (9, 100):  # 200 was not written to its end
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    assert newest_model(tmp_path) == tmp_path / "checkpoint-100"
    (tmp_path / "model").mkdir()
    assert newest_model(tmp_path) == tmp_path / "checkpoint-100"
    (tmp_path / "model" / "adapter_config.json").write_text("{}")
    assert newest_model(tmp_path) == tmp_path / "checkpoint-100"  # of steps that it does not tell
    for steps, newest in ((99, "checkpoint-100"), (100, "model")):
        (tmp_path / "model" / "trainer_state.json").write_text(json.dumps({"global_step": steps}))
        assert newest_model(tmp_path) == tmp_path / newest


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), r"^run: expected a run folder, or --model with --data, got neither"),
        (("nowhere",), r"^run: expected a folder, got nowhere"),
        (("--model", "m", "--questions", "0"), r"^--questions: expected at least 1, got 0"),
        (("--model", "m", "--rollouts", "1"), r"^--rollouts: expected at least 2, got 1"),
        (("--model", "m", "--max-new-tokens", "0"), r"^--max-new-tokens: expected at least 1, got 0"),
        (("--model", "m"), r"^data: expected a file of questions"),
    ],
)
def test_what_is_missing_is_named(words, message):
    with pytest.raises(ValueError, match=message):
        credit.run(arguments(*words))


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^run: expected a model, a checkpoint or config.json in .*, got none"):
        newest_model(tmp_path)
