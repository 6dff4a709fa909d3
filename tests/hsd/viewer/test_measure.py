"""Credit of failing rollouts against full logits of the model, one sequence at a time."""

import dataclasses

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

from hsd.hindsight.context import ContextTemplate
from hsd.hindsight.credit import coverage
from hsd.hindsight.groups import Group, Rollout
from hsd.tasks import small_world
from hsd.tasks.task import Policy
from hsd.viewer.measure import (
    WINDOWS,
    MeasuredCredit,
    coverage_by_difficulty,
    draw_peers,
    failing_with_peer,
    gather,
    measure,
)

TOKENIZER = small_world.build_tokenizer()
TEMPLATE = ContextTemplate(small_world.WITH_PEER, small_world.ANSWER_ONLY)


def encode(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


def group(prompt: str, answer: str, **rollouts: float) -> Group:
    return Group(prompt, answer, tuple(Rollout(tuple(encode(t)), r) for t, r in rollouts.items()))


MIXED = group("12+34=", "46", **{"12+34=46;#46$": 1.0, "12+34=56;#56$": 0.0, "#46$": 1.0, "12+34": 0.0, "9$": 0.0})
OTHER = group("5+6=", "11", **{"5+6=11;#11$": 1.0, "5+6=12;#12$": 0.0})
FAILED = group("7+8=", "15", **{"#14$": 0.0, "#16$": 0.0})
SOLVED = group("7+9=", "16", **{"#16$": 1.0, "16#16$": 1.0})


def qwen3() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_dropout": 0.5}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=len(TOKENIZER), **sizes, **heads))


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


def measure_credit(model: nn.Module, groups: list[Group], seed: int = 0, **options) -> MeasuredCredit | None:
    peers = draw_peers(TOKENIZER, groups, seed)
    places = failing_with_peer(groups, peers)
    return gather(groups, measure(Policy(model, TOKENIZER), groups, peers, TEMPLATE, places, **options))


def rows(measured: MeasuredCredit) -> list[tuple[Group, Rollout, Rollout]]:
    found = zip(measured.groups, measured.rollout, measured.peer, strict=True)
    return [(g, g.rollouts[i], g.rollouts[j]) for g, i, j in found]


@torch.no_grad()
def full_log_probs(model: nn.Module, prompt: str, rollout: Rollout) -> torch.Tensor:
    before, ids = encode(prompt), list(rollout.token_ids)
    logits = model(input_ids=torch.tensor([before + ids]), use_cache=False).logits[0, len(before) - 1 : -1]
    return logits.double().log_softmax(-1)


def log_probs(model: nn.Module, prompt: str, rollout: Rollout) -> torch.Tensor:
    ids = list(rollout.token_ids)
    return full_log_probs(model, prompt, rollout)[torch.arange(len(ids)), ids]


@pytest.mark.parametrize("make", [qwen3, gpt2])
@pytest.mark.parametrize("token_budget", [1, 10_000])
def test_credit_equals_full_logits_one_sequence_at_a_time(make, token_budget):
    model = build(make).train()  # dropout must not enter
    measured = measure_credit(model, [FAILED, MIXED, OTHER, SOLVED], token_budget=token_budget)
    assert measured is not None and model.training
    assert [g for g, _, _ in rows(measured)] == [MIXED, MIXED, MIXED, OTHER]
    assert measured.rollout == [1, 3, 4, 1]
    longest = max(len(r.token_ids) for _, r, _ in rows(measured))
    assert measured.mask.shape == measured.with_peer.shape == measured.answer_only.shape == (4, longest)
    model.eval()
    for b, (g, rollout, peer) in enumerate(rows(measured)):
        length = len(rollout.token_ids)
        assert measured.mask[b].tolist() == [1] * length + [0] * (longest - length)
        student = log_probs(model, g.prompt, rollout)
        shown = TOKENIZER.decode(peer.token_ids, skip_special_tokens=True)
        for name, context in (("with_peer", f"[{g.answer}|{shown}]"), ("answer_only", f"[{g.answer}]")):
            expected = (log_probs(model, g.prompt + context, rollout) - student).float()
            assert expected.abs().max() > 0.05
            torch.testing.assert_close(getattr(measured, name)[b, :length], expected, rtol=1e-4, atol=1e-5)


def test_peers_are_successes_of_the_same_group_drawn_by_the_seed():
    model = build()
    seen = set()
    for seed in range(8):
        measured = measure_credit(model, [MIXED], seed=seed)
        again = measure_credit(model, [MIXED], seed=seed)
        assert measured.peer == again.peer
        assert torch.equal(measured.with_peer, again.with_peer)
        assert set(measured.peer) <= {0, 2}
        seen.add(tuple(measured.peer))
    assert len(seen) > 2


def test_tau_is_where_a_rollout_leaves_its_peer():
    model = build()
    expected = {  # (rollout, peer): tau
        ("12+34=56;#56$", "12+34=46;#46$"): 6,
        ("12+34=56;#56$", "#46$"): 0,
        ("12+34", "12+34=46;#46$"): -1,  # a truncated rollout that never left its peer
        ("12+34", "#46$"): 0,
        ("9$", "12+34=46;#46$"): 0,
        ("9$", "#46$"): 0,
    }
    seen = set()
    for seed in range(8):
        measured = measure_credit(model, [MIXED], seed=seed)
        for (_, rollout, peer), tau in zip(rows(measured), measured.tau.tolist(), strict=True):
            pair = (TOKENIZER.decode(rollout.token_ids), TOKENIZER.decode(peer.token_ids))
            assert tau == expected[pair], pair
            seen.add(pair)
    assert seen == expected.keys()


@pytest.mark.parametrize("groups", [[], [FAILED], [SOLVED], [FAILED, SOLVED]])
def test_nothing_to_measure_is_none(groups):
    assert measure_credit(build(), groups) is None


def test_summaries_of_a_measurement():
    measured = MeasuredCredit(
        groups=[MIXED, MIXED],
        rollout=[1, 4],
        peer=[0, 0],
        with_peer=torch.tensor([[0.0, 0.0, -3.0, 1.0], [2.0, 0.0, 9.0, 9.0]]),
        answer_only=torch.full((2, 4), 0.5),
        mask=torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
        tau=torch.tensor([2, 0]),
    )
    with_peer, answer_only = (measured.teachers[name] for name in ("with_peer", "answer_only"))
    assert with_peer.mean_abs() == pytest.approx((4 / 4 + 2 / 2) / 2)  # rollout by rollout
    assert answer_only.mean_abs() == pytest.approx(0.5)
    assert with_peer.mass() == pytest.approx([1.0] * len(WINDOWS))
    offsets, mean_abs, count = with_peer.profile(before=1, after=2)
    assert (offsets, count) == ([-1, 0, 1, 2], [1, 2, 2, 0])
    assert mean_abs[:3] == pytest.approx([0.0, 2.5, 0.5])
    late = dataclasses.replace(measured, tau=torch.tensor([0, -1]))
    assert late.teachers["with_peer"].mass()[:2] == pytest.approx([0.75, 1.0])


@pytest.mark.parametrize("make", [qwen3, gpt2])
@pytest.mark.parametrize("token_budget", [1, 30, 10_000])
def test_tokens_equal_full_logits_one_sequence_at_a_time(make, token_budget, monkeypatch):
    monkeypatch.setattr("hsd.viewer.measure.TOP_CHUNK", 3)
    model = build(make).train()
    groups = [FAILED, MIXED]
    peers = draw_peers(TOKENIZER, groups, seed=0)
    assert peers[0] == [None, None] and all(j in (0, 2) and j != i for i, j in enumerate(peers[1]))
    options = {"shown": [1], "top_k": 4, "token_budget": token_budget}
    read = measure(Policy(model, TOKENIZER), groups, peers, TEMPLATE, every(groups), **options)
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


def test_a_measurement_is_the_same_alone_and_among_others():
    model = build()
    groups = [OTHER, FAILED, MIXED]
    measured = measure_credit(model, groups, seed=5)
    peers = draw_peers(TOKENIZER, groups, 5)
    read = measure(Policy(model, TOKENIZER), groups, peers, TEMPLATE, every(groups))
    again = gather(groups, read)
    assert (again.peer, again.rollout) == (measured.peer, measured.rollout)
    torch.testing.assert_close(again.with_peer, measured.with_peer, rtol=1e-4, atol=1e-5)
    assert torch.equal(again.tau, measured.tau) and torch.equal(again.mask, measured.mask)


def test_a_peer_that_says_nothing_is_none():
    silent = group("1+1=", "2", **{"$": 1.0, "3$": 0.0})
    assert draw_peers(TOKENIZER, [silent], seed=0) == [[None, None]]


def test_no_likeliest_token_is_refused():
    with pytest.raises(ValueError, match=r"^top_k: expected at least 1, got 0"):
        measure(Policy(build(), TOKENIZER), [OTHER], [[None, 0]], TEMPLATE, [], top_k=0)


def outcomes(question: int, successes: int, size: int = 4) -> Group:
    made = tuple(Rollout((1,), float(i < successes)) for i in range(size))
    return Group(f"question {question}", "0", made)


def test_coverage_is_measured_on_the_group_that_did_not_grade():
    first = [outcomes(0, 0), outcomes(1, 4), outcomes(2, 2)]
    second = [outcomes(0, 1), outcomes(1, 3), outcomes(2, 2)]
    hard, middle, easy = coverage_by_difficulty(first, second, edges=(0.2, 0.6))
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


def test_coverage_of_alike_questions_is_the_formula():
    g = torch.Generator().manual_seed(0)
    size, p = 8, 0.3
    draws = torch.rand(2, 2000, size, generator=g) < p
    first, second = ([outcomes(q, int(n), size) for q, n in enumerate(half)] for half in draws.sum(-1))
    bins = [b for b in coverage_by_difficulty(first, second) if b.groups > 50]
    assert len(bins) == 3
    for b in bins:
        assert abs(b.coverage - coverage(p, size)) < 4 * b.error < 0.1
