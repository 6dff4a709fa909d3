"""What counts as a success, what a rollout without a verdict is, and what the teacher is told of them."""

import pytest
import torch
from tiny_runs import QUESTIONS, TOKENIZER, Recorder, make, qwen3
from transformers import GPT2Config, GPT2LMHeadModel

from hsd.hindsight.groups import Group, Rollout, members
from hsd.tasks.task import success_of
from hsd.train.callbacks import load_metrics


def run(tmp_path, reward, model=None, **options):
    trainer = make(model or qwen3(), tmp_path, reward=reward, **options)
    trainer.train()
    return trainer


def every_other(value, other):
    return lambda completion_ids, **_: [value if i % 2 else other for i in range(len(completion_ids))]


@pytest.mark.parametrize("threshold", [0.9, 0.7, 0.95])
def test_fp32_rewards_reach_their_own_threshold(threshold, tmp_path):
    trainer = run(tmp_path, every_other(threshold, 0.0), success_reward=threshold)
    assert trainer.batches[0]["success"].tolist() == [False, True] * 4


def test_rounding_is_all_that_is_forgiven():
    group = Group("q", "a", tuple(Rollout((1,), r) for r in (0.99999994, 0.9999, 1.0, 0.0)))
    assert group.successes == [0, 2] and group.failures == [1, 3]


def test_an_evaluation_forgives_as_much():
    unsure = success_of([lambda **columns: [0.99999994, 0.9999]])
    assert unsure() == [1.0, 0.0]


def test_a_rollout_without_a_verdict_is_no_success_at_any_threshold(tmp_path):
    unsure = lambda completion_ids, **_: [None if i % 4 == 0 else -1.0 for i in range(len(completion_ids))]  # noqa: E731
    trainer = run(tmp_path, unsure, success_reward=0.0)
    assert not trainer.batches[0]["success"].any()
    assert trainer.state.log_history[0]["hsd/failing_with_peer"] == 0.0


@pytest.mark.parametrize("unsure", [None, 0.0])
def test_only_a_verdict_gives_an_advantage_of_the_methods_own(unsure, tmp_path):
    """EGRSD's advantages are not GRPO's, in which the trainer leaves such a rollout out."""
    reward = lambda completion_ids, **_: [unsure if i == 1 else float(i % 2) for i in range(len(completion_ids))]  # noqa: E731
    (batch,) = run(tmp_path, reward, method="egrsd", prefix_sharing="none").batches
    assert batch["scored"].tolist() == [i != 1 or unsure is not None for i in range(8)]
    assert ((batch["advantages"] != 0) == batch["scored"]).all()
    assert batch["group_success"][0].item() == pytest.approx(1 / 3 if unsure is None else 1 / 4)


@pytest.mark.parametrize("verdict", [None, 0.0])
def test_what_was_not_measured_is_in_no_log_and_no_file(verdict, tmp_path):
    trainer = run(tmp_path, every_other(verdict, verdict))
    row = trainer.state.log_history[0]
    assert all(value is not None and value == value for value in row.values())
    assert not {"hsd/tau", "hsd/credit_at_tau", "hsd/credit_mass_8"} & row.keys()  # no rollout has a peer
    scored = {"hsd/success_rate", "hsd/failing_with_peer", "rewards/<lambda>/mean"}
    assert scored & row.keys() == (set() if verdict is None else scored)
    (written,) = load_metrics(tmp_path / "metrics.jsonl")
    alarm = written.pop("alarms", {})
    assert written == row and alarm.keys() == ({"no verdict"} if verdict is None else set())


def test_a_blank_or_missing_answer_is_not_shown(tmp_path):
    rows = [{**q, "answer": a} for q, a in zip(QUESTIONS, [None, " ", "7"] * 2, strict=True)]
    # Nobody succeeds, so that there is nothing but the answer to show.
    trainer = run(tmp_path, every_other(0.0, 0.0), questions=rows, max_steps=3)
    for batch in trainer.batches:
        asked, taught = (TOKENIZER.batch_decode(batch[f"{k}prompt_ids"], True) for k in ("", "teacher_"))
        assert [a != t for a, t in zip(asked, taught, strict=True)] == batch["has_context"].tolist()
    assert {s for batch in trainer.batches for s in batch["has_context"].tolist()} == {True, False}


def test_feedback_is_one_text_a_completion(tmp_path):
    with pytest.raises(ValueError, match=r"^feedback_fn: expected 8 texts, one a completion, got 1"):
        run(tmp_path, every_other(1.0, 0.0), method="sdpo", feedback_fn=lambda **_: ["wrong"])


def test_the_perplexity_of_a_truncated_rollout_counts_its_tokens(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("hsd.train.trainer.members", _spy(seen))
    for masked in (False, True):
        run(
            tmp_path,
            every_other(1.0, 0.0),
            peer_rule="lowest_perplexity",
            mask_truncated_completions=masked,
            reference_coef=0.0,
        )
    plain, masked = ([r.mean_logp for r in rollouts] for rollouts in seen)
    assert masked == pytest.approx(plain) and all(logp < 0.0 for logp in masked)


def _spy(seen):
    def spy(rows, rollouts, **kwargs):
        seen.append(rollouts)
        return members(rows, rollouts, **kwargs)

    return spy


def test_a_schedule_may_start_at_zero(tmp_path):
    for options in ({"method": "opsd", "divergence_coef": [0.0, 1.0, 2]}, {"method": "rlsd", "policy_coef": [0, 1, 2]}):
        trainer = run(tmp_path, every_other(1.0, 0.0), max_steps=2, **options)
        norms = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
        assert norms[0] == 0.0 < norms[1]


def test_the_first_update_after_sampling_has_ratio_one_for_absolute_positions_too(tmp_path):
    """TRL's own log-probs of left-padded prompts would be 2 to 6 nats away for this model."""
    torch.manual_seed(0)
    sizes = {"n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
    tokens = {f"{name}_token_id": TOKENIZER.eos_token_id for name in ("eos", "bos", "pad")}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(TOKENIZER), **sizes, **tokens))
    model.eval()
    ratios = []

    class Watch(Recorder):
        def _hsd_loss(self, policy, inputs):
            def spied(policy, batch, objective, whole=self.micro_batch_loss):
                out = whole(policy, batch, objective)
                gap = (out.stats.student_logps - batch.old_logps) * batch.loss_mask
                ratios.append(gap.abs().max().item())
                return out

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(self, "micro_batch_loss", spied)
                return super()._hsd_loss(policy, inputs)

    rows = [{**q, "prompt": q["prompt"] if i % 2 else "1+1="} for i, q in enumerate(QUESTIONS)]
    dropout = {f"{name}_pdrop": 0.0 for name in ("resid", "embd", "attn")}
    for name, value in dropout.items():
        setattr(model.config, name, value)
    run(
        tmp_path,
        every_other(1.0, 0.0),
        model=GPT2LMHeadModel(model.config),
        questions=rows,
        cls=Watch,
        num_iterations=2,
        max_steps=2,
        policy_coef=1.0,
        per_device_train_batch_size=16,
        learning_rate=0.01,
    )
    assert ratios[0] < 1e-4 < ratios[1]
