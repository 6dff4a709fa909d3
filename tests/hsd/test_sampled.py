"""Losses on the sampled token against full logits in fp64, by autograd."""

import pytest
import torch
from torch import nn

from hsd import sampled
from hsd.sampled import clipped_surrogate, k3, sampled_logps, sampled_loss
from hsd_kernels import Head

B, T, D, V = 3, 7, 5, 13


def case(dtype=torch.float64, bias=True, scale=1.0, cap=None):
    torch.manual_seed(0)
    head = nn.Linear(D, V, bias=bias).to(dtype)
    hidden = torch.randn(B, T, D, dtype=dtype, requires_grad=True)
    targets = torch.randint(V, (B, T))
    weights = torch.rand(B, T) * (torch.rand(B, T) > 0.3)
    return hidden, Head(head.weight, head.bias, scale, cap), targets, weights


def plain_logps(hidden, head, targets, temperature):
    z = nn.functional.linear(hidden, head.weight, head.bias) * head.logit_scale
    z = z if head.softcap is None else head.softcap * (z / head.softcap).tanh()
    return (z / temperature).log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)


@pytest.mark.parametrize("rows", [1, 4, 1000])
@pytest.mark.parametrize(
    ("bias", "scale", "cap", "temperature"), [(True, 1.0, None, 1.0), (False, 0.5, 3.0, 0.7), (True, 2.0, None, 1.3)]
)
def test_loss_and_every_gradient(bias, scale, cap, temperature, rows, monkeypatch):
    monkeypatch.setattr(sampled, "CHUNK_BYTES", rows * V * 8)
    hidden, head, targets, weights = case(bias=bias, scale=scale, cap=cap)
    advantages = torch.randn(B * T, dtype=torch.float64)
    old = -3.0 + torch.rand(B * T, dtype=torch.float64)

    def token_loss(logps, at):
        return clipped_surrogate(logps, old[at], advantages[at], 0.2, 0.3) + 0.1 * k3(logps, old[at])

    loss, logps = sampled_loss(hidden, head, targets, weights, token_loss, temperature=temperature)
    trained = [hidden, *(x for x in (head.weight, head.bias) if x is not None)]
    got = torch.autograd.grad(2.0 * loss, trained)

    expected_logps = plain_logps(hidden, head, targets, temperature)
    per_token = token_loss(expected_logps.reshape(-1), torch.arange(B * T)).view(B, T)
    expected = (weights * per_token).sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logps, expected_logps.detach() * (weights != 0))
    for g, e in zip(got, torch.autograd.grad(2.0 * expected, trained), strict=True):
        torch.testing.assert_close(g, e)


def test_logps_have_no_gradient_and_masked_tokens_are_not_read():
    hidden, head, targets, weights = case()
    poisoned = hidden.detach().clone()
    poisoned[weights == 0] = torch.nan
    targets = targets.where(weights != 0, -100)
    logps = sampled_logps(poisoned, head, targets, weights)
    assert not logps.requires_grad and logps.isfinite().all()
    loss, _ = sampled_loss(poisoned.requires_grad_(), head, targets, weights, lambda lp, at: -lp)
    loss.backward()
    assert poisoned.grad.isfinite().all()


def test_nothing_to_do():
    hidden, head, targets, weights = case()
    loss, logps = sampled_loss(hidden, head, targets, torch.zeros_like(weights), lambda lp, at: -lp)
    loss.backward()
    assert loss == 0 and (logps == 0).all() and (hidden.grad == 0).all()


def test_bf16_loses_what_rounding_the_operands_loses():
    """fp32 logits and accumulation: the log-probs of bf16 operands are those of the same numbers in fp32."""
    hidden, head, targets, weights = case(torch.bfloat16)
    logps = sampled_logps(hidden, head, targets, weights)
    wide = Head(head.weight.float(), head.bias.float())
    torch.testing.assert_close(logps, sampled_logps(hidden.detach().float(), wide, targets, weights), rtol=0, atol=1e-5)


def test_autocast_computes_in_bf16():
    hidden, head, targets, weights = case(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, logps = sampled_loss(hidden, head, targets, weights, lambda lp, at: -lp)
    loss.backward()
    expected = sampled_logps(hidden.detach(), head, targets, weights)
    gap = (logps - expected).abs().max()
    assert 0 < gap < 0.05 and hidden.grad.dtype == torch.float32


def test_without_old_log_probs_the_surrogate_is_the_policy_gradient():
    logps = torch.randn(6, dtype=torch.float64, requires_grad=True)
    advantages = torch.randn(6, dtype=torch.float64)
    (g,) = torch.autograd.grad(clipped_surrogate(logps, None, advantages).sum(), logps)
    torch.testing.assert_close(g, -advantages)
