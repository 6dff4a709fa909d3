"""Peer selection: the law of each draw, counted over every outcome where that is possible."""

import itertools
import random
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from typing import Any

import pytest

from hsd.hindsight.groups import Group, Rollout
from hsd.hindsight.peers import PEER_RULES, choose_peers, peer_rng

NEEDS_NO_DRAW = ("shortest", "highest_perplexity", "lowest_perplexity")


def make_group(rewards: list[int], lengths: list[int] | None = None, logps: Any = None) -> Group:
    lengths = lengths or [3] * len(rewards)
    logps = logps or [-1.0] * len(rewards)
    rows = zip(rewards, lengths, logps, strict=True)
    return Group("q", "a", tuple(Rollout((7,) * length, r, mean_logp=logp) for r, length, logp in rows))


class EveryPair(random.Random):
    """Hands out one given ordered pair, where the rule samples two."""

    def __init__(self, pair: tuple[int, int]):
        super().__init__(0)
        self.pair = pair

    def sample(self, population, k, *, counts=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        assert k == 2 and set(self.pair) <= set(population)
        return list(self.pair)


class NoDraw(random.Random):
    def random(self):
        raise AssertionError("this rule must not draw")

    def getrandbits(self, k, /):
        raise AssertionError("this rule must not draw")


@pytest.mark.parametrize("rule", PEER_RULES)
def test_peers_are_successes_other_than_oneself(rule: str):
    for rewards in itertools.product([0, 1], repeat=5):
        group = make_group(list(rewards))
        peers = choose_peers(group, rule, rng=random.Random(0))
        assert len(peers) == 5
        for i, peer in enumerate(peers):
            candidates = group.success_peers(i)
            assert peer in candidates if candidates else peer is None


@pytest.mark.parametrize("rule", PEER_RULES)
def test_one_success_and_none(rule: str):
    assert choose_peers(make_group([0, 1, 0, 0]), rule, rng=random.Random(0)) == [1, None, 1, 1]
    assert choose_peers(make_group([0, 0, 0]), rule, rng=random.Random(0)) == [None] * 3


@pytest.mark.parametrize("rewards", [[1, 0, 1, 0], [1, 1, 1, 0, 1], [1, 1], [0, 1, 1, 1, 0, 0, 1, 1]])
def test_paired_is_uniform_for_each_rollout_over_all_pairs(rewards: list[int]):
    group = make_group(rewards)
    pairs = list(itertools.permutations(group.successes, 2))
    counts = [Counter[int | None]() for _ in rewards]
    for pair in pairs:
        peers = choose_peers(group, "paired", rng=EveryPair(pair))
        assert len(set(peers)) <= 2
        for i, peer in enumerate(peers):
            counts[i][peer] += 1
    for i, count in enumerate(counts):
        law = {j: Fraction(n, len(pairs)) for j, n in count.items()}
        candidates = group.success_peers(i)
        assert law == {j: Fraction(1, len(candidates)) for j in candidates}


@pytest.mark.parametrize("rule", ["uniform", "paired"])
def test_drawn_rules_are_uniform_with_a_real_generator(rule: str):
    group, draws = make_group([1, 0, 1, 1, 0]), 3000
    rng = random.Random(5)
    rows = [choose_peers(group, rule, rng=rng) for _ in range(draws)]
    counts = [Counter(column) for column in zip(*rows, strict=True)]
    for i, count in enumerate(counts):
        candidates = group.success_peers(i)
        expected = draws / len(candidates)
        chi2 = sum((count[j] - expected) ** 2 / expected for j in candidates)
        assert chi2 < 13.8  # exceeded with probability 0.001 at two degrees of freedom
        assert set(count) == set(candidates)


def test_uniform_draws_are_independent_and_paired_draws_are_not():
    group = make_group([1, 1, 1, 0, 0])
    both = {rule: Counter[bool]() for rule in ("uniform", "paired")}
    for rule, count in both.items():
        rng = random.Random(1)
        for _ in range(600):
            peers = choose_peers(group, rule, rng=rng)
            count[peers[3] == peers[4]] += 1
    assert both["paired"][False] == 0
    assert 0.25 < both["uniform"][True] / 600 < 0.42  # 1/3, within four standard errors


def test_deterministic_rules():
    group = make_group(
        [1, 1, 0, 1, 1], lengths=[5, 3, 1, 3, 9], logps=[-0.5, -0.7, -9.0, -0.2, -800.0]
    )  # exp(800) overflows a float; rollout 2 would win every rule but it failed
    expected = {
        "shortest": [1, 3, 1, 1, 1],
        "highest_perplexity": [4, 4, 4, 4, 1],
        "lowest_perplexity": [3, 3, 3, 0, 3],
    }
    for rule in NEEDS_NO_DRAW:
        assert choose_peers(group, rule, rng=NoDraw()) == expected[rule]


@pytest.mark.parametrize("rule", NEEDS_NO_DRAW)
def test_ties_go_to_the_lowest_index(rule: str):
    assert choose_peers(make_group([0, 1, 1, 1]), rule, rng=NoDraw()) == [1, 2, 1, 1]


def test_perplexity_rules_need_mean_logp_on_candidates_only():
    group = make_group([1, 0, 1, 1], logps=[-1.0, None, -1.0, None])
    for rule in ("highest_perplexity", "lowest_perplexity"):
        with pytest.raises(ValueError, match=rf"^mean_logp: .*rollout 3.*{rule}"):
            choose_peers(group, rule, rng=NoDraw())
    failing_without = make_group([1, 0, 1], logps=[-1.0, None, -2.0])
    assert choose_peers(failing_without, "lowest_perplexity", rng=NoDraw()) == [2, 0, 0]


def test_unknown_rule():
    with pytest.raises(ValueError, match=r"^rule: .*'random'"):
        choose_peers(make_group([1, 0]), "random", rng=random.Random(0))


def test_peer_rng_depends_on_all_three_and_on_nothing_else():
    random.seed(0)
    first = peer_rng(1, 2, 3).random()
    random.seed(1)
    assert peer_rng(1, 2, 3).random() == first
    keys = list(itertools.product([0, 1, 11], repeat=3))  # 1,11,.. and 11,1,.. must not run together
    assert len({peer_rng(*key).random() for key in keys}) == len(keys)


def test_peer_rng_agrees_across_processes():
    code = "from hsd.hindsight.peers import peer_rng; print(peer_rng(42, 7, 3).getrandbits(64))"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            check=True, capture_output=True, text=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert outputs == {f"{peer_rng(42, 7, 3).getrandbits(64)}\n"}


def test_peer_rng_refuses_a_float():
    with pytest.raises(TypeError):
        peer_rng(0, 1.0, 0)  # pyright: ignore[reportArgumentType]
