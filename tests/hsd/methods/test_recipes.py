"""Each recipe's loss and gradient against its equation over full logits in fp64, and identities of the equations."""

import json
import math
from dataclasses import replace

import pytest
import torch
from recipe_cases import (
    LENGTH,
    MASK,
    SHOWN,
    SUCCESS,
    B,
    Case,
    G,
    T,
    V,
    draw,
    entropy,
    kl,
    over_rollouts,
    over_tokens,
    surrogate,
)
from torch.nn.functional import softplus

from hsd.methods import METHODS
from hsd.methods.atesd_learned import Controller
from hsd.methods.cl_egrsd import lookahead
from hsd.methods.state import Hysteresis, RefreshGate, RunningMoments
from hsd.train.update import method_loss
from hsd_kernels import Head


def test_sdpg():
    c = Case("sdpg", step=25, method_args={"cap": 4.0})
    r = kl(c.p, c.q[0])
    assert (r[SHOWN] > 4.0).any() and (r < 4.0).any()
    dense = over_rollouts(r * (c.a > 0) * (r.detach() <= 4.0), c.shown)
    c.check(surrogate(c, c.a) + 0.5e-3 * dense + 0.5e-3 * over_rollouts(kl(c.p, c.r), c.shown))


def egrsd_expected(c, doubt):
    r = SUCCESS * (1 + 0.5 * (1 - LENGTH[:, 0] / 8))
    a = ((r - r.mean()) / r.std(correction=0))[:, None]
    most = max(1.0, entropy(c.q[0])[c.shown.bool()].max().item())
    w = (a.sign() * c.d).exp().clamp(0.8, 1.2) * (1 - 0.9 * doubt / most).clamp(0.1, 1.0)
    return surrogate(c, a * w)


def test_egrsd():
    c = Case("egrsd", method_args={"g": 0.9})
    c.check(egrsd_expected(c, entropy(c.q[0]) * c.shown))


def test_cl_egrsd():
    c = Case("cl_egrsd", method_args={"g": 0.9, "window": 2})
    h = entropy(c.q[0]) * c.shown
    doubt = torch.zeros_like(h)
    for i in range(B):
        for t in range(int(LENGTH[i])):
            doubt[i, t] = h[i, t : min(t + 2, int(LENGTH[i]))].min()
    c.check(egrsd_expected(c, doubt))
    assert torch.equal(lookahead(h, MASK, 1), h * MASK)


def test_egrsd_keeps_an_advantage_where_grpo_has_none():
    c = Case("egrsd", advantages=torch.zeros(B, dtype=torch.float64))
    assert c.advantages.abs().min() > 0


@pytest.mark.parametrize("method", ["egrsd", "cl_egrsd"])
def test_egrsd_does_nothing_under_grpos_advantage_of_an_unmixed_group(method):
    c = Case(method)
    batch = replace(c.batch, advantages=torch.zeros(B, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(c.loss(batch, c.objective).loss, c.hidden)
    assert gradient.abs().max() == 0


@pytest.mark.parametrize("method", ["rlrt", "rlsd", "rlcsd"])
def test_nothing_happens_without_an_advantage(method):
    c = Case(method, contexts=METHODS[method].max_contexts, advantages=torch.zeros(B, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(c.loss(c.batch, c.objective).loss, c.hidden)
    assert gradient.abs().max() == 0


def test_rlrt():
    c = Case("rlrt", method_args={"e": 0.5})
    w = (-c.a.sign() * c.d).exp().clamp(0.5, 1.5)
    c.check(surrogate(c, c.a * torch.where(SUCCESS[:, None], 0.5 + 0.5 * w, 1.0), over_tokens))
    plain = Case("rlrt", advantage_mix=0.0)
    plain.check(surrogate(plain, plain.a, over_tokens))


def test_rlrt_without_a_mix_is_dapo():
    a, b = Case("rlrt", advantage_mix=0.0), Case("dapo")
    assert a.objective.epsilon_high == b.objective.epsilon_high == 0.28
    assert a.loss(a.batch, a.objective).loss == b.loss(b.batch, b.objective).loss


@pytest.mark.parametrize("mix", [0.3, 1.0])
def test_rlrt_leaves_a_failures_tokens_alone(mix):
    """Whatever the mix: their gradient is that without one."""
    some, none = (Case("rlrt", advantage_mix=x) for x in (mix, 0.0))
    of_each = [torch.autograd.grad(c.loss(c.batch, c.objective).loss, c.hidden)[0] for c in (some, none)]
    torch.testing.assert_close(of_each[0][~SUCCESS], of_each[1][~SUCCESS], rtol=0, atol=0)
    assert not torch.allclose(of_each[0][SUCCESS], of_each[1][SUCCESS])


def test_rlcsd():
    c = Case("rlcsd", contexts=2, step=25)
    there = c.shown.clone()
    there[1] = 0  # it has no second context: q- = p
    d = (c.lq[0] - c.lp.detach()) * c.shown - (c.lq[1] - c.lp.detach()) * there
    w = (c.a.sign() * d).exp().clamp(0.8, 1.2)
    c.check(surrogate(c, c.a * torch.where(SHOWN[:, None], 0.75 + 0.25 * w, 1.0)))


@pytest.mark.parametrize(("warm", "gate"), [(0.1, 1.0), (1e6, 0.0)])
def test_antisd(warm, gate):
    c = Case("antisd", state=Hysteresis(level=warm, seen=[warm] * 5))
    phi = 0.5 * (softplus(c.d) - math.log(2.0))
    c.check(surrogate(c, c.a - 0.5 * gate * phi, over_tokens))


def test_antisd_is_the_ascent_of_the_jsd():
    """Over o ~ p, of one token's softmax, the expected gradient is minus that of JSD_0.5."""
    x, q = draw(1, V).requires_grad_(), draw(2, V).log_softmax(-1)
    p = x.log_softmax(-1)
    phi = 0.5 * (softplus(q - p.detach()) - math.log(2.0))
    expected = (p.detach().exp() * phi * p).sum()  # the loss -A log p with A = -phi
    m = (0.5 * p.exp() + 0.5 * q.exp()).log()
    jsd = 0.5 * (p.exp() * (p - m)).sum() + 0.5 * (q.exp() * (q - m)).sum()
    torch.testing.assert_close(torch.autograd.grad(expected, x, retain_graph=True)[0], -torch.autograd.grad(jsd, x)[0])


def test_vopd():
    c = Case("vopd", method_args={"rl": 1.0})
    b = (kl(c.p, c.q[0]) * c.shown).detach()
    c.check(surrogate(c, c.a + c.d + b, over_tokens))


def test_vopd_is_the_dense_reverse_kl_in_expectation():
    x, q = draw(1, V).requires_grad_(), draw(2, V).log_softmax(-1)
    p = x.log_softmax(-1)
    reverse = kl(p, q)
    dense = torch.autograd.grad(reverse, x, retain_graph=True)[0]
    d = (q - p).detach()
    assert (p.exp() * (d + reverse)).sum().item() == pytest.approx(0.0, abs=1e-12)
    for baseline in (0.0, reverse.item()):
        loss = -(p.detach().exp() * (d + baseline) * p).sum()
        torch.testing.assert_close(torch.autograd.grad(loss, x, retain_graph=True)[0], dense)


@pytest.mark.parametrize("in_training", [G, 2], ids=["training", "an evaluation with groups of another size"])
def test_ssopd(in_training):
    c = Case("ssopd", method_args={"tokens": 3}, num_generations=in_training)
    clipped = (c.q[0].exp() * (c.q[0] - c.p)).clamp(max=0.05).sum(-1)
    expected = surrogate(c, c.a)
    for i in range(B):
        if SHOWN[i]:
            s = SUCCESS.reshape(-1, G).double().mean(-1)[i // G]
            m = min(3, int(LENGTH[i]))
            expected = expected + 0.5 * 4 * s * (1 - s) * clipped[i, :m].mean() / (B // G)
    c.check(expected)


def test_msd():
    c = Case("msd", method_args={"no_confidence": 1.5})
    w = (1 - entropy(c.q[0]) / 1.5).clamp(0, 1) * (1 - c.lp.detach().exp())
    assert (w == 0).any() and (w > 0).any()
    c.check(over_tokens(w * kl(c.p, c.q[0]), c.shown))


def sgsd_losses(c, reward):
    total = 0
    for i in range(B):
        terms = []
        for k in range(8):
            if SHOWN[i] and (i != 1 or k == 0):
                d = (c.lq[k].detach() - c.lp)[i, : int(LENGTH[i])]
                s = d.detach().clamp(-3, 3).mean()
                sign = (1 if reward[i] > 0 else -1) * (s.sign() if abs(s) > 0.05 else 0)
                terms.append(sign * (math.log(2) - softplus(-0.5 * d.square())).mean())
        total = total + (sum(terms) / len(terms) if terms else 0)
    return total / B


def test_sgsd():
    c = Case("sgsd", contexts=8)
    c.check(sgsd_losses(c, SUCCESS.double()))
    assert abs(sgsd_losses(c, SUCCESS.double())) <= math.log(2)
    torch.testing.assert_close(sgsd_losses(c, SUCCESS.double()), -sgsd_losses(c, 1.0 - SUCCESS.double()))


def test_sgsd_neither_follows_nor_flees_without_a_verdict():
    def of_each(**given):
        c = Case("sgsd", contexts=8, **given)
        out = c.loss(c.batch, c.objective)
        return torch.autograd.grad(out.loss, c.hidden)[0].abs().sum((1, 2))

    whole, some = of_each(), of_each(scored=torch.arange(B) > 0)
    assert whole[0] > 0 and some[0] == 0
    torch.testing.assert_close(some[1:], whole[1:])


@pytest.mark.parametrize("method", ["mopd", "ccopd", "atesd", "hsd_unpaired"])
def test_contexts_alone_change_no_loss(method):
    c = Case(method, reference_coef=0.0)
    mean = over_tokens if c.config.loss_mean == "token" else over_rollouts
    dense = kl(c.p, c.q[0]) if c.config.divergence == "reverse_kl" else kl(c.q[0], c.p)
    c.check(mean(dense, c.shown))


def test_skipped_tokens_have_no_divergence():
    c = Case("hsd", skip_tokens=2, reference_coef=0.0)
    c.check(over_rollouts(kl(c.q[0], c.p), c.shown * (torch.arange(T) >= 2)))


def test_a_token_mean_and_a_dual_clip_of_the_policy_term():
    c = Case("grpo+opsd", policy_mean="token", delta=1.5, divergence_coef=0.0)
    old = (c.lp + draw(30, B, T)).detach()
    targets = c.batch.targets("rollout", "token")
    out = method_loss(
        c.hidden, Head(c.weight), c.teachers, None, type(targets)(**{**vars(targets), "old_logps": old}), c.objective
    )
    ratio = (c.lp - old).exp()
    value = torch.minimum(ratio.clamp_max(1.5) * c.a, ratio.clamp(0.8, 1.2) * c.a)
    expected = over_tokens(-value)
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-5, atol=0)
    got, wanted = (torch.autograd.grad(x, c.hidden)[0] for x in (out.loss, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-7)


# -- states ------------------------------------------------------------------------------------------------------------


def test_running_moments_are_those_of_all_values():
    values, moments = draw(1, 40, scale=3.0), RunningMoments()
    for part in values.split([1, 9, 30]):
        moments.update(part)
    assert moments.mean == pytest.approx(values.mean().item())
    assert moments.std == pytest.approx(values.std(correction=0).item())


def test_the_gate():
    gate = Hysteresis()
    assert [gate.step(v) for v in (1.0, 3.0, 2.0, 2.0, 9.0)] == [0.0] * 5 and gate.level == 2.0
    # Open at first, so also between the two levels; closed below 0.93 x 2; open again from 2 on only.
    assert [gate.step(v) for v in (1.9, 1.85, 1.9, 2.0, 1.87)] == [1.0, 0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("window", "horizon", "held"), [(1, 1, 2), (2, 1, 2), (3, 1, 3), (3, 2, 3), (3, 3, 4), (5, 2, 5)]
)
def test_a_share_is_held_for_its_window_and_learned_from_the_drops(window, horizon, held):
    """The gradient of log Beta(a; exp u, exp v) in u is exp(u) (digamma(exp u + exp v) - digamma(exp u) + log a)."""
    constants = {"window": window, "horizon": horizon, "discount": 0.5, "rate": 0.1}
    state, losses = Controller(share=0.3, u=0.2, v=-0.1), [2.0, 1.6, 1.5, 1.1, 0.8, 0.2]
    shares = []
    for step, loss in enumerate(losses):
        shares.append(state.share)
        if step == held:
            break
        state.step(loss, step, constants)
    assert shares[:held] == [0.3] * held and shares[held] != 0.3 and state.losses == []
    reward = sum(0.5**k * (losses[k] - losses[k + 1]) for k in range(horizon))
    a, b = (torch.tensor(x, dtype=torch.float64).exp() for x in (0.2, -0.1))
    du = a * (torch.digamma(a + b) - torch.digamma(a) + math.log(0.3))
    dv = b * (torch.digamma(a + b) - torch.digamma(b) + math.log(0.7))
    assert (state.u, state.v) == pytest.approx((0.2 + 0.1 * reward * du.item(), -0.1 + 0.1 * reward * dv.item()))


def test_a_teacher_is_refreshed_when_success_has_risen_and_few_rollouts_are_cut():
    gate = RefreshGate(window=2, gain=0.1, tail=0.2)
    steps = [(0.4, 0.0), (0.4, 0.0), (0.6, 0.0), (0.6, 0.0), (0.9, 0.5), (0.9, 0.5)]
    # The level is 0.4 at first; 0.5 is a refresh. Then success rises with cut rollouts among the two.
    assert [gate.step(*s) for s in steps] == [False, False, True, False, False, False]
    assert [gate.step(*s) for s in [(math.nan, 0.0), (0.9, 0.0), (0.9, 0.0)]] == [False, False, True]
    assert gate.level == 0.9


@pytest.mark.parametrize("made", [RunningMoments, Hysteresis])
def test_a_state_goes_through_json(made):
    first, second = made(), made()
    feed = (lambda s: s.update(draw(1, 5))) if made is RunningMoments else (lambda s: s.step(0.3))
    feed(first)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    feed(first), feed(second)
    assert first == second
