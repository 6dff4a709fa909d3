"""Logits of -inf, far below the range of exp, or very large."""

import pytest
import torch
from torch import Tensor

from hsd_kernels import Divergence, Head, fused_hsd_kl, reference
from hsd_kernels.divergence import DIVERGENCES
from hsd_kernels.testing import assert_within_budget, double, draw, grads, logit_pair, small_problem

INF = float("inf")
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)


@every_divergence
def test_log_probs_below_the_range_of_exp_on_both_sides(divergence):
    student, teacher = draw(6, 9), draw(6, 9, seed=1)
    student[:, 2:5] -= torch.tensor([110.0, 300.0, 3e4])
    teacher[:, 2:5] -= torch.tensor([3e4, 105.0, 200.0])
    pair = logit_pair(student, teacher)
    found = grads(fused_hsd_kl, *pair, divergence=divergence, beta=0.3)
    eager = grads(reference.hsd_kl, *pair, divergence=divergence, beta=0.3)
    exact = grads(reference.hsd_kl, *double(*pair), divergence=divergence, beta=0.3)
    for got, want, truth in zip(found, eager, exact, strict=True):
        assert got.isfinite().all()
        assert_within_budget(divergence, got, want, truth, scale=3e4)


def law(student: Tensor, teacher: Tensor, divergence: str, beta: float) -> tuple[Tensor, Tensor]:
    """(divergence, d / d student logits) of (N, V) fp64 logits where -inf is allowed: by cases, no log of 0."""
    q, p = student.softmax(-1), teacher.softmax(-1)

    def kl(a, b):
        terms = a * (a.clamp(min=1e-300).log() - b.clamp(min=1e-300).log())
        return torch.where(a > 0, torch.where(b > 0, terms, INF), 0.0)

    if divergence == "forward_kl":
        return kl(p, q).sum(-1), q - p
    if divergence == "reverse_kl":
        terms = kl(q, p)
        return terms.sum(-1), terms - q * terms.sum(-1, keepdim=True)
    m = (1 - beta) * q + beta * p
    terms = (1 - beta) * kl(q, m)
    return (beta * kl(p, m)).sum(-1) + terms.sum(-1), terms - q * terms.sum(-1, keepdim=True)


@every_divergence
@pytest.mark.parametrize("where", ["both", "student", "teacher"])
def test_minus_infinity_in_the_bias(where, divergence):
    """A vocabulary entry that one side or both can never produce, as padded vocabularies have."""
    student, teacher, weight = small_problem(7, 16, 23)
    blocked = torch.zeros(23)
    blocked[[0, 5, 22]] = -INF
    bias = blocked if where != "teacher" else torch.zeros(23)
    heads = {"student": {"teacher_head": weight}, "teacher": {"teacher_head": Head(weight, blocked)}}.get(where, {})
    found = grads(
        fused_hsd_kl,
        student,
        teacher,
        weight,
        bias,
        torch.ones(7),
        divergence=divergence,
        beta=0.3,
        reduction="none",
        **heads,
    )
    teacher_bias = torch.zeros(23) if where == "student" else blocked
    x = [h.double() @ weight.double().T + b for h, b in ((student, bias), (teacher, teacher_bias))]
    value, dz = law(*x, divergence, 0.3)
    infinite = (where, divergence) in (("student", "forward_kl"), ("teacher", "reverse_kl"))
    assert (value == INF).all() if infinite else value.isfinite().all()
    torch.testing.assert_close(found[0].double(), value, rtol=1e-5, atol=1e-6)
    if (where, divergence) == ("teacher", "reverse_kl"):
        return  # the gradient of an infinite reverse KL is not defined
    for got, want in zip(found[1:], (dz @ weight.double(), dz.T @ student.double(), dz.sum(0)), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


@every_divergence
def test_minus_infinity_statistics(divergence):
    student, teacher, weight = small_problem(7, 16, 23)
    bias = torch.zeros(23)
    bias[3] = -INF
    ids = torch.full((7,), 3)
    out = fused_hsd_kl(
        student, teacher, Head(weight, bias), divergence=divergence, target_ids=ids, reduction="sum", return_stats=True
    )
    assert (out.stats.student_logps == -INF).all() and (out.stats.teacher_logps == -INF).all()
    kept = torch.cat([weight[:3], weight[4:]])
    cut = fused_hsd_kl(student, teacher, kept, divergence=divergence, reduction="sum", return_stats=True)
    for name in ("kl", "student_entropy", "teacher_entropy", "student_lse", "teacher_lse"):
        torch.testing.assert_close(getattr(out.stats, name), getattr(cut.stats, name), msg=name)


@every_divergence
@pytest.mark.parametrize("size", ["offset 200", "1e4"])
def test_large_logits(size, divergence):
    student, teacher = draw(8, 33), draw(8, 33, seed=1)
    pair = (student + 200.0, teacher + 200.0) if size == "offset 200" else (student * 1e4, teacher * 1e4)
    scale = max(t.abs().max().item() for t in pair)
    pair = logit_pair(*pair)
    found = grads(fused_hsd_kl, *pair, divergence=divergence)
    eager = grads(reference.hsd_kl, *pair, divergence=divergence)
    exact = grads(reference.hsd_kl, *double(*pair), divergence=divergence)
    names = ("loss", "student_hidden", "head.weight")
    for name, got, want, truth in zip(names, found, eager, exact, strict=True):
        # d weight is dz^T h: the logits once more. A KL of 1e4 carries the rounding of a probability 1e4 times.
        size_of = scale * max(1.0, truth.abs().max().item())
        assert_within_budget(name, got, want, truth, scale=2.0 * size_of)


@pytest.mark.parametrize("where", ["both", "student"])
@every_divergence
def test_the_definition_keeps_its_gradient_beside_an_impossible_token(where, divergence):
    """Autograd of ``0 * log 0`` is NaN where the 0 is chosen after the product."""
    student, teacher = draw(5, 9, dtype=torch.float64).requires_grad_(), draw(5, 9, seed=1, dtype=torch.float64)
    blocked = torch.zeros(9, dtype=torch.float64)
    blocked[[2, 8]] = -INF
    of_teacher = teacher + (blocked if where == "both" else 0.0)
    value = reference.per_token_divergence(student + blocked, of_teacher, Divergence(divergence, beta=0.3))
    (found,) = torch.autograd.grad(value.sum(), student)
    want, gradient = law(student.detach() + blocked, of_teacher, divergence, 0.3)
    torch.testing.assert_close(value.detach(), want)
    torch.testing.assert_close(found, gradient)


@every_divergence
@pytest.mark.parametrize("impl", ["torch", "auto"])
def test_one_token_in_the_vocabulary_has_nothing_to_learn(impl, divergence):
    """log_softmax of one logit is 0 whatever the logit is."""
    student, teacher = draw(6, 8).requires_grad_(), draw(6, 8, seed=1)
    head = Head(draw(1, 8, seed=2).requires_grad_(), draw(1, seed=3).requires_grad_())
    loss = fused_hsd_kl(student, teacher, head, divergence=divergence, impl=impl)
    loss.backward()
    for value in (loss.detach(), student.grad, head.weight.grad, head.bias.grad):
        assert value.eq(0).all()
