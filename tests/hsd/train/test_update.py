"""The objective J against full logits in fp64."""

import math

import pytest
import torch
from torch import nn

from hsd.policy.forward import FrozenStates
from hsd.train.update import Objective, hsd_loss, rollout_weights
from hsd_kernels import Divergence, Head

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
    teacher = FrozenStates(draw(5, 4), Head(teacher_head.weight.detach(), teacher_head.bias.detach(), **form))
    reference = FrozenStates(draw(6, 7), Head(reference_head.weight.detach(), **form))
    targets = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(7))
    kind = Divergence(divergence, beta=0.3, temperature=1.3)
    objective = Objective(kind, reference_coef=coef, memory_bytes=4 * V * 8)
    out = hsd_loss(student, Head(own.weight, own.bias, **form), teacher, targets, MASK, objective, reference)

    scale, cap = form.get("logit_scale", 1.0), form.get("softcap")
    logits = {"scale": scale, "cap": cap}
    s = log_probs(student, own.weight, own.bias, **logits, temperature=1.3)
    t = log_probs(teacher.hidden, teacher_head.weight, teacher_head.bias, **logits, temperature=1.3)
    per_token = DIVERGENCES[divergence](s, t)
    untempered = log_probs(student, own.weight, own.bias, **logits)
    to_reference = kl(untempered, log_probs(reference.hidden, reference_head.weight, None, **logits))
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
    out = hsd_loss(
        student, Head(own.weight, own.bias), FrozenStates(teacher), torch.zeros_like(MASK), MASK, Objective()
    )
    sides = (log_probs(h, own.weight, own.bias).detach() for h in (teacher, student))
    torch.testing.assert_close(out.loss, mean_of_means(kl(*sides), MASK), rtol=1e-6, atol=0)


def test_kl_clip_reaches_the_loss():
    own = head(1)
    student, teacher = draw(4), draw(5)
    targets, objective = torch.zeros_like(MASK), Objective(Divergence(clip=0.05))
    out = hsd_loss(student, Head(own.weight, own.bias), FrozenStates(teacher), targets, MASK, objective)
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
    out = hsd_loss(student, Head(own.weight, own.bias), FrozenStates(teacher), targets, mask, Objective())
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
            Head(head(1).weight),
            FrozenStates(draw(5)),
            torch.zeros_like(MASK),
            MASK,
            Objective(reference_coef=0.1),
        )


def test_a_loss_of_no_term_is_0_where_fp16_has_no_sum_of_the_states():
    student = torch.full((1, 4, 256), 100.0, dtype=torch.float16, requires_grad=True)
    weight = torch.zeros(V, 256, dtype=torch.float16, requires_grad=True)
    assert student.sum().isinf()
    objective = Objective(divergence_coef=0.0)
    out = hsd_loss(student, Head(weight), FrozenStates(student.detach()), MASK[:1, :4], MASK[:1, :4], objective)
    out.loss.backward()
    assert out.loss == 0.0 and not student.grad.any() and not weight.grad.any()
