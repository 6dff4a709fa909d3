"""HSDTrainer with the tree on takes the step it takes without, keeps groups together, and resumes exactly."""

import copy
import dataclasses
import random
from collections import Counter

import pytest
import torch
from datasets import Dataset
from tiny_runs import ACCUMULATED, CHECKPOINTED, LORA, STEP, TOKENIZER, half, qwen3, start_adapters
from transformers import Qwen3ForCausalLM

from hsd.hindsight.context import ContextTemplate
from hsd.hindsight.groups import Group, Rollout
from hsd.hindsight.peers import choose_peers
from hsd.policy.forward import Prompts
from hsd.policy.tree.batch import pays, token_lists, tree_of
from hsd.tasks import small_world
from hsd.train.batch import shuffle_groups, unpack
from hsd.train.config import HSDConfig
from hsd.train.micro_batch import MicroBatchLoss
from hsd.train.trainer import HSDTrainer

QUESTIONS = small_world.make_questions(6, seed=0)


class Counting(MicroBatchLoss):
    """Counts which way each micro-batch went."""

    def _one_by_one(self, *args):
        vars(self)["ways"]["unshared"] += 1
        return super()._one_by_one(*args)

    def _through(self, *args):
        vars(self)["ways"]["shared"] += 1
        return super()._through(*args)

    def _in_chunks(self, *args):
        vars(self)["ways"]["chunks"] += 1
        return super()._in_chunks(*args)


class Recorder(HSDTrainer):
    """Keeps generated batches, micro-batches, and which way each went."""

    def __init__(self, *args, **kwargs):
        self.batches, self.micro, self.ways = [], [], Counter()
        super().__init__(*args, **kwargs)
        self.micro_batch_loss = Counting(**vars(self.micro_batch_loss))
        vars(self.micro_batch_loss)["ways"] = self.ways

    def _generate_and_score_completions(self, inputs):
        self.batches.append(super()._generate_and_score_completions(inputs))
        return self.batches[-1]

    def _hsd_loss(self, policy, batch):
        self.micro.append(batch)
        return super()._hsd_loss(policy, batch)


def make(tmp_path, model=None, peft_config=None, **kwargs):
    return Recorder(
        model=qwen3() if model is None else model,
        reward_funcs=half,
        args=HSDConfig(str(tmp_path), **STEP | kwargs),
        train_dataset=Dataset.from_list(QUESTIONS),
        processing_class=TOKENIZER,
        context_template=ContextTemplate(small_world.WITH_PEER, small_world.ANSWER_ONLY),
        peft_config=peft_config,
    )


def step(tmp_path, **options):
    """Trained parameters before and after, the logged row, and the trainer."""
    trainer = make(tmp_path, peer_rule="paired", **options)
    start_adapters(trainer.model)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    after = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    return before, after, next(row for row in trainer.state.log_history if "loss" in row), trainer


@pytest.fixture(
    scope="module",
    params=[
        {"teacher": "live", "reference_coef": 0.5, **ACCUMULATED, **CHECKPOINTED},
        {"teacher": "fixed", "reference_coef": 0.5},
        {"teacher": "ema", "reference_coef": 0.0, **ACCUMULATED},
        {"teacher": "fixed", "reference_coef": 0.5, "peft_config": LORA, **CHECKPOINTED},
        {"teacher": "live", "reference_coef": 0.0, "peft_config": LORA},
    ],
    ids=["live+reference", "fixed+reference", "ema", "lora+fixed+reference", "lora+live"],
)
def unshared(request, tmp_path_factory):
    """Options, and the `step` that they take without sharing."""
    return request.param, step(tmp_path_factory.mktemp("none"), prefix_sharing="none", **request.param)


@pytest.mark.parametrize(
    ("sharing", "way"),
    [
        ({"prefix_sharing": "tree"}, "shared"),
        ({"prefix_sharing": "prompt"}, "shared"),
        ({"prefix_sharing": "tree", "tree_token_budget": 30}, "chunks"),
    ],
    ids=["tree", "prompt", "two-phase"],
)
def test_the_same_step_as_without(unshared, sharing, way, tmp_path):
    options, (before, expected, row, _) = unshared
    start, got, logged, trainer = step(tmp_path, **sharing, **options)
    assert set(trainer.ways) == {way}
    scale = max((expected[n] - before[n]).abs().max() for n in before).item()
    assert scale > 1e-4
    for name in before:
        assert torch.equal(start[name], before[name])
        torch.testing.assert_close(
            got[name] - before[name], expected[name] - before[name], rtol=2e-3, atol=2e-5 * scale
        )
    for name, value in row.items():
        if name == "loss" or name.startswith("hsd/"):
            assert logged[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_bf16(tmp_path):
    _, _, row, _ = step(tmp_path / "none", prefix_sharing="none", bf16=True)
    _, _, logged, trainer = step(tmp_path / "tree", prefix_sharing="tree", bf16=True)
    assert set(trainer.ways) == {"shared"}
    assert logged["loss"] == pytest.approx(row["loss"], rel=0.05)


def test_auto_shares_where_it_pays_and_draws_paired_peers(tmp_path):
    trainer = make(tmp_path, max_steps=2)
    assert (trainer.prefix_sharing, trainer.peer_rule) == ("tree", "paired")
    trainer.train()
    assert trainer.ways["shared"] == 2
    for batch in trainer.batches:
        contexts = token_lists(batch["teacher_prompt_ids"], batch["teacher_prompt_mask"])
        for g in range(0, 8, 4):  # one or two peers, and the fallback without one
            assert len({tuple(c) for c in contexts[g : g + 4]}) <= 2 + (not batch["success"][g : g + 4].all())
    batch = trainer.batches[0]
    inputs = unpack(batch).inputs
    assert pays(tree_of(inputs, "tree"), inputs, live_teacher=True)
    alone = inputs.rows([0])
    bare = {who: Prompts(p.ids[:, :0], p.mask[:, :0]) for who, p in alone.prompts.items()}
    assert not pays(tree_of(alone, "prompt"), dataclasses.replace(alone, prompts=bare), live_teacher=True)
    assert make(tmp_path, prefix_sharing="none").peer_rule == "uniform"
    assert make(tmp_path, peer_rule="uniform").peer_rule == "uniform"
    # A budget asks for the tree also where it saves less.
    assert make(tmp_path, tree_token_budget=30).micro_batch_loss.always and not trainer.micro_batch_loss.always


def test_auto_falls_back_once_and_loudly_and_an_explicit_choice_raises(tmp_path):
    with pytest.warns(UserWarning, match="prefix sharing is off.*attention_dropout=0.5") as caught:
        trainer = make(tmp_path, model=qwen3(attention_dropout=0.5))
        trainer.train()
    assert len([w for w in caught if "prefix sharing" in str(w.message)]) == 1
    assert (trainer.prefix_sharing, trainer.peer_rule, set(trainer.ways)) == ("none", "uniform", {"unshared"})
    with pytest.raises(ValueError, match=r"prefix_sharing.*attention_dropout"):
        make(tmp_path, model=qwen3(attention_dropout=0.5), prefix_sharing="tree")
    with pytest.raises(ValueError, match=r"prefix_sharing.*neftune_noise_alpha=5"):
        make(tmp_path, neftune_noise_alpha=5.0, prefix_sharing="tree")
    with pytest.raises(ValueError, match="prefix_sharing"):
        make(tmp_path, prefix_sharing="forest")
    with pytest.raises(ValueError, match="tree_token_budget"):
        make(tmp_path, tree_token_budget=0)


def test_groups_stay_together_in_micro_batches(tmp_path):
    """TRL shuffles rows, which leaves about one row of a group in each of four micro-batches."""
    options = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 4, "max_steps": 2}

    def questions_per_micro_batch(**sharing):
        trainer = make(tmp_path, **options, **sharing)
        trainer.train()
        sizes = [len({tuple(p) for p in token_lists(b["prompt_ids"], b["prompt_mask"])}) for b in trainer.micro]
        seen = [p for b in trainer.micro for p in token_lists(b["completion_ids"], b["completion_mask"])]
        made = [p for b in trainer.batches for p in token_lists(b["completion_ids"], b["completion_mask"])]
        assert sorted(seen) == sorted(made)  # each rollout once
        return sizes

    assert questions_per_micro_batch(prefix_sharing="tree") == [1] * 8
    assert max(questions_per_micro_batch(prefix_sharing="none")) > 1


def test_the_first_steps_are_those_of_a_run_without(tmp_path):
    """The tree draws no more and no fewer random numbers: questions, rollouts and peers are the same."""
    losses = []
    for sharing in ("none", "tree"):
        trainer = make(tmp_path / sharing, prefix_sharing=sharing, peer_rule="paired", max_steps=3, learning_rate=1e-3)
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(set(losses[0])) == 3


def test_shuffle_groups():
    torch.manual_seed(0)
    rows = torch.arange(12)
    batch = {
        "completion_ids": rows[:, None],
        "names": [str(i) for i in range(12)],
        "count": torch.tensor(3),
        "no": None,
    }
    orders = set()
    for _ in range(50):
        out = shuffle_groups(batch, 4)
        ids = out["completion_ids"].flatten().tolist()
        assert out["names"] == [str(i) for i in ids] and out["count"] == 3 and out["no"] is None
        assert all(ids[g : g + 4] == list(range(ids[g], ids[g] + 4)) for g in (0, 4, 8))
        orders.add(tuple(ids))
    assert len(orders) == 6
    assert shuffle_groups(batch, 5)["completion_ids"].flatten().tolist() == rows.tolist()


@pytest.mark.parametrize("budget", [None, 30])
def test_resume_continues_exactly(budget, tmp_path):
    options = {
        "teacher": "ema",
        "teacher_ema_rate": 0.5,
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 2,
        "prefix_sharing": "tree",
        "tree_token_budget": budget,
        **ACCUMULATED,
    }
    whole = make(tmp_path / "whole", max_steps=4, **options)
    whole.train()
    make(tmp_path / "parts", max_steps=2, **options).train()
    second = make(tmp_path / "parts", max_steps=4, **options)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    assert set(second.ways) == {"shared" if budget is None else "chunks"}
    for mine, theirs in zip(whole.batches[2:], second.batches, strict=True):
        assert torch.equal(mine["teacher_prompt_ids"], theirs["teacher_prompt_ids"])
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_saved_model_does_not_know_of_the_tree(tmp_path):
    trainer = make(tmp_path, save_strategy="steps", save_steps=1)
    trainer.train()
    loaded = Qwen3ForCausalLM.from_pretrained(tmp_path / "checkpoint-1")
    assert loaded.config._attn_implementation == "sdpa"
    assert "hsd_tree" not in (tmp_path / "checkpoint-1" / "config.json").read_text()


def test_masked_rollouts_and_a_batch_of_nothing_but_them(tmp_path):
    """``mask_truncated_completions`` masks whole rollouts; they count as rollouts of loss 0."""
    options = {"mask_truncated_completions": True, "teacher": "live", "max_completion_length": 4}
    _, expected, row, _ = step(tmp_path / "none", prefix_sharing="none", **options)
    _, got, logged, trainer = step(tmp_path / "tree", prefix_sharing="tree", **options)
    lengths = trainer.batches[0]["completion_mask"].sum(1)
    assert (lengths == 0).any()
    assert logged["loss"] == pytest.approx(row["loss"], rel=1e-4, abs=1e-7)
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-3, atol=1e-5)
    batch = copy.copy(trainer.batches[0])
    batch["completion_mask"] = torch.zeros_like(batch["completion_mask"])
    passes = trainer.micro_batch_loss.passes(unpack(batch), trainer.args.objective(1))
    assert trainer.micro_batch_loss.tree(passes) is None


def test_the_paired_draw_keeps_the_marginals_and_needs_two_contexts():
    """Each rollout's peer stays uniform over the other successes: 4,000 draws, within 5 standard deviations."""
    rewards = (1.0, 0.0, 1.0, 1.0, 0.0, 1.0)
    group = Group("q", "a", tuple(Rollout((i + 1,), reward=r) for i, r in enumerate(rewards)))
    counts = [Counter() for _ in rewards]
    rng, draws = random.Random(0), 4000
    for _ in range(draws):
        peers = choose_peers(group, "paired", rng=rng)
        assert len(set(peers)) <= 2
        for i, peer in enumerate(peers):
            counts[i][peer] += 1
    for i, seen in enumerate(counts):
        assert sorted(seen) == group.success_peers(i)
        p = 1 / len(seen)
        for n in seen.values():
            assert abs(n - draws * p) < 5 * (draws * p * (1 - p)) ** 0.5
