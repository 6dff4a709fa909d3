"""Two gloo ranks, DDP and raw FSDP2, against one process: the same contexts and, within fp32 rounding, gradients.

Not covered, because it needs GPUs: FSDP2 as accelerate sets it up, DeepSpeed, vLLM (docs/cluster.md).
"""

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from hsd.hindsight.groups import Group, Rollout
from hsd.hindsight.peers import choose_peers, peer_rng

PATH = Path(__file__).with_name("job.py")
spec = importlib.util.spec_from_file_location("hsd_two_rank_job", PATH)
assert spec is not None and spec.loader is not None
job = importlib.util.module_from_spec(spec)
spec.loader.exec_module(job)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    folder = tmp_path_factory.mktemp("two_ranks")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = f"{PATH.parents[3]}{os.pathsep}{PATH.parents[2]}"
    ranks = []
    for rank in ("0", "1"):
        with (folder / f"log{rank}").open("w") as log:
            ids = {"RANK": rank, "LOCAL_RANK": rank}
            command = [sys.executable, str(PATH), str(folder)]
            ranks.append(subprocess.Popen(command, env=env | ids, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=400) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    logs = "\n".join((folder / f"log{rank}").read_text()[-3000:] for rank in (0, 1))
    assert codes == [0, 0], logs
    return folder


def saved(folder, name):
    return [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1)]


def joined(batches):
    """One batch of several ranks' (prompts padded on the left, rollouts on the right)."""
    out = {"questions": [q for b in batches for q in b["questions"]]}
    for name, value in batches[0].items():
        if isinstance(value, torch.Tensor) and value.ndim > 0:
            rows = [row for b in batches for row in b[name]]
            side = "right" if name.startswith("completion") else "left"
            pad = job.TOKENIZER.pad_token_id if name.endswith("_ids") else 0
            out[name] = pad_sequence(rows, True, pad, padding_side=side) if value.ndim == 2 else torch.stack(rows)
        elif name.startswith("column/"):
            assert all(torch.equal(b[name], value) for b in batches), name  # a number of the generation
            out[name] = value
    tokens = out["completion_mask"].sum(-1)
    out["policy_tokens_per_micro_batch"] = tokens.sum().float()  # all of the step's, in one micro-batch
    if "has_context" in out:
        out["tokens_per_micro_batch"] = (tokens * out["has_context"]).sum().float()
    return out


def test_moments_and_the_maximum_are_those_of_all_ranks(folder):
    ranks = saved(folder, "ddp-egrsd")
    batch = joined([b for rank in ranks for b in rank["batches"]])
    length = batch["completion_mask"].sum(-1)
    reward = batch["success"] * (1.0 + 0.5 * (1.0 - length / job.STEP["max_completion_length"]))
    expected = (reward - reward.mean()) / reward.std(correction=0)
    torch.testing.assert_close(batch["advantages"], expected, rtol=1e-4, atol=1e-5)
    assert batch["column/most_entropy"] >= 1.0


def one_process(tmp_path, batch, options, lora=False):
    """Loss and gradients of the same rows in this process, in one micro-batch."""
    trainer = job.make(
        tmp_path, len(batch["questions"]), lora=lora, **{k: v for k, v in options.items() if "accumulation" not in k}
    )
    job.start_elsewhere(trainer)
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in trainer.model.named_parameters() if p.requires_grad}


def assert_same(gradient, expected):
    assert gradient.keys() == expected.keys()
    scale = max(g.abs().max().item() for g in expected.values())
    assert scale > 1e-4  # a vanishing gradient would pass any comparison
    for name, g in expected.items():
        torch.testing.assert_close(gradient[name], g, rtol=1e-3, atol=1e-5 * scale, msg=name)


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
    answers = {q["prompt"]: q["answer"] for q in job.QUESTIONS}
    options = job.DDP[name][1]
    batch = joined([b for rank in ranks for b in rank["batches"]])
    rows = len(batch["questions"]) // 2
    rule = "uniform" if options.get("prefix_sharing") == "none" else "paired"
    rollouts = [
        ids[m.bool()].tolist() for ids, m in zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    ]
    rewards = job.half(rollouts)
    assert len({tuple(ids) for ids in rollouts}) == len(rollouts)  # ranks sample with seeds of their own
    assert batch["success"].tolist() == [r == 1.0 for r in rewards]
    peers = across = 0
    for g in range(len(rollouts) // job.SIZE):
        members = range(g * job.SIZE, (g + 1) * job.SIZE)
        question = batch["questions"][members[0]]
        assert {batch["questions"][i] for i in members} == {question}
        group = Group(question, answers[question], tuple(Rollout(tuple(rollouts[i]), rewards[i]) for i in members))
        for i, peer in zip(members, choose_peers(group, rule, rng=peer_rng(42, 0, g)), strict=True):
            context = f"[{answers[question]}]"
            shown = None if peer is None else job.TOKENIZER.decode(rollouts[members[peer]], skip_special_tokens=True)
            if shown:  # a peer that is only an end token shows nothing
                context = f"[{answers[question]}|{shown}]"
                peers += 1
                across += i // rows != members[peer] // rows
            ids = batch["teacher_prompt_ids"][i]
            assert job.TOKENIZER.decode(ids, skip_special_tokens=True) == question + context
    assert peers >= 2
    if name.startswith("split"):
        assert across >= 1


@pytest.mark.parametrize("name", job.FSDP)
def test_fsdp2_gives_the_gradients_of_one_process(name, folder, tmp_path):
    lora, options = job.FSDP[name]
    batch = joined([rank["batches"][0] for rank in saved(folder, "ddp-split")])
    loss, expected = one_process(tmp_path, batch, options, lora)
    ranks = saved(folder, f"fsdp-{name}")
    assert sum(rank["loss"] for rank in ranks) / 2 == pytest.approx(loss, rel=1e-5)
    for rank in ranks:
        assert_same(rank["gradient"], expected)


def test_a_signal_to_one_rank_stops_both_and_the_run_resumes_exactly(folder):
    for rank in saved(folder, "interrupted"):
        assert rank["stopped_at"] == 2
        for whole, parts in zip(rank["whole"], rank["parts"], strict=True):
            assert all(torch.equal(whole[n], parts[n]) for n in whole)
