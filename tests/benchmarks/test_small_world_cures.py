"""Each cure's gradient in fp64 against plain autograd, a rollout at a time; the tables; and what is refused."""

import json

import pytest
import torch
from tiny_runs import TOKENIZER, Recorder, group, make, qwen3
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from benchmarks.small_world import tables
from benchmarks.small_world.cures import CuredTrainer, Held, subtract_
from benchmarks.small_world.plan import CURES, Run
from benchmarks.small_world.run import KEPT
from hsd.tasks import small_world

LIVE = {"teacher": "live", "reference_coef": 0.0}
GROUPS = [
    group("12+34+56+78=", "180", **{"12+34=46;#180$": 1.0, "12+34=56;#190$": 0.0, "12+34=36;#1$": 0.0}),
    group("21+43+65+87=", "216", **{"#216$": 1.0, "21+43=64;#216$": 1.0, "21=7;#21$": 0.0}),
]


class Cured(CuredTrainer, Recorder):
    """Keeps the generated batches."""


def step(folder, model, cure=None, held=None, **options):
    """(the gradient of one step, by name; the batch; what was logged)."""
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    cls = Recorder if cure is None else lambda **kwargs: Cured(cure, held, **kwargs)
    trainer = make(model, folder, cls, **LIVE | options)
    trainer.train()
    return {n: before[n] - p.detach() for n, p in model.named_parameters()}, trainer.batches[0], trainer


def by_hand(model, batch):
    """One rollout after the other, without padding: (w, log s, log t) of each, all with a graph."""
    found = []
    rows = zip(
        *(batch[k] for k in ("prompt_ids", "prompt_mask", "teacher_prompt_ids", "teacher_prompt_mask")),
        batch["completion_ids"],
        batch["completion_mask"],
        batch["has_context"],
        strict=True,
    )
    for p, p_mask, c, c_mask, o, o_mask, shown in rows:
        o = o[o_mask.bool()]
        logits = []
        for prompt in (p[p_mask.bool()], c[c_mask.bool()]):
            ids = torch.cat([prompt, o]).unsqueeze(0)
            logits.append(model(input_ids=ids).logits[0, len(prompt) - 1 : -1])
        found.append((float(shown) / (len(batch["completion_ids"]) * len(o)), *logits))
    return found


def divergence(s, t):
    a, b = t.log_softmax(-1), s.log_softmax(-1)
    return (a.exp() * (a - b)).sum()


def grad(model, loss):
    names, params = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, params), strict=True))


def expected(model, batch):
    """(g_S, g_T, g_C)."""
    whole = by_hand(model, batch)
    own = grad(model, sum(w * divergence(s, t.detach()) for w, s, t in whole))
    whole = by_hand(model, batch)
    both = grad(model, sum(w * divergence(s, t) for w, s, t in whole))
    whole = by_hand(model, batch)
    common = 0.0
    for w, s, t in whole:
        leaf = s.detach().requires_grad_()
        (dz,) = torch.autograd.grad(w * divergence(leaf, t.detach()), leaf)
        common = common + (dz * t).sum()
    return own, {n: both[n] - own[n] for n in own}, grad(model, common)


def assert_close(got, wanted):
    """Within the rounding of the tokens' weights, which are fp32."""
    size = max(w.abs().max().item() for w in wanted.values())
    assert size > 1e-4
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=0, atol=1e-7 * size, msg=name)


@pytest.fixture
def fresh(monkeypatch):
    """A model in fp64, also in its norms, which transformers computes in fp32."""

    def forward(self, x):
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    monkeypatch.setattr(Qwen3RMSNorm, "forward", forward)
    return lambda **options: qwen3(**options).double()


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_a_share_of_the_residual_gradient(tmp_path, fresh, share):
    got, batch, trainer = step(tmp_path, fresh(), ("share", share))
    own, residual, _ = expected(fresh(), batch)
    assert max(r.abs().max() for r in residual.values()) > 1e-4
    assert_close(got, {n: own[n] + share * residual[n] for n in own})
    assert_close(step(tmp_path, fresh(), ("plain", 0.0))[0], own)
    assert_close(step(tmp_path, fresh())[0], own)  # the trainer itself
    kl = sum(w * divergence(s, t) for w, s, t in by_hand(fresh(), batch)).item()
    assert trainer.state.log_history[0]["hsd/cure"] == pytest.approx(share * kl, rel=1e-5)


@pytest.mark.parametrize(("spread", "agree"), [(0.1, True), (0.02, False)])
def test_the_common_part_is_subtracted(tmp_path, fresh, spread, agree):
    got, batch, trainer = step(tmp_path, fresh(initializer_range=spread), ("subtract", 1.0))
    own, _, common = expected(fresh(initializer_range=spread), batch)
    inner = sum((own[n] * common[n]).sum() for n in own)
    times = max(0.0, (inner / sum(common[n].square().sum() for n in own)).item())
    assert (inner > 0) == agree  # the weights of the second model move the teacher against the student
    assert_close(got, {n: own[n] - times * common[n] for n in own})
    if agree:
        assert abs(sum((got[n] * common[n]).sum() for n in own)) < 1e-6 * inner
    assert trainer.state.log_history[0]["hsd/cure"] == pytest.approx(times, rel=1e-5)


def test_what_goes_the_other_way_is_kept():
    own, common = [torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])], [torch.tensor([-1.0, 0.0]), torch.tensor([[0.0]])]
    assert subtract_(own, common) == 0 and own[0].tolist() == [1.0, 2.0] and own[1].tolist() == [[3.0]]
    assert subtract_(own, [-x for x in common]) == 1 and own[0].tolist() == [0.0, 2.0] and own[1].tolist() == [[3.0]]
    assert subtract_(own, [0.0 * x for x in common]) == 0 and own[0].tolist() == [0.0, 2.0]  # nothing in common


@pytest.mark.parametrize("coef", [0.1, 1.0])
def test_the_teacher_is_held_at_fixed_rows(tmp_path, fresh, coef):
    held = Held(qwen3(seed=5).double(), TOKENIZER, GROUPS, seed=0)  # of other weights, where the penalty is not 0
    got, batch, trainer = step(tmp_path, fresh(), ("hold", coef), held)
    own, _, _ = expected(fresh(), batch)
    model, first, each = fresh(), qwen3(seed=5).double(), []
    for g, successes in zip(GROUPS, ((0,), (0, 1)), strict=True):
        for i, rollout in enumerate(g.rollouts):
            peers = [g.rollouts[k] for k in successes if k != i]
            if not peers:
                continue
            assert len(peers) == 1 or g is GROUPS[1]
            each.append([value(model, first, g, rollout, peer) for peer in peers])
    # The one draw that `Held` made: each row's peer is found by its length of prompt.
    assert len(each) == len(held.read.ids) == 5
    chosen = [next(d for n, d in options if n == int(m.sum())) for options, m in zip(each, held.read.mask, strict=True)]
    d = torch.cat(chosen)
    assert len(d) == len(held.first)
    penalty = (d.exp() - 1 - d).mean()
    extra = grad(model, penalty)
    assert_close(got, {n: own[n] + coef * extra[n] for n in own})
    assert trainer.state.log_history[0]["hsd/cure"] == pytest.approx(coef * penalty.item(), rel=1e-5)
    assert held.penalty(first).item() == 0.0 and not held.first.requires_grad


def value(model, first, g, rollout, peer):
    """(tokens of the sequence, log-probs (T,) under the first weights minus those of the model)."""
    words = small_world.WITH_PEER.format(answer=g.answer, demonstration=TOKENIZER.decode(peer.token_ids[:-1]))
    prompt = TOKENIZER(g.prompt + words)["input_ids"]
    ids = torch.tensor([[*prompt, *rollout.token_ids]])

    def logps(m):
        return m(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])

    return ids.shape[1], (logps(first).detach() - logps(model)).squeeze(-1)


def test_what_is_refused(tmp_path, fresh):
    with pytest.raises(ValueError, match="teacher: expected 'live' with a cure, got 'fixed'"):
        step(tmp_path, fresh(), ("share", 0.1), teacher="fixed")
    with pytest.raises(ValueError, match=r"reference_coef: expected 0.0 with a cure, got 0.1"):
        step(tmp_path, fresh(), ("share", 0.1), reference_coef=0.1)
    with pytest.raises(ValueError, match=r"cure: expected one of plain, .* got 'charm'"):
        step(tmp_path, fresh(), ("charm", 0.1))
    with pytest.raises(ValueError, match="held: expected rows with the cure 'hold' and with no other, got None"):
        step(tmp_path, fresh(), ("hold", 0.1))
    alone = [group("1+2=", "3", **{"#3$": 1.0})]
    with pytest.raises(ValueError, match="expected a rollout with a successful peer, got none in 1 groups"):
        Held(fresh(), TOKENIZER, alone, seed=0)


def finished(part, name, seed, success):
    measured = [
        {"step": s, **dict.fromkeys(("common", "closed", "evaded", "gap", "drift", "left"), seed + s / 1000)}
        for s in range(5, 301, 5)
    ]
    return {
        "run": vars(Run(part, name, seed, 300, 2600, "hsd")),
        "steps": {"hsd/success_rate": [success] * 300},
        "final": {"mean": success},
        "alarms": {"success": "step 31: success fell"} if success < 0.5 else {},
        "probes": measured,
    }


def test_tables_seed_by_seed():
    runs = [finished("cures", "share 0.5", s, x) for s, x in ((2, 0.6), (0, 0.9), (1, 0.1))]
    runs += [finished("long", "live", 0, 0.3)]
    table = tables.held(runs, "cures")
    assert "| run | seeds | step 50 | step 100 | step 200 | step 300 | final | alarms |" in table
    cells = " | ".join(["0.90 0.10 0.60"] * 4)
    assert table[-1] == f"| share 0.5 | 0 1 2 | {cells} | 0.900 0.100 0.600 | seed 1, step 31: success fell |"
    assert tables.held(runs, "long")[-1].startswith("| live | 0 | 0.30 | 0.30 | ")
    moved = tables.probes(runs, "cures")
    assert moved[-1].startswith("| share 0.5 | 200 to 300 | 0.25 1.25 2.25 | ") and "0.300 1.300 2.300" in moved[-1]
    assert tables.held(runs[:3], "long") == tables.probes(runs[:3], "long") == []


def test_every_row_of_the_plan_is_a_cure():
    assert {kind for (kind, _), _ in CURES.values()} == {"plain", "share", "subtract", "hold"}
    assert "hsd/cure" in KEPT and json.dumps([cure for cure, _ in CURES.values()])
