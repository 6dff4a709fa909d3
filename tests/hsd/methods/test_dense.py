"""Recipes whose loss is one divergence, and GRPO's variants, against full logits in fp64, off the sampler's policy."""

import math
from dataclasses import replace

import pytest
import torch
from recipe_cases import LENGTH, MASK, B, Case, T, draw, kl, over_rollouts, over_tokens, surrogate

OLD = draw(30, B, T, scale=0.9)  # log p_old - log p: some ratios are beyond every clip
CONTROLLER = {"window": 2, "horizon": 1, "discount": 0.9, "rate": 0.5}


def off_policy(method, **options):
    c = Case(method, **options)
    c.batch = replace(c.batch, old_logps=(c.lp + OLD).detach())
    return c


def js(p, q):
    m = (0.5 * p.exp() + 0.5 * q.exp()).log()
    return 0.5 * (kl(q, m) + kl(p, m))


def clipped(p, q):
    return (q.exp() * (q - p)).clamp(max=0.05).sum(-1)


def forward(p, q):
    return kl(q, p)


def test_hsd():
    c = Case("hsd", reference_coef=0.3)
    c.check(over_rollouts(kl(c.q[0], c.p), c.shown) + 0.3 * over_rollouts(kl(c.p, c.r), c.shown))


@pytest.mark.parametrize(
    ("method", "options", "divergence", "temperature"),
    [
        ("opsd", {}, clipped, 1.0),
        ("sdft", {}, js, 1.0),
        ("atesd_learned", {"method_args": CONTROLLER}, forward, 1.0),
        ("step_critique", {}, forward, 1.1),
        ("step_critique", {"divergence": "reverse_kl"}, kl, 1.1),
    ],
)
def test_a_divergence_over_tokens(method, options, divergence, temperature):
    c = off_policy(method, **options)  # no importance ratio
    p, q = ((x / temperature).log_softmax(-1) for x in (c.p, c.q[0]))
    c.check(over_tokens(divergence(p, q), c.shown))


@pytest.mark.parametrize(("method", "divergence"), [("sdpo", js), ("opcod", js), ("mopd", kl)])
def test_a_divergence_weighted_by_the_capped_ratio(method, divergence):
    c = off_policy(method)
    ratio = (-OLD).exp().clamp(max=2.0)
    assert (ratio[c.shown.bool()] == 2.0).any()
    c.check(over_tokens(ratio * divergence(c.p, c.q[0]), c.shown))


def test_rcsd_at_its_temperature():
    c = Case("rcsd", kl_top_k=4)
    at = c.q[0].topk(4, -1).indices
    p, q = ((x / 1.2).gather(-1, at).log_softmax(-1) for x in (c.p, c.q[0]))
    c.check(over_tokens(clipped(p, q), c.shown))


def test_resd_as_published():
    """JSD over the student's top k and a tail, q floored bucket by bucket; the floor's constant has no gradient."""
    c = off_policy("resd", kl_top_k=4, method_args={"weighted": False})
    at = c.p.detach().topk(4, -1).indices
    tail = lambda x: x.scatter(-1, at, -torch.inf).logsumexp(-1, keepdim=True)  # noqa: E731
    p, q = (torch.cat([x.gather(-1, at), tail(x)], -1) for x in (c.p, c.q[0]))
    floored = torch.maximum(q, p.detach() + math.log(0.2))
    assert (floored > q).any()
    c.check(over_tokens((-OLD).exp().clamp(max=2.0) * js(p, floored), c.shown))


def test_rlsd():
    c = Case("rlsd", step=25)
    w = (c.a.sign() * c.d).exp().clamp(0.8, 1.2)
    c.check(surrogate(c, c.a * (0.75 + 0.25 * w)))


def test_grpo_beside_opsd():
    c = Case("grpo+opsd")
    c.check(surrogate(c, c.a) + 0.5 * over_rollouts(clipped(c.p, c.q[0]), c.shown))


def least(c, ratio, low, high, most=math.inf):
    return -torch.minimum(ratio.clamp(max=most) * c.a, ratio.clamp(1.0 - low, 1.0 + high) * c.a)


@pytest.mark.parametrize(
    ("method", "args", "high", "most", "mean"),
    [
        ("grpo", None, 0.2, math.inf, over_rollouts),
        ("npo", {"gate": 0.5}, 0.2, math.inf, over_rollouts),
        ("dapo", None, 0.28, math.inf, over_tokens),
        ("actguide", None, 0.2, 3.0, over_tokens),
    ],
)
def test_the_surrogate(method, args, high, most, mean):
    c = off_policy(method, method_args=args)
    ratio = (c.lp - c.lp.detach() - OLD).exp()
    expected = mean(least(c, ratio, 0.2, high, most))
    if method == "actguide":
        gap = c.lr - c.lp
        expected = expected + 0.001 * mean(gap.exp() - gap - 1.0)
    c.check(expected)


def test_dr_grpo():
    c = off_policy("dr_grpo")
    c.batch = replace(c.batch, teacher=replace(c.batch.teacher, policy_tokens_per_micro_batch=torch.tensor(8.0 * B)))
    ratio = (c.lp - c.lp.detach() - OLD).exp()
    c.check((least(c, ratio, 0.2, 0.2) * MASK).sum() / (B * 8))


def test_gspo():
    c = off_policy("gspo", epsilon=0.1, epsilon_high=0.2)
    mean = ((c.lp - c.lp.detach() - OLD) * MASK).sum(-1, keepdim=True) / LENGTH
    c.check(over_rollouts(least(c, mean.exp(), 0.1, 0.2).expand(B, T)))
