"""top_k and the teacher's floor: the torch rows against autograd of the reference, and what follows by algebra."""

import math

import pytest
import torch

from hsd_kernels import Divergence, fused_hsd_kl, reference

N, D, V = 7, 5, 13
OPTIONS = [
    {"top_k": 4},
    {"top_k": 4, "top_of": "teacher"},
    {"top_k": 4, "rest": "renormalise"},
    {"top_k": 4, "top_of": "teacher", "rest": "renormalise", "clip": 0.05},
    {"top_k": 1, "floor": 0.2},
    {"floor": 0.2},
    {"floor": 0.7, "top_k": 6, "clip": 0.1, "clip_form": "nonnegative"},
    {"top_k": 3, "temperature": 1.3},
]
KINDS = ["forward_kl", "reverse_kl", "jsd"]


def draw(seed, *shape, dtype=torch.float64):
    return 2.0 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def case(dtype=torch.float64):
    return (
        draw(1, N, D, dtype=dtype).requires_grad_(),
        draw(2, N, D, dtype=dtype),
        draw(3, V, D, dtype=dtype).requires_grad_(),
    )


def both(divergence, impl="torch", dtype=torch.float64):
    """(loss, gradients) of the kernel and of the reference."""
    out = []
    for fused in (True, False):
        student, teacher, weight = case(dtype)
        weights = torch.linspace(0.0, 2.0, N, dtype=dtype)
        if fused:
            loss = fused_hsd_kl(student, teacher, weight, divergence=divergence, token_weights=weights, impl=impl)
        else:
            loss = reference.hsd_kl(student, teacher, weight, divergence=divergence, token_weights=weights)
        out.append((loss, *torch.autograd.grad(loss, (student, weight))))
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_value_and_gradient_are_the_references(kind, options):
    got, wanted = both(Divergence(kind, **options))
    assert wanted[1].abs().max() > 1e-3
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("impl", ["auto", "torch"])
@pytest.mark.parametrize("options", OPTIONS[:6], ids=str)
def test_single_precision_on_every_backend_that_is_here(impl, options):
    got, wanted = both(Divergence("reverse_kl", **options), impl, torch.float32)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [V - 1, V, V + 5])
def test_all_but_one_token_and_a_tail_are_the_vocabulary(kind, top_k):
    (plain, *_), (bucketed, *_) = both(Divergence(kind))[0], both(Divergence(kind, top_k=top_k))[0]
    torch.testing.assert_close(bucketed, plain, rtol=1e-12, atol=0)
    for a, b in zip(both(Divergence(kind))[0], both(Divergence(kind, top_k=top_k))[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_sides_have_neither_loss_nor_gradient(kind):
    student = draw(1, N, D).requires_grad_()
    for options in OPTIONS:
        loss = fused_hsd_kl(
            student, student.detach(), draw(3, V, D), divergence=Divergence(kind, **options), impl="torch"
        )
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss.abs() < 1e-12 and gradient.abs().max() < 1e-12, options


def test_buckets_are_a_coarser_comparison():
    """By the data-processing inequality a tail can only lower a KL."""
    for k in range(1, V):
        assert both(Divergence(top_k=k))[0][0] <= both(Divergence())[0][0] + 1e-12


def test_renormalised_support_alone_has_a_gradient():
    z, q = draw(1, V).requires_grad_(), draw(2, V)
    eye = torch.eye(V, dtype=torch.float64)
    d = Divergence(top_k=4, top_of="teacher", rest="renormalise", temperature=1.2)
    loss = fused_hsd_kl(z[None], q[None], eye, divergence=d, impl="torch")
    (gradient,) = torch.autograd.grad(loss, z)
    at = q.topk(4).indices
    p_in, q_in = ((x.detach() / 1.2)[at].softmax(-1) for x in (z, q))
    expected = torch.zeros(V, dtype=torch.float64).scatter(-1, at, (p_in - q_in) / 1.2)
    torch.testing.assert_close(gradient, expected)


def test_a_floor_may_make_a_reverse_kl_negative_and_a_low_one_changes_nothing():
    assert both(Divergence("reverse_kl", floor=5.0))[0][0] < 0
    tiny = both(Divergence("reverse_kl", floor=1e-300))[0]
    for a, b in zip(tiny, both(Divergence("reverse_kl"))[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)


def test_a_tail_without_mass_is_finite():
    z = torch.zeros(1, V, dtype=torch.float32)
    z[0, 0] = 300.0
    z.requires_grad_()
    loss = fused_hsd_kl(z, torch.zeros(1, V), torch.eye(V), divergence=Divergence("reverse_kl", top_k=1), impl="torch")
    (gradient,) = torch.autograd.grad(loss, z)
    assert math.isfinite(loss.item()) and gradient.isfinite().all()


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[3], OPTIONS[5]], ids=str)
def test_gradcheck_and_opcheck(options):
    student, teacher, weight = case()
    d = Divergence("forward_kl", **{**options, "clip": None})
    fixed = weight.detach().clone()  # the teacher's head has no gradient
    call = lambda h, w: fused_hsd_kl(h, teacher, w, divergence=d, teacher_head=fixed, impl="torch")  # noqa: E731
    # A floor's constant follows the student: only autograd of the reference says what its gradient is.
    if "floor" not in options:
        assert torch.autograd.gradcheck(call, (student, weight))
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(student, weight), call(student, weight))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"top_k": 0}, "divergence.top_k: expected a finite number > 0, got 0"),
        ({"top_k": 1.5}, "divergence.top_k: expected an integer or None, got 1.5"),
        ({"top_of": "both"}, "divergence.top_of: expected one of"),
        ({"rest": "drop"}, "divergence.rest: expected one of"),
        ({"floor": 0.0}, "divergence.floor: expected a finite number > 0, got 0.0"),
    ],
)
def test_bad_options_are_named(options, error):
    with pytest.raises((ValueError, TypeError), match=error.replace("(", r"\(")):
        Divergence(**options)
