"""The benchmark prints no number on a red gate, and counts what it says."""

from pathlib import Path

import pytest
import torch

import hsd.policy.tree.attention as attention


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[4] / "benchmarks"))
    import bench_update  # pyright: ignore[reportMissingImports]

    return bench_update


SHAPE = (24, 12, 10, 4)


def test_a_wrong_tree_gets_no_time(bench, monkeypatch):
    assert bench.times("toy", SHAPE, ["tree"], "cpu", 1)["tree"]["seconds"]
    visible = attention.visible
    monkeypatch.setattr(attention, "visible", lambda tree, window: torch.ones_like(visible(tree, window)).tril())
    monkeypatch.setattr(attention, "SMALL", 10**9)  # dense
    timed = bench.times("toy", SHAPE, ["unshared", "tree"], "cpu", 1)
    assert timed["unshared"]["seconds"]
    assert timed["tree"].keys() == {"failed"} and "gate" in timed["tree"]["failed"]
    row = {"model": "toy", "shape": SHAPE, "contender": "tree", "tokens": 1, "flops": 1.0} | timed["tree"]
    assert "failed: gate" in bench.table([row])


def test_counts(bench):
    q, o, peer, g = SHAPE
    assert bench.count("unshared", "toy", SHAPE)[0] == g * (q + o) + g * (q + peer + o)
    assert bench.count("grpo", "toy", SHAPE)[0] == g * (q + o)
    # The last token of a rollout is not read; two contexts; everything hangs below the question.
    assert bench.count("tree", "toy", SHAPE)[0] == q + g * (o - 1) + 2 * peer + g * (o - 1)
    assert bench.count("prompt", "toy", SHAPE)[0] == q + g * (o - 1) + g * peer + g * (o - 1)
    flops = [bench.count(c, "qwen3-8b", (2000, 500, 500, 8))[1] for c in bench.CONTENDERS]
    assert flops[0] > flops[1] > flops[2] and flops[0] > flops[3]
