"""HSD's contexts inside a real SDPOTrainer step."""

import pytest
import torch
from datasets import Dataset
from tiny_runs import QUIET, TEMPLATE, TOKENIZER, half
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

from hsd.adapters.trl import patch_trl
from hsd.adapters.trl_context import PeerAndAnswer
from hsd.hindsight.groups import Group, Rollout
from hsd.hindsight.peers import choose_peers, peer_rng
from hsd.tasks import small_world

QUESTIONS = small_world.make_questions(2, seed=0)
SETTINGS = QUIET | {
    "max_steps": 1,
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 6,
    "distillation_mode": "full_logits",
    "teacher_model_kind": "live",
    "optim": "sgd",
    "learning_rate": 0.1,
}


def trainer_for(model, tmp_path, reward=None, **options):
    return SDPOTrainer(
        model,
        reward_funcs=reward or half,
        args=SDPOConfig(output_dir=str(tmp_path), **SETTINGS | options),
        train_dataset=Dataset.from_list(
            [{"prompt": q["prompt"], "privileged_context": q["answer"]} for q in QUESTIONS]
        ),
        processing_class=TOKENIZER,
    )


class Recorder(PeerAndAnswer):
    def build(self, output, prompts, rewards, feedbacks=None):
        self.seen = (output, prompts, rewards, feedbacks)
        self.built = super().build(output, prompts, rewards, feedbacks)
        return self.built


def contexts(builder):
    """The teacher prompts as text, without padding."""
    ids, mask = builder.built["teacher_input_ids"], builder.built["teacher_attention_mask"]
    width = ids.shape[1] - builder.seen[0]["completion_ids"].shape[1]
    return [TOKENIZER.decode(row[:width][m[:width].bool()]).replace(" ", "") for row, m in zip(ids, mask, strict=True)]


def test_every_rollout_sees_its_drawn_peer_and_the_answer(build, tmp_path):
    trainer = trainer_for(build(scale=1.0), tmp_path)
    trainer.teacher_context_builder = builder = Recorder(trainer, template=TEMPLATE)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    with patch_trl():
        trainer.train()
    assert any((p - before[n]).abs().max() > 0 for n, p in trainer.model.named_parameters())

    output, prompts, rewards, answers = builder.seen
    lengths = output["raw_completion_lengths"].tolist()
    rollouts = [
        Rollout(tuple(ids[:n].tolist()), reward=r)
        for ids, n, r in zip(output["completion_ids"], lengths, rewards.tolist(), strict=True)
    ]
    assert 0 < sum(rewards.tolist()) < 8
    expected = []
    for g in range(2):
        group = Group(prompts[4 * g], answers[4 * g], tuple(rollouts[4 * g : 4 * g + 4]))
        for i, peer in enumerate(choose_peers(group, "uniform", rng=peer_rng(trainer.args.seed, 0, g))):
            text = None if peer is None else TOKENIZER.decode(group.rollouts[peer].token_ids, skip_special_tokens=True)
            shown = f"[{group.answer}]" if not text else f"[{group.answer}|{text}]"
            expected.append(prompts[4 * g + i] + shown)
    assert contexts(builder) == expected
    assert builder.built["self_distillation_mask"].tolist() == [1.0] * 8
    width = output["completion_ids"].shape[1]
    assert torch.equal(builder.built["teacher_input_ids"][:, -width:], output["completion_ids"])


def test_no_success_means_the_answer_alone(build, tmp_path):
    trainer = trainer_for(build(scale=1.0), tmp_path, reward=lambda completion_ids, **_: [0.0] * len(completion_ids))
    trainer.teacher_context_builder = builder = Recorder(trainer, template=TEMPLATE)
    trainer.train()
    _, prompts, _, answers = builder.seen
    assert contexts(builder) == [f"{q}[{a}]" for q, a in zip(prompts, answers, strict=True)]
    assert builder.last_metrics["self_distillation/success_group_fraction"] == 0.0
    name = "self_distillation/distillation_loss"
    logged = [entry[name] for entry in trainer.state.log_history if name in entry]
    assert logged and logged[0] > 0  # TRL's own builder masks all of these out


def test_fp32_rewards_reach_their_own_threshold(build, tmp_path):
    reward = lambda completion_ids, **_: [0.9 * (i % 2) for i in range(len(completion_ids))]  # noqa: E731
    trainer = trainer_for(build(scale=1.0), tmp_path, reward=reward, success_reward_threshold=0.9)
    trainer.teacher_context_builder = builder = Recorder(trainer, template=TEMPLATE)
    trainer.train()
    assert builder.last_metrics["self_distillation/success_group_fraction"] == 1.0
    assert builder.last_metrics["self_distillation/success_sample_fraction"] > 0.0


def test_what_it_refuses(build, tmp_path):
    trainer = trainer_for(build(), tmp_path)
    with pytest.raises(ValueError, match=r"^rule: expected one of .* got 'lowest_perplexity'"):
        PeerAndAnswer(trainer, "lowest_perplexity")
    with pytest.raises(TypeError, match=r"^privileged_context: expected the answer"):
        PeerAndAnswer(trainer).build({}, ["1+1="], torch.zeros(1), [None])
