"""Credit of failing rollouts against full logits of the model, one sequence at a time."""

from dataclasses import replace

import pytest
import tiny_runs
import torch
from tiny_runs import SMALLER, TEMPLATE, TOKENIZER, group
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from hsd.hindsight.credit import coverage
from hsd.hindsight.groups import Group, Rollout
from hsd.tasks.task import Policy
from hsd.viewer.measure import (
    WINDOWS,
    TokenCredit,
    coverage_by_difficulty,
    credit_tables,
    draw_peers,
    failing_with_peer,
    measure,
)


def encode(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


MIXED = group("12+34=", "46", **{"12+34=46;#46$": 1.0, "12+34=56;#56$": 0.0, "#46$": 1.0, "12+34": 0.0, "9$": 0.0})
OTHER = group("5+6=", "11", **{"5+6=11;#11$": 1.0, "5+6=12;#12$": 0.0})
FAILED = group("7+8=", "15", **{"#14$": 0.0, "#16$": 0.0})
SOLVED = group("7+9=", "16", **{"#16$": 1.0, "16#16$": 1.0})


def qwen3() -> nn.Module:
    return tiny_runs.qwen3(**SMALLER | {"num_hidden_layers": 2}, attention_dropout=0.5, tie_word_embeddings=False)


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(TOKENIZER), n_embd=16, n_layer=2, n_head=4, n_positions=64))


def build(make=qwen3) -> nn.Module:
    torch.manual_seed(1)
    model = make().float()
    for p in model.parameters():
        nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.3)
    return model


def every(groups: list[Group]) -> list[tuple[int, int]]:
    return [(g, i) for g, group in enumerate(groups) for i in range(len(group.rollouts))]


def measure_failing(model: nn.Module, groups: list[Group], seed: int = 0) -> list[TokenCredit]:
    peers = draw_peers(TOKENIZER, groups, seed)
    places = failing_with_peer(groups, peers)
    return measure(Policy(model, TOKENIZER), groups, peers, TEMPLATE, places)


@torch.no_grad()
def full_log_probs(model: nn.Module, prompt: str, rollout: Rollout) -> torch.Tensor:
    before, ids = encode(prompt), list(rollout.token_ids)
    logits = model(input_ids=torch.tensor([before + ids]), use_cache=False).logits[0, len(before) - 1 : -1]
    return logits.double().log_softmax(-1)


def log_probs(model: nn.Module, prompt: str, rollout: Rollout) -> torch.Tensor:
    ids = list(rollout.token_ids)
    return full_log_probs(model, prompt, rollout)[torch.arange(len(ids)), ids]


def test_the_failing_rollouts_with_a_peer_are_found():
    groups = [FAILED, MIXED, OTHER, SOLVED]
    peers = draw_peers(TOKENIZER, groups, seed=0)
    assert failing_with_peer(groups, peers) == [(1, 1), (1, 3), (1, 4), (2, 1)]


def test_peers_are_successes_of_the_same_group_drawn_by_the_seed():
    seen = set()
    for seed in range(8):
        (peers,) = draw_peers(TOKENIZER, [MIXED], seed)
        assert [peers] == draw_peers(TOKENIZER, [MIXED], seed)
        assert {peers[i] for i in (1, 3, 4)} <= {0, 2}
        seen.add(tuple(peers))
    assert len(seen) > 2


def test_tau_is_where_a_rollout_leaves_its_peer():
    model = build()
    expected = {  # (rollout, peer): tau
        ("12+34=56;#56$", "12+34=46;#46$"): 6,
        ("12+34=56;#56$", "#46$"): 0,
        ("12+34", "12+34=46;#46$"): None,  # a truncated rollout that never left its peer
        ("12+34", "#46$"): 0,
        ("9$", "12+34=46;#46$"): 0,
        ("9$", "#46$"): 0,
    }
    seen = set()
    for seed in range(8):
        for r in measure_failing(model, [MIXED], seed=seed):
            pair = tuple(TOKENIZER.decode(MIXED.rollouts[i].token_ids) for i in (r.rollout, r.peer))
            assert r.tau == expected[pair], pair
            seen.add(pair)
    assert seen == expected.keys()


@pytest.mark.parametrize("groups", [[], [FAILED], [SOLVED], [FAILED, SOLVED]])
def test_without_a_failing_rollout_with_a_peer_nothing_is_measured(groups):
    assert measure_failing(build(), groups) == []


def made(tau: int | None, *credit: float, group: int = 0) -> TokenCredit:
    values = torch.tensor(credit)
    return TokenCredit(group, 1, 0, tau, values, torch.full_like(values, 0.5), values.abs(), values)


def test_the_error_of_a_profile_is_over_groups():
    """Alone in their groups, rollouts have the usual standard error; copies within a group add nothing to it."""
    alone = [made(0, a, group=g) for g, a in enumerate((1.0, 2.0, 6.0))]
    (usual,) = credit_tables(alone)["with_peer"].profile_error(0, 0)
    assert usual == pytest.approx(torch.tensor([1.0, 2.0, 6.0]).std().item() / 3**0.5)
    copied = credit_tables([r for r in alone for _ in range(5)])["with_peer"]
    assert copied.profile_error(0, 0) == pytest.approx([usual])
    one_group = credit_tables([made(0, 1.0), made(0, 2.0), made(None, 3.0, 9.0, group=1)])["with_peer"]
    assert torch.tensor(one_group.profile_error(1, 1)).isnan().all()


def test_tables_of_a_measurement():
    tables = credit_tables([made(2, 0.0, 0.0, -3.0, 1.0), made(0, 2.0, 0.0)])
    with_peer, answer_only = tables["with_peer"], tables["answer_only"]
    assert with_peer.mask_BT.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert with_peer.mean_abs() == pytest.approx((4 / 4 + 2 / 2) / 2)  # rollout by rollout
    assert answer_only.mean_abs() == pytest.approx(0.5)
    assert with_peer.mass() == pytest.approx([1.0] * len(WINDOWS))
    offsets, mean_abs, count = with_peer.profile(before=1, after=2)
    assert (offsets, count) == ([-1, 0, 1, 2], [1, 2, 2, 0])
    assert mean_abs[:3] == pytest.approx([0.0, 2.5, 0.5])
    late = credit_tables([made(0, 0.0, 0.0, -3.0, 1.0), made(None, 2.0, 0.0)])
    assert late["with_peer"].mass()[:2] == pytest.approx([0.75, 1.0])


@pytest.mark.parametrize("make", [qwen3, gpt2])
@pytest.mark.parametrize("token_budget", [1, 30, 10_000])
def test_tokens_equal_full_logits_one_sequence_at_a_time(make, token_budget, monkeypatch):
    monkeypatch.setattr("hsd.viewer.measure.TOP_CHUNK", 3)
    monkeypatch.setattr("hsd.viewer.measure.TOP_K", 4)
    model = build(make).train()
    groups = [FAILED, MIXED]
    peers = draw_peers(TOKENIZER, groups, seed=0)
    assert peers[0] == [None, None] and all(j in (0, 2) and j != i for i, j in enumerate(peers[1]))
    monkeypatch.setattr("hsd.viewer.measure.TOKEN_BUDGET", token_budget)
    read = measure(Policy(model, TOKENIZER), groups, peers, TEMPLATE, every(groups), shown=[1])
    assert [(r.group, r.rollout) for r in read] == [(0, 0), (0, 1), *((1, i) for i in range(5))]
    assert model.training
    model.eval()
    for r in read:
        group, own = groups[r.group], groups[r.group].rollouts[r.rollout]
        assert r.peer == peers[r.group][r.rollout]
        alone = context = f"[{group.answer}]"
        if r.peer is not None:
            shown = TOKENIZER.decode(group.rollouts[r.peer].token_ids, skip_special_tokens=True)
            context = f"[{group.answer}|{shown}]"
        student = full_log_probs(model, group.prompt, own)
        teacher = full_log_probs(model, group.prompt + context, own)
        at = (torch.arange(len(own.token_ids)), list(own.token_ids))
        silent = log_probs(model, group.prompt + alone, own)
        expected = {
            "student_logps": student[at],
            "credit": (teacher - student)[at],
            "answer_only": silent - student[at],
            "kl": (teacher.exp() * (teacher - student)).sum(-1),
        }
        for name, value in expected.items():
            torch.testing.assert_close(getattr(r, name), value.float(), rtol=1e-4, atol=1e-5)
        tops = (r.student_top, r.teacher_top)
        assert r.group == 1 or tops == (None, None)
        for top, logps in zip(tops, (student, teacher), strict=True) if r.group == 1 else ():
            best = logps.exp().topk(4)
            assert torch.equal(top.ids, best.indices)
            torch.testing.assert_close(top.probs, best.values.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("over", [0, 1])
def test_a_forward_pass_reads_no_more_than_the_budget_prompts_included(over, monkeypatch):
    """Two rollouts of 2 tokens beside a context of 63: both together where the budget has room for them, else alone."""
    peer, own = tuple(encode("12")), tuple(encode("34"))
    answer = "9" * 56
    groups = [Group("1+1=", answer, (Rollout(peer, 1.0), Rollout(own, 0.0)))]
    width = len(encode(f"1+1=[{answer}|12]")) + len(own)
    monkeypatch.setattr("hsd.viewer.measure.TOKEN_BUDGET", 2 * width - over)
    read = []
    model = build()
    model.model.register_forward_pre_hook(lambda _, args, kwargs: read.append(kwargs["input_ids"]), with_kwargs=True)
    measure(Policy(model, TOKENIZER), groups, [[None, 0]], TEMPLATE, every(groups))
    assert [len(ids) for ids in read] == ([1] * 6 if over else [2] * 3)
    assert over or max(ids.numel() for ids in read) == 2 * width


def test_a_measurement_is_the_same_alone_and_among_others():
    model = build()
    groups = [OTHER, FAILED, MIXED]
    peers = draw_peers(TOKENIZER, groups, 5)
    among = {(r.group, r.rollout): r for r in measure(Policy(model, TOKENIZER), groups, peers, TEMPLATE, every(groups))}
    for alone in measure_failing(model, groups, seed=5):
        found = among[alone.group, alone.rollout]
        assert (found.peer, found.tau) == (alone.peer, alone.tau)
        torch.testing.assert_close(found.credit, alone.credit, rtol=1e-4, atol=1e-5)


def test_a_peer_that_says_nothing_is_none():
    silent = group("1+1=", "2", **{"$": 1.0, "3$": 0.0})
    assert draw_peers(TOKENIZER, [silent], seed=0) == [[None, None]]


def outcomes(question: int, successes: int, size: int = 4) -> Group:
    made = tuple(Rollout((1,), float(i < successes)) for i in range(size))
    return Group(f"question {question}", "0", made)


def test_coverage_is_measured_on_the_group_that_did_not_grade(monkeypatch):
    monkeypatch.setattr("hsd.viewer.measure.DIFFICULTY", (0.2, 0.6))
    first = [outcomes(0, 0), outcomes(1, 4), outcomes(2, 2)]
    second = [outcomes(0, 1), outcomes(1, 3), outcomes(2, 2)]
    hard, middle, easy = coverage_by_difficulty(first, second)
    # 0 of 4 grades question 0 hard; measured there: 1 of 4, three failures with a peer
    assert (hard.groups, hard.success, hard.coverage) == (1, 0.25, 0.75)
    # 1 of 4 grades it middling; measured: 0 of 4, no peer. Question 2 twice: half fail, with a peer
    assert (middle.groups, middle.success, middle.coverage) == (3, pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert (easy.groups, easy.success, easy.coverage) == (2, 0.875, 0.125)
    assert (easy.low, easy.high) == (0.6, 1.0)
    assert hard.error != hard.error  # one group has no spread
    assert middle.error == pytest.approx(torch.tensor([0.0, 0.5, 0.5]).std().item() / 3**0.5)
    with pytest.raises(ValueError, match=r"^second: expected one group for each question"):
        coverage_by_difficulty(first, second[::-1])


def test_difficulty_counts_the_rollouts_with_a_verdict():
    """1 of 2 judged, not 1 of 4; a question is left out where either of its groups has no verdict."""
    judged = Group("q", "0", tuple(Rollout((1,), r, scored=i < 2) for i, r in enumerate((1.0, 0.0, 0.0, 0.0))))
    unjudged = replace(judged, rollouts=(Rollout((1,), 0.0, scored=False),) * 4)
    (middle,) = coverage_by_difficulty([judged, judged], [judged, unjudged])
    assert (middle.low, middle.groups, middle.success, middle.coverage) == (0.2, 2, 0.5, 0.5)
    assert coverage_by_difficulty([unjudged], [judged]) == []


def test_coverage_of_alike_questions_is_the_formula():
    g = torch.Generator().manual_seed(0)
    size, p = 8, 0.3
    draws = torch.rand(2, 2000, size, generator=g) < p
    first, second = ([outcomes(q, int(n), size) for q, n in enumerate(half)] for half in draws.sum(-1))
    bins = [b for b in coverage_by_difficulty(first, second) if b.groups > 50]
    assert len(bins) == 3
    for b in bins:
        assert abs(b.coverage - coverage(p, size)) < 4 * b.error < 0.1
