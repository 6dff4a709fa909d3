"""The objective J against full logits in fp64, and which positions of a batch predict a rollout."""

import dataclasses
import math

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

from hsd.policy.body_and_head import Split, split_model
from hsd.train.update import Objective, Side, frozen_side, hsd_loss, read_rollouts, rollout_weights
from hsd_kernels import Divergence

B, T, D, V = 3, 5, 6, 11
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])


def head(seed: int, dim: int = D, bias: bool = True) -> nn.Linear:
    torch.manual_seed(seed)
    linear = nn.Linear(dim, V, bias=bias).double()
    nn.init.normal_(linear.weight, std=0.8)
    return linear


def draw(seed: int, dim: int = D) -> torch.Tensor:
    return torch.randn(B, T, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_probs(hidden, weight, bias, scale=1.0, cap=None, temperature=1.0) -> torch.Tensor:
    z = (torch.einsum("btd,vd->btv", hidden, weight) + (0 if bias is None else bias)) * scale
    z = z if cap is None else cap * (z / cap).tanh()
    return (z / temperature).log_softmax(-1)


def kl(log_p, log_q) -> torch.Tensor:
    """KL(p || q) per token."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def mean_of_means(per_token, mask) -> torch.Tensor:
    """1/B sum_i 1/|o_i| sum_t, by loops; a rollout without tokens adds 0."""
    total = torch.zeros((), dtype=per_token.dtype)
    for row, kept in zip(per_token, mask, strict=True):
        if kept.any():
            total = total + row[kept.bool()].mean()
    return total / len(per_token)


def js(log_s, log_t, share) -> torch.Tensor:
    m = ((1 - share) * log_s.exp() + share * log_t.exp()).log()
    return share * kl(log_t, m) + (1 - share) * kl(log_s, m)


DIVERGENCES = {
    "forward_kl": lambda s, t: kl(t, s),
    "reverse_kl": lambda s, t: kl(s, t),
    "jsd": lambda s, t: js(s, t, 0.3),
}


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("coef", [0.0, 0.7])
@pytest.mark.parametrize("form", [{}, {"logit_scale": 0.5, "softcap": 1.5}], ids=["plain", "scaled+capped"])
def test_loss_and_gradients_against_full_logits(divergence, coef, form):
    own, teacher_head, reference_head = head(1), head(2, 4), head(3, 7, bias=False)
    student = draw(4).requires_grad_()
    teacher = Side(draw(5, 4), teacher_head.weight.detach(), teacher_head.bias.detach())
    reference = Side(draw(6, 7), reference_head.weight.detach())
    targets = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(7))
    objective = Objective(Divergence(divergence, beta=0.3, temperature=1.3), reference_coef=coef, chunk_bytes=4 * V * 8)
    split = Split(nn.Identity(), own, **form)
    out = hsd_loss(student, split, teacher, targets, MASK, objective, reference)

    scale, cap = form.get("logit_scale", 1.0), form.get("softcap")
    logits = {"scale": scale, "cap": cap}
    s = log_probs(student, own.weight, own.bias, **logits, temperature=1.3)
    t = log_probs(teacher.hidden, teacher.weight, teacher.bias, **logits, temperature=1.3)
    per_token = DIVERGENCES[divergence](s, t)
    untempered = log_probs(student, own.weight, own.bias, **logits)
    to_reference = kl(untempered, log_probs(reference.hidden, reference.weight, None, **logits))
    expected = mean_of_means(per_token + coef * to_reference, MASK)

    torch.testing.assert_close(out.loss, expected, rtol=1e-6, atol=0)  # the weights 1 / (B |o_i|) are fp32
    live = MASK.bool()
    torch.testing.assert_close(out.stats.kl[live], per_token.detach()[live])
    picked = s.detach().gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(out.stats.student_logps[live], picked[live])
    picked = t.detach().gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(out.stats.teacher_logps[live], picked[live])
    if coef:
        torch.testing.assert_close(out.reference.kl[live], to_reference.detach()[live])
    else:
        assert out.reference is None
    inputs = (student, own.weight, own.bias)
    mine, theirs = torch.autograd.grad(out.loss, inputs), torch.autograd.grad(expected, inputs)
    for got, wanted in zip(mine, theirs, strict=True):
        assert wanted.abs().max() > 1e-3
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-8)


def test_the_default_objective_shares_the_students_head():
    own = head(1)
    student, teacher = draw(4), draw(5)
    out = hsd_loss(student, Split(nn.Identity(), own), Side(teacher), torch.zeros_like(MASK), MASK, Objective())
    sides = (log_probs(h, own.weight, own.bias).detach() for h in (teacher, student))
    torch.testing.assert_close(out.loss, mean_of_means(kl(*sides), MASK), rtol=1e-6, atol=0)


def test_kl_clip_reaches_the_loss():
    own = head(1)
    student, teacher = draw(4), draw(5)
    split, targets = Split(nn.Identity(), own), torch.zeros_like(MASK)
    out = hsd_loss(student, split, Side(teacher), targets, MASK, Objective(Divergence(clip=0.05)))
    t, s = (log_probs(h, own.weight, own.bias).detach() for h in (teacher, student))
    summands = t.exp() * (t - s)
    assert (summands > 0.05).any()
    torch.testing.assert_close(out.loss, mean_of_means(summands.clamp_max(0.05).sum(-1), MASK), rtol=1e-6, atol=0)


def test_a_rollout_without_tokens_counts_with_loss_0():
    """And what stands at masked positions, NaN included, does not matter."""
    own, mask = head(1), MASK.clone()
    mask[1] = 0
    student, teacher = draw(4), draw(5)
    clean = student.clone()
    student[1], teacher[1] = math.nan, math.nan
    student.requires_grad_()
    targets = torch.zeros_like(mask)
    out = hsd_loss(student, Split(nn.Identity(), own), Side(teacher), targets, mask, Objective())
    t, s = (log_probs(h, own.weight, own.bias).detach() for h in (teacher, clean))
    per_token = kl(t, s)
    expected = (per_token[0].mean() + per_token[2, :3].mean()) / 3
    torch.testing.assert_close(out.loss.detach(), expected, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(out.loss, student)
    assert gradient[1].abs().max() == 0
    assert gradient[0].abs().min() > 0


def test_rollout_weights_sum_to_one():
    weights = rollout_weights(MASK)
    assert weights.sum().item() == pytest.approx(1.0)
    torch.testing.assert_close(weights.sum(-1), torch.full((B,), 1 / 3))
    assert torch.equal(weights != 0, MASK.bool())
    torch.testing.assert_close(weights[1], torch.tensor([1 / 6, 1 / 6, 0, 0, 0]))
    emptied = rollout_weights(MASK * torch.tensor([[1], [0], [1]]))
    torch.testing.assert_close(emptied.sum(-1), torch.tensor([1 / 3, 0.0, 1 / 3]))


def test_a_missing_reference_is_named():
    student = draw(4)
    with pytest.raises(ValueError, match=r"^reference: expected hidden states with reference_coef=0\.1, got None"):
        hsd_loss(
            student,
            Split(nn.Identity(), head(1)),
            Side(draw(5)),
            torch.zeros_like(MASK),
            MASK,
            Objective(reference_coef=0.1),
        )


def qwen3() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 4}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=V, num_attention_heads=4, num_key_value_heads=2, **sizes))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=16, n_layer=2, n_head=4, n_positions=32))


@pytest.mark.parametrize("build", [qwen3, gpt2])
def test_read_rollouts_gives_the_states_that_predict_the_rollout(build):
    torch.manual_seed(1)
    model = build().float().eval()
    for p in model.parameters():
        nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.3)
    prompts, rollouts = [[2, 3, 4], [5]], [[6, 7, 8, 9], [10, 1]]
    ids = torch.tensor([[2, 3, 4, 6, 7, 8, 9], [0, 0, 5, 10, 1, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0, 0]])
    split = split_model(model)
    with torch.no_grad():
        states = read_rollouts(split, ids, mask, 4)
        assert states.shape == (2, 4, 16)
        for prompt, rollout, h in zip(prompts, rollouts, states, strict=True):
            logits = model(input_ids=torch.tensor([prompt + rollout]), use_cache=False).logits[0]
            expected = logits[len(prompt) - 1 : -1]  # the last prompt token predicts the first of the rollout
            torch.testing.assert_close(h[: len(rollout)] @ split.weight.T, expected, rtol=1e-4, atol=1e-5)


def test_read_rollouts_hands_back_the_heads_dtype_outside_of_autocast():
    class Wide(nn.Module):
        def forward(self, input_ids, attention_mask, use_cache):
            out = torch.ones(*input_ids.shape, D, dtype=torch.float32)
            return dataclasses.make_dataclass("Out", ["last_hidden_state"])(out)

    split = Split(Wide(), head(1).bfloat16())
    ids = torch.ones(2, 4, dtype=torch.long)
    assert read_rollouts(split, ids, ids, 2).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert read_rollouts(split, ids, ids, 2).dtype == torch.float32


def test_frozen_side_brings_its_own_head_without_gradient():
    own = head(1)
    side = frozen_side(Split(nn.Identity(), own), draw(4))
    assert torch.equal(side.weight, own.weight) and not side.weight.requires_grad
    assert torch.equal(side.bias, own.bias) and not side.bias.requires_grad
    assert frozen_side(Split(nn.Identity(), head(1, bias=False)), draw(4)).bias is None
