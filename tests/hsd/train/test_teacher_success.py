"""Replies sampled from the teacher's contexts, and the seconds of a step by part."""

import time

import pytest
import torch
from tiny_runs import LORA, QUESTIONS, TOKENIZER, make, qwen3

from hsd.train.config import HSDConfig
from hsd.train.step_time import StepTime


def row(trainer):
    trainer.train()
    return next(r for r in trainer.state.log_history if "loss" in r)


def logged(folder, **options):
    return row(make(qwen3(), folder, **options))


def seen(found):
    """A reward that keeps what it is asked about: rollouts first, then the teacher's replies."""

    def reward(completions, completion_ids, answer, **kwargs):
        found.append((list(completions), [list(ids) for ids in completion_ids], list(answer)))
        return [float(sum(ids[:2]) % 2) for ids in completion_ids]

    return reward


def test_the_share_is_that_of_the_replies_to_the_teachers_prompts(tmp_path):
    found = []
    trainer = make(qwen3(), tmp_path, reward=seen(found), teacher_success_every=1)
    logs = row(trainer)
    (_, rollouts, answers), (_, replies, same) = found
    assert answers == same and len(replies) == len(rollouts) and replies != rollouts
    expected = sum(sum(ids[:2]) % 2 for ids in replies) / len(replies)
    assert logs["hsd/teacher_success"] == pytest.approx(expected)


@pytest.mark.parametrize("every, steps, measured", [(1, 3, [1, 2, 3]), (2, 3, [1, 3]), (5, 3, [1]), (None, 2, [])])
def test_it_is_measured_every_so_many_steps_from_the_first_on(tmp_path, every, steps, measured):
    trainer = make(qwen3(), tmp_path, teacher_success_every=every, max_steps=steps, learning_rate=1e-3)
    trainer.train()
    rows = [r for r in trainer.state.log_history if "loss" in r]
    assert [i for i, r in enumerate(rows, 1) if "hsd/teacher_success" in r] == measured


def test_without_a_context_nothing_is_measured(tmp_path):
    failing = lambda completion_ids, **_: [0.0] * len(completion_ids)  # noqa: E731
    trainer = make(qwen3(), tmp_path, reward=failing, teacher_success_every=1, fallback="mask")
    assert "hsd/teacher_success" not in row(trainer)


@pytest.mark.parametrize(("reward", "share"), [(0.99999994, 1.0), (0.9999, 0.0)])
def test_a_success_is_what_the_rollouts_one_is(reward, share, tmp_path):
    """But for fp32's rounding, as in `Group.accepts`."""
    constant = lambda completion_ids, **kwargs: [reward] * len(completion_ids)  # noqa: E731
    trainer = make(qwen3(), tmp_path, reward=constant, teacher_success_every=1)
    trainer.train()
    (logs,) = (row for row in trainer.state.log_history if "loss" in row)
    assert logs["hsd/teacher_success"] == logs["hsd/success_rate"] == share


def test_it_changes_nothing_else_about_a_run(tmp_path):
    with_it, without = (logged(tmp_path / str(e), teacher_success_every=e, max_steps=2) for e in (1, None))
    same = lambda r: {k: v for k, v in r.items() if "time" not in k and k != "hsd/teacher_success"}  # noqa: E731
    assert same(with_it) == pytest.approx(same(without), nan_ok=True)


@pytest.mark.parametrize("teacher", ["live", "fixed", "ema", "copy"])
@pytest.mark.parametrize("peft", [False, True])
def test_the_sampler_has_the_teachers_weights(tmp_path, teacher, peft):
    options = {"peft_config": LORA} if peft else {}
    trainer = make(qwen3(), tmp_path, teacher=teacher, teacher_copy_steps=50, learning_rate=1.0, max_steps=1, **options)
    policy = trainer.accelerator.unwrap_model(trainer.model)
    ids = torch.tensor([TOKENIZER(QUESTIONS[0]["prompt"])["input_ids"]])

    def logits(model):
        model.eval()
        with torch.no_grad():
            return model(ids).logits

    before = logits(policy)
    trainer.train()
    after = logits(policy)
    assert not torch.allclose(before, after, atol=1e-4)
    with trainer.frozen.sampler(policy) as model:
        sampled = logits(model)
    if teacher == "ema":
        assert not torch.allclose(sampled, after, atol=1e-4)
    else:
        torch.testing.assert_close(sampled, after if teacher == "live" else before)
    torch.testing.assert_close(logits(policy), after)


@pytest.mark.parametrize(
    "options, why",
    [
        ({"method": "grpo"}, "which has no teacher"),
        ({"teacher": "trust_region"}, "two models"),
        ({"every": 0}, r"\[1, inf\)"),
    ],
)
def test_what_cannot_be_sampled_is_refused(tmp_path, options, why):
    options = {"every": 1, **options}
    with pytest.raises(ValueError, match=f"teacher_success_every: .*{why}"):
        HSDConfig(str(tmp_path), teacher_success_every=options.pop("every"), use_cpu=True, bf16=False, **options)


def test_a_step_logs_its_parts(tmp_path):
    logs = logged(tmp_path, teacher_success_every=1)
    parts = {k: v for k, v in logs.items() if k.startswith("time/") and k.endswith("_s") and "per" not in k}
    names = ("sampling", "teacher_success", "rewards", "update", "optimizer")
    assert set(parts) == {f"time/{name}_s" for name in names}
    inside = sum(v for k, v in parts.items() if k != "time/optimizer_s")
    assert inside == pytest.approx(logs["step_time"], rel=0.05, abs=0.05)
    assert logs["time/sampled_tokens_per_s"] > 0


def test_a_part_inside_another_counts_once():
    clock = StepTime()
    with clock.part("update"), clock.part("sampling"):
        time.sleep(0.02)
    clock.tokens = 10
    found = clock.take()
    assert found["sampling_s"] >= 0.02 > found["update_s"]
    assert found["sampled_tokens_per_s"] == 10 / found["sampling_s"]
    assert clock.take() == {}
