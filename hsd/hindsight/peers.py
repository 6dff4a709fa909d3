"""The successful peer in the teacher's prompt for each rollout (arXiv 2606.15576; the rules are its ablation)."""

from __future__ import annotations

import hashlib
import operator
import random

from hsd.hindsight.groups import Group

PEER_RULES = ("uniform", "paired", "first", "shortest", "highest_perplexity", "lowest_perplexity")


def choose_peers(group: Group, rule: str = "uniform", *, rng: random.Random) -> list[int | None]:
    """The index of each rollout's peer ``o_i+``, drawn from ``S_i = {j != i : R_j = 1}``.

    Rules:
        ``"uniform"``: an independent uniform draw from ``S_i`` for each rollout; the paper's rule.
        ``"paired"``: one ordered pair (A, B) of distinct successes for the whole group; everyone gets A, and
            A gets B. Each rollout's peer is still uniform over its ``S_i``, so the expected gradient is the
            same, but a group has at most two distinct peers and so at most two distinct contexts with a peer.
            With a single success everyone else gets it.
        ``"first"``: the first other success, SDPO's rule.
        ``"shortest"``: the peer with the fewest tokens.
        ``"highest_perplexity"``, ``"lowest_perplexity"``: by ``exp(-mean_logp)``.

    The last four do not draw from ``rng``; ties go to the lowest index.

    Returns:
        One entry for each rollout, never its own index; None where ``S_i`` is empty (the endpoint fallback:
        the teacher sees the answer alone).

    Raises:
        ValueError: An unknown ``rule``, or a perplexity rule and a candidate without ``mean_logp``.
    """
    if rule not in PEER_RULES:
        raise ValueError(f"rule: expected one of {PEER_RULES}, got {rule!r}")
    if rule == "paired":
        return _paired(group, rng)
    peers: list[int | None] = []
    for i in range(len(group.rollouts)):
        candidates = group.success_peers(i)
        if not candidates:
            peers.append(None)
        elif rule == "uniform":
            peers.append(rng.choice(candidates))
        else:
            peers.append(min(candidates, key=lambda j: _rank(group, j, rule)))
    return peers


class GenerationNumbers:
    """Numbers the generations of a run, each of which draws its own peers.

    The first one at an optimizer step has the step's number, the k-th after it ``step + (k << 40)``. Evaluations are
    counted apart from training. A run that resumes between two steps goes on with the numbers of an uninterrupted one.
    """

    def __init__(self) -> None:
        self._last: dict[bool, tuple[int, int]] = {}

    def next(self, step: int, *, training: bool) -> int:
        last, before = self._last.get(training, (-1, 0))
        k = before + 1 if step == last else 0
        self._last[training] = step, k
        return step + (k << 40)


def peer_rng(seed: int, generation: int, group_index: int) -> random.Random:
    """A generator that depends on its three arguments only.

    A resumed run draws the peers the first run drew, and ranks agree without communicating, provided that
    ``generation`` is of `GenerationNumbers` and ``group_index`` counts the groups of all ranks, not those of one.

    Raises:
        TypeError: An argument is not an integer.
    """
    key = ",".join(str(operator.index(n)) for n in (seed, generation, group_index))
    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
    return random.Random(int.from_bytes(digest, "big"))


def _paired(group: Group, rng: random.Random) -> list[int | None]:
    peers: list[int | None] = [None] * len(group.rollouts)
    successes = group.successes
    if not successes:
        return peers
    first, second = rng.sample(successes, 2) if len(successes) > 1 else (successes[0], None)
    return [second if i == first else first for i in range(len(group.rollouts))]


def _rank(group: Group, j: int, rule: str) -> float:
    """The smallest rank is chosen."""
    rollout = group.rollouts[j]
    if rule == "first":
        return j
    if rule == "shortest":
        return len(rollout.token_ids)
    if rollout.mean_logp is None:
        raise ValueError(f"mean_logp: expected a number on rollout {j}, which rule {rule!r} ranks, got None")
    # The order of perplexities without exp(-mean_logp), which can overflow.
    return rollout.mean_logp if rule == "highest_perplexity" else -rollout.mean_logp
