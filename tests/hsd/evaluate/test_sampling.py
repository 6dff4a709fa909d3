"""Sampling and scoring outside of training: ends, seeds, batches, and the interval of a success rate."""

import copy

import pytest
import torch
from tiny_runs import SMALLER, TOKENIZER, qwen3
from torch import nn
from transformers import Qwen3ForCausalLM

from hsd.evaluate import Sampling, end_token_ids, sample, score, success
from hsd.evaluate.interval import interval
from hsd.evaluate.sampling import choice_of, is_truncated
from hsd.tasks import small_world
from hsd.train.config import HSDConfig

PAD, EOS = TOKENIZER.pad_token_id, TOKENIZER.eos_token_id
PROMPTS = [q["prompt"] for q in small_world.make_questions(3, seed=0)] + ["1+2=", "7="]


@pytest.fixture
def model() -> Qwen3ForCausalLM:
    model = qwen3(1, **SMALLER | {"num_hidden_layers": 2}, attention_dropout=0.5, bos_token_id=None)
    for p in model.parameters():
        nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.2)
    return model


def test_a_rollout_ends_with_its_first_end_token(model):
    many = PROMPTS * 8
    extra = TOKENIZER.convert_tokens_to_ids("#")
    plain = sample(model, TOKENIZER, many, Sampling(12), seed=3)
    assert any(extra in r[:-1] for r in plain)  # "#" is a token like any other unless the model declares it
    model.generation_config.eos_token_id = [EOS, extra]
    for rollouts, ends in ((plain, {EOS}), (sample(model, TOKENIZER, many, Sampling(12), seed=3), {EOS, extra})):
        assert len(rollouts) == len(many)
        for r in rollouts:
            assert 1 <= len(r) <= 12
            assert not ends & set(r[:-1])
            assert r[-1] in ends or len(r) == 12
        assert {r[-1] for r in rollouts} >= ends
        assert any(len(r) == 12 and r[-1] not in ends for r in rollouts)  # and one that is cut


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 2.0),
        ("max_new_tokens", True),
        ("batch_size", 0),
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("temperature", float("nan")),
        ("temperature", "1"),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("top_k", -1),
        ("top_k", 1.0),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("nan")),
    ],
)
def test_what_cannot_be_sampled_with(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got {value!r}"):
        Sampling(**{"max_new_tokens": 8} | {name: value})


@pytest.mark.parametrize(
    ("declared", "expected"), [(None, [EOS]), (EOS, [EOS]), (7, [EOS, 7]), ([9, EOS], [EOS, 9]), ([], [EOS])]
)
def test_end_tokens_are_the_tokenizers_and_the_models(model, declared, expected):
    model.generation_config.eos_token_id = declared
    assert end_token_ids(model, TOKENIZER) == expected


@pytest.mark.parametrize("declared", [None, 7])
def test_a_tokenizer_without_an_end_token(model, declared):
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.eos_token = tokenizer.pad_token = None
    model.generation_config.eos_token_id = declared
    model.generation_config.pad_token_id = None
    ends = [] if declared is None else [declared]
    assert end_token_ids(model, tokenizer) == ends
    rollouts = sample(model, tokenizer, PROMPTS, Sampling(6), seed=0)
    assert all(len(r) == 6 or r[-1] in ends for r in rollouts)
    assert [is_truncated(r, ends) for r in rollouts] == [r[-1] not in ends for r in rollouts]
    assert is_truncated([], ends)


@pytest.mark.parametrize("training", [True, False])
def test_a_seed_fixes_the_rollouts_and_nothing_else_changes(model, training):
    model.train(training)
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first = sample(model, TOKENIZER, PROMPTS, Sampling(8), seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training is training
    torch.manual_seed(12)
    assert sample(model, TOKENIZER, PROMPTS, Sampling(8), seed=3) == first
    assert sample(model, TOKENIZER, PROMPTS, Sampling(8), seed=4) != first


def test_a_seed_has_64_bits(model):
    for seed in (-(2**63), 2**64 - 1):
        assert sample(model, TOKENIZER, ["1="], Sampling(1), seed=seed)
    for seed in (-(2**63) - 1, 2**64):
        with pytest.raises(ValueError, match="seed: expected a number of 64 bits, got"):
            sample(model, TOKENIZER, ["1="], Sampling(1), seed=seed)


def test_batches_do_not_change_a_nearly_greedy_result(model):
    cold = {batch: Sampling(10, temperature=1e-4, batch_size=batch) for batch in (1, 2, 128)}
    done: list[tuple[int, int]] = []
    one, two, all_ = (
        sample(model, TOKENIZER, PROMPTS, s, seed=0, progress=lambda *at: done.append(at)) for s in cold.values()
    )
    assert one == two == all_
    assert done == [(i, 5) for i in (1, 2, 3, 4, 5)] + [(2, 5), (4, 5), (5, 5)] + [(5, 5)]
    model.eval()
    for prompt, rollout in zip(PROMPTS, one, strict=True):  # and it is the greedy one
        ids = TOKENIZER(prompt)["input_ids"]
        with torch.no_grad():
            best = model(input_ids=torch.tensor([ids + rollout])).logits[0, len(ids) - 1 : -1].argmax(-1)
        assert best.tolist() == rollout


def test_top_p_and_temperature_reach_the_sampler(model):
    greedy = sample(model, TOKENIZER, PROMPTS, Sampling(8, temperature=1e-4), seed=0)
    assert sample(model, TOKENIZER, PROMPTS, Sampling(8, top_p=1e-6), seed=5) == greedy
    assert sample(model, TOKENIZER, PROMPTS, Sampling(8), seed=5) != greedy


@pytest.mark.parametrize("choice", [{"top_k": 1}, {"min_p": 1.0}])
def test_one_token_alone_is_the_greedy_one(model, choice):
    greedy = sample(model, TOKENIZER, PROMPTS, Sampling(8, temperature=0), seed=0)
    assert sample(model, TOKENIZER, PROMPTS, Sampling(8, **choice), seed=5) == greedy


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_repetition_penalty_reaches_the_sampler(model, temperature):
    plain, penalised = (
        sample(model, TOKENIZER, PROMPTS, Sampling(24, temperature, repetition_penalty=penalty), seed=5)
        for penalty in (1.0, 1e6)
    )

    def repeated(rollouts):
        return sum(len(row) - len(set(row)) for row in rollouts) / sum(map(len, rollouts))

    assert repeated(penalised) < repeated(plain)


def test_a_run_decides_how_tokens_are_chosen(tmp_path):
    config = HSDConfig(
        str(tmp_path), use_cpu=True, bf16=False, temperature=0.5, top_p=0.8, top_k=7, min_p=0.1, repetition_penalty=1.3
    )
    assert vars(Sampling(3, **choice_of(config))) == {
        "max_new_tokens": 3, "temperature": 0.5, "top_p": 0.8, "batch_size": 128, "top_k": 7, "min_p": 0.1,
        "repetition_penalty": 1.3,
    }  # fmt: skip


def test_sampling_settings_a_model_declares_do_not_count(model):
    expected = sample(model, TOKENIZER, PROMPTS, Sampling(8), seed=3)
    model.generation_config.update(repetition_penalty=5.0, temperature=0.01, top_k=1, top_p=0.01)
    assert sample(model, TOKENIZER, PROMPTS, Sampling(8), seed=3) == expected


def test_success_over_questions():
    rollouts = [[5, EOS], [5, 5, 5], [EOS], [7, EOS], [5, 5, 5], [5, 7]]
    result = success([1.0, 0.0, 1.0, 1.0, 0.0, 0.0], rollouts, 2, [EOS, 7])
    assert (result.questions, result.samples) == (3, 2)
    assert result.mean == pytest.approx(0.5)
    assert result.truncated == pytest.approx(2 / 6)  # 7 is an end token too
    assert result.mean_length == pytest.approx(13 / 6)
    # Over questions, whose rates are 0.5, 1 and 0.
    assert (result.low, result.high) == interval([0.5, 1.0, 0.0], 2)
    assert str(result) == f"0.500 [{result.low:.3f}, {result.high:.3f}]"
    unsure = success([1.0, None, 0.0], [[EOS], [], [5]], 1, [EOS])
    assert (unsure.mean, unsure.truncated) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert (unsure.low, unsure.high) == (interval([1.0, 0.0, 0.0])[0], interval([1.0, 1.0, 0.0])[1])


def test_more_questions_narrow_the_interval_and_more_samples_of_the_same_do_not():
    def width(questions: int, samples: int) -> float:
        rewards = [float(q % 4 == 0) for q in range(questions) for _ in range(samples)]
        result = success(rewards, [[EOS]] * len(rewards), samples, [EOS])
        assert result.low < result.mean < result.high
        assert result.mean == pytest.approx(0.25)
        return result.high - result.low

    narrow = width(400, 1)
    assert narrow == pytest.approx(2 * 1.96 * (0.25 * 0.75 / 400) ** 0.5, rel=0.1)  # the normal approximation
    assert width(40, 1) > 2.5 * narrow
    assert width(400, 5) == pytest.approx(narrow)  # five copies of an answer are not five answers


def recorder(calls: list[dict]):
    def reward(**kwargs):
        calls.append(kwargs)
        return [float(i) for i in range(len(kwargs["completions"]))]

    return reward


def test_score_calls_the_reward_function_as_trl_does():
    calls: list[dict] = []
    rollouts = [TOKENIZER("12#3$")["input_ids"], TOKENIZER("4")["input_ids"]]
    text = [{"prompt": "1+2=", "answer": "3"}, {"prompt": "2+2=", "answer": "4"}]
    chat = [{"prompt": [{"role": "user", "content": q["prompt"]}], "answer": q["answer"]} for q in text]
    assert score(TOKENIZER, text, rollouts, recorder(calls)) == [0.0, 1.0]
    assert score(TOKENIZER, chat, rollouts, recorder(calls)) == [0.0, 1.0]
    for call, questions in zip(calls, (text, chat), strict=True):
        assert call["answer"] == ["3", "4"]
        assert call["prompts"] == [q["prompt"] for q in questions]
        assert call["completion_ids"] == rollouts
    assert calls[0]["completions"] == ["12#3", "4"]  # without the special tokens
    assert calls[1]["completions"] == [[{"role": "assistant", "content": t}] for t in ("12#3", "4")]


def test_score_passes_every_column_and_takes_no_questions():
    seen = {}

    def reward(completions, tests, **columns):
        seen.update(columns, tests=tests)
        return [1.0] * len(completions)

    question = {"prompt": "1+2=", "answer": "3", "tests": "assert", "completions": "mine", "prompts": 1, "log_extra": 2}
    assert score(TOKENIZER, [question], [[2]], reward) == [1.0]
    assert seen["tests"] == ["assert"] and seen["answer"] == ["3"]
    assert seen["prompts"] == ["1+2="] and "log_extra" not in seen  # the data's columns of such names are left out
    assert score(TOKENIZER, [], [], reward) == []
