"""Two gloo ranks under DDP against one process: the same contexts and, within fp32 rounding, gradients.

FSDP2 as accelerate sets it up, and DeepSpeed, are in test_engines.py.
"""

from pathlib import Path

import pytest
import torch
from rank_runs import QUESTIONS, SIZE, assert_same, joined, launch, load, one_process, saved
from tiny_runs import STEP, TOKENIZER, half

from hsd.hindsight.groups import Group, Rollout
from hsd.hindsight.peers import choose_peers, peer_rng
from hsd.train.callbacks import load_metrics

PATH = Path(__file__).with_name("job.py")
job = load(PATH)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    folder = tmp_path_factory.mktemp("two_ranks")
    launch(PATH, [folder], folder, seconds=400)
    return folder


def test_moments_and_the_maximum_are_those_of_all_ranks(folder):
    ranks = saved(folder, "ddp-egrsd")
    batch = joined([b for rank in ranks for b in rank["batches"]])
    length = batch["completion_mask"].sum(-1)
    reward = batch["success"] * (1.0 + 0.5 * (1.0 - length / STEP["max_completion_length"]))
    expected = (reward - reward.mean()) / reward.std(correction=0)
    torch.testing.assert_close(batch["advantages"], expected, rtol=1e-4, atol=1e-5)
    assert batch["column/most_entropy"] >= 1.0


@pytest.mark.parametrize("name", job.DDP)
def test_ddp_gives_the_gradients_of_one_process(name, folder, tmp_path):
    ranks = saved(folder, f"ddp-{name}")
    batch = joined([b for rank in ranks for b in rank["batches"]])
    rows, options = job.DDP[name]
    assert len(batch["completion_ids"]) == 2 * rows * options.get("gradient_accumulation_steps", 1)
    loss, expected = one_process(tmp_path, batch, options)
    for rank in ranks:
        assert rank["loss"] == pytest.approx(loss, rel=1e-4)
        assert_same(rank["gradient"], expected)


@pytest.mark.parametrize("name", [name for name, (_, options) in job.DDP.items() if "method" not in options])
def test_contexts_are_those_of_whole_groups(name, folder):
    """Each rollout's privileged context, recomputed from all ranks' rollouts; some peers come from the other rank."""
    ranks = saved(folder, f"ddp-{name}")
    answers = {q["prompt"]: q["answer"] for q in QUESTIONS}
    options = job.DDP[name][1]
    batch = joined([b for rank in ranks for b in rank["batches"]])
    rows = len(batch["questions"]) // 2
    rule = "uniform" if options.get("prefix_sharing") == "none" else "paired"
    rollouts = [
        ids[m.bool()].tolist() for ids, m in zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    ]
    rewards = half(rollouts)
    assert len({tuple(ids) for ids in rollouts}) == len(rollouts)  # ranks sample with seeds of their own
    assert batch["success"].tolist() == [r == 1.0 for r in rewards]
    peers = across = 0
    for g in range(len(rollouts) // SIZE):
        members = range(g * SIZE, (g + 1) * SIZE)
        question = batch["questions"][members[0]]
        assert {batch["questions"][i] for i in members} == {question}
        group = Group(question, answers[question], tuple(Rollout(tuple(rollouts[i]), rewards[i]) for i in members))
        for i, peer in zip(members, choose_peers(group, rule, rng=peer_rng(42, 0, g)), strict=True):
            context = f"[{answers[question]}]"
            shown = None if peer is None else TOKENIZER.decode(rollouts[members[peer]], skip_special_tokens=True)
            if shown:  # a peer that is only an end token shows nothing
                context = f"[{answers[question]}|{shown}]"
                peers += 1
                across += i // rows != members[peer] // rows
            ids = batch["teacher_prompt_ids"][i]
            assert TOKENIZER.decode(ids, skip_special_tokens=True) == question + context
    assert peers >= 2
    if name.startswith("split"):
        assert across >= 1


def test_a_signal_to_one_rank_stops_both_and_the_run_resumes_exactly(folder):
    for rank in saved(folder, "interrupted"):
        assert rank["stopped_at"] == 2
        for whole, parts in zip(rank["whole"], rank["parts"], strict=True):
            assert all(torch.equal(whole[n], parts[n]) for n in whole)


def test_rollouts_of_a_group_that_two_ranks_share_are_one_file(folder):
    written = [load_metrics(folder / run / "rollouts.jsonl") for run in ("whole", "parts")]
    places = [(row["step"], row["group"], row["rollout"]) for row in written[0]]
    assert places == [(step, 0, i) for step in range(1, 5) for i in range(SIZE)] and written[0] == written[1]
