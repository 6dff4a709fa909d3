"""Upstream gradients, repeated and refused backwards, frozen and tied inputs, and what is kept for the backward."""

import pytest
import torch

from hsd_kernels import Head, fused_hsd_kl, reference
from hsd_kernels.testing import double, draw, grads, small_problem

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64


@pytest.mark.parametrize("dtype", [F64, F32, BF16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("trained", ["student", "head", "both"])
def test_upstream_gradient(trained, reduction, dtype):
    student, teacher, weight = small_problem(dtype=dtype)
    bias = draw(61, dtype=dtype)
    wide = F64 if dtype == F64 else F32
    upstream = draw(10, dtype=wide) if reduction == "none" else torch.tensor(-1.0 / 3.0, dtype=wide)
    # Token weights as large as this and a mean: fp16 has no room for the gradient before the division.
    options = {"token_weights": torch.linspace(0.5, 2.0, 10), "reduction": reduction}
    exact = grads(reference.hsd_kl, *double(student, teacher, weight, bias), upstream.double(), **options)[1:]
    leaves = [t.clone().requires_grad_(g in (trained, "both")) for t, g in ((student, "student"), (weight, "head"))]
    leaves.append(bias.clone().requires_grad_(trained != "student"))
    fused_hsd_kl(leaves[0], teacher, Head(*leaves[1:]), **options).backward(upstream)
    for leaf, truth in zip(leaves, exact, strict=True):
        if not leaf.requires_grad:
            assert leaf.grad is None
            continue
        error = ((leaf.grad.double() - truth).abs().sum() / truth.abs().sum()).item()
        assert error <= {F64: 1e-13, F32: 3e-6, BF16: 4e-3, torch.float16: 5e-4}[dtype]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_upstream_gradient_is_not_rounded_to_the_gradient_dtype(reduction):
    """-1/3 in bf16 is off by 0.13 %, in every entry alike, as much as all other errors of the gradient."""
    student, teacher, weight = small_problem(dtype=BF16)
    shape = (10,) if reduction == "none" else ()
    leaf = student.clone().requires_grad_()
    loss = fused_hsd_kl(leaf, teacher, weight, reduction=reduction)
    one, third = (
        torch.autograd.grad(loss, leaf, torch.full(shape, u), retain_graph=True)[0] for u in (1.0, -1.0 / 3.0)
    )
    assert torch.equal(third, (one.float() * (-1.0 / 3.0)).to(BF16))


def test_fp16_with_a_loss_scale():
    """torch.amp.GradScaler starts at 65,536, infinity in fp16, and is there because small gradients vanish in fp16."""
    student, teacher, weight = small_problem(64, 16, 61, torch.float16, near=0.02)
    exact = grads(reference.hsd_kl, *double(student, teacher, weight), num_items=32768)
    for reduction, upstream in (("mean", torch.tensor(65536.0)), ("none", torch.full((64,), 2.0))):
        found = grads(fused_hsd_kl, student, teacher, weight, upstream=upstream, reduction=reduction, num_items=32768)
        for got, truth in zip(found[1:], exact[1:], strict=True):
            scaled = truth * 65536.0
            assert got.isfinite().all()
            assert (got.double() - scaled).abs().sum() <= 2e-3 * scaled.abs().sum()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("head", [True, False])
def test_backward_twice_with_retain_graph(head, reduction):
    student, teacher, weight = small_problem()
    upstream = draw(10) if reduction == "none" else torch.tensor(0.3)
    leaves = [student.requires_grad_(), weight.requires_grad_(head)]
    loss = fused_hsd_kl(leaves[0], teacher, leaves[1], reduction=reduction)
    loss.backward(upstream, retain_graph=True)
    once = [t.grad.clone() for t in leaves if t.requires_grad]
    loss.backward(upstream)
    for first, t in zip(once, leaves, strict=False):
        assert torch.equal(t.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward(upstream)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_derivative_is_refused(reduction):
    student, teacher, weight = small_problem()
    student.requires_grad_()
    loss = fused_hsd_kl(student, teacher, weight, reduction=reduction).sum()
    scale = torch.ones((), requires_grad=True)
    with pytest.raises(RuntimeError, match=r"^fused_hsd_kl: expected create_graph=False"):
        torch.autograd.grad(loss * scale, student, create_graph=True)


@pytest.mark.parametrize("moved", ["student", "teacher", "weight"])
def test_a_forward_mode_derivative_is_refused(moved):
    student, teacher, weight = small_problem()
    tensors = {"student": student, "teacher": teacher, "weight": weight}
    with torch.autograd.forward_ad.dual_level():
        tensors[moved] = torch.autograd.forward_ad.make_dual(tensors[moved], torch.ones_like(tensors[moved]))
        with pytest.raises(RuntimeError, match=r"^fused_hsd_kl: expected tensors without a tangent"):
            fused_hsd_kl(*tensors.values())
        fused_hsd_kl(student, teacher, weight)
    with pytest.raises(RuntimeError, match=r"^fused_hsd_kl: expected tensors without a tangent"):
        torch.func.jvp(lambda h: fused_hsd_kl(h, teacher, weight), (student,), (teacher,))


def test_tied_embeddings():
    """The head is the embedding too: its gradient is the sum of both uses."""
    ids, weight, mix = torch.arange(10) * 5 % 61, draw(61, 16, dtype=F64), draw(16, 16, dtype=F64, seed=3)

    def run(loss_fn):
        tied = weight.clone().requires_grad_()
        hidden = torch.nn.functional.embedding(ids, tied) @ mix
        with torch.no_grad():
            teacher = torch.nn.functional.embedding(ids.flip(0), tied) @ mix
        loss = loss_fn(hidden, teacher, tied)
        loss.backward()
        return loss.detach(), tied.grad

    for got, want in zip(run(fused_hsd_kl), run(reference.hsd_kl), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_frozen_head_and_frozen_hidden(reduction):
    student, teacher, weight = small_problem(dtype=F64)
    upstream = draw(10, dtype=F64) if reduction == "none" else None
    bias = draw(61, dtype=F64)
    want = grads(reference.hsd_kl, student, teacher, weight, bias, upstream, reduction=reduction)[1:]
    for trained in range(3):
        leaves = [t.clone().requires_grad_(i == trained) for i, t in enumerate((student, weight, bias))]
        fused_hsd_kl(leaves[0], teacher, Head(*leaves[1:]), reduction=reduction).backward(upstream)
        for i, leaf in enumerate(leaves):
            assert (leaf.grad is not None) == (i == trained)
        torch.testing.assert_close(leaves[trained].grad, want[trained])


def test_the_teacher_has_no_gradient_and_no_graph():
    student, teacher, weight = small_problem()
    teacher_weight, teacher_bias = draw(61, 16, seed=5), draw(61, seed=6)
    student.requires_grad_()
    out = fused_hsd_kl(
        student,
        teacher,
        weight,
        teacher_head=Head(teacher_weight, teacher_bias),
        target_ids=torch.zeros(10, dtype=torch.long),
        return_stats=True,
    )
    out.loss.backward()
    for t in (teacher, teacher_weight, teacher_bias, *out.stats):
        assert t.grad is None and t.grad_fn is None and not t.requires_grad


@pytest.mark.parametrize("changed", ["student", "teacher", "weight", "bias", "teacher_weight", "teacher_bias"])
def test_inputs_changed_before_a_per_token_backward_are_an_error(changed):
    """That backward reads the inputs again. An EMA teacher or an optimizer that stepped in between must not pass."""
    student, teacher, weight = small_problem()
    tensors = {
        "student": student.requires_grad_(),
        "teacher": teacher,
        "weight": weight.requires_grad_(),
        "bias": draw(61, grad=True),
        "teacher_weight": draw(61, 16, seed=5),
        "teacher_bias": draw(61, seed=6),
    }
    loss = fused_hsd_kl(
        tensors["student"],
        tensors["teacher"],
        Head(tensors["weight"], tensors["bias"]),
        teacher_head=Head(tensors["teacher_weight"], tensors["teacher_bias"]),
        reduction="none",
    )
    with torch.no_grad():
        tensors[changed].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


def test_inputs_changed_before_a_scalar_backward_do_not_matter():
    student, teacher, weight = small_problem()
    want = grads(fused_hsd_kl, student, teacher, weight)
    leaves = student.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = fused_hsd_kl(leaves[0], teacher, leaves[1])
    with torch.no_grad():
        for t in (*leaves, teacher):
            t.zero_()
    loss.backward()
    assert torch.equal(leaves[0].grad, want[1]) and torch.equal(leaves[1].grad, want[2])


def test_what_is_kept_for_the_backward():
    """The finished gradients, or for a per-token loss of a trained head the inputs: never logits."""
    tokens, dim, vocab = 40, 8, 300
    student, teacher, weight = small_problem(tokens, dim, vocab)
    for reduction, allowed in (("mean", tokens * dim + vocab * dim), ("none", 2 * tokens * (dim + 2) + vocab * dim)):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            fused_hsd_kl(student.requires_grad_(), teacher, weight.requires_grad_(), reduction=reduction)
        assert 0 < sum(kept) <= allowed


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_teacher_of_inference_mode(reduction):
    """Autograd refuses to save one for the backward, which a trained head with reduction "none" has to run again."""
    student, teacher, weight = small_problem(7)
    with torch.inference_mode():
        of_inference = teacher * 1.0
    found = {}
    for name, given in (("inference", of_inference), ("plain", teacher)):
        s, w = student.clone().requires_grad_(), weight.clone().requires_grad_()
        fused_hsd_kl(s, given, w, reduction=reduction).sum().backward()
        found[name] = torch.cat([s.grad, w.grad])
    assert found["inference"].equal(found["plain"])


@pytest.mark.parametrize("with_reference", [False, True])
def test_the_gradient_of_a_bias_is_of_unrounded_dz(with_reference):
    """In bf16 dz is rounded for the products. Over many tokens a bias sums it: 0.2 % of the parts, more of the sum."""
    student, teacher, weight = (t.detach().bfloat16() for t in small_problem(96, 16, 61))
    bias = torch.zeros(61, dtype=torch.bfloat16)
    options = {"reference_hidden": teacher.flip(0), "reference_coef": 0.5} if with_reference else {}

    def of_bias(loss, dtype):
        b = bias.to(dtype, copy=True).requires_grad_()
        given = {name: v.to(dtype) if torch.is_tensor(v) else v for name, v in options.items()}
        loss(student.to(dtype), teacher.to(dtype), Head(weight.to(dtype), b), reduction="sum", **given).backward()
        return b.grad

    exact = of_bias(reference.hsd_kl, torch.float64)
    # Rounded once, to the bias' own dtype.
    torch.testing.assert_close(of_bias(fused_hsd_kl, torch.bfloat16).double(), exact, rtol=2.0**-8, atol=1e-6)


@pytest.mark.parametrize("coef", [1e-46, 1e-40, 0.3, 1e20])
def test_a_reference_of_any_coefficient_beside_a_per_token_loss(coef):
    """Also where reference_coef times a weight is 0 in fp32, and the teacher's weight is not."""
    student, teacher, weight = small_problem()
    options = {"reference_hidden": teacher.flip(0), "reference_coef": coef}
    found = grads(fused_hsd_kl, student, teacher, weight, None, torch.ones(10), reduction="none", **options)
    want = grads(fused_hsd_kl, student, teacher, weight, reduction="sum", **options)
    for got, expected in zip(found[1:], want[1:], strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev])
def test_a_transform_is_refused(transform):
    student, teacher, weight = small_problem()
    with pytest.raises(RuntimeError, match=r"^fused_hsd_kl: expected no torch.func.grad"):
        transform(lambda h: fused_hsd_kl(h, teacher, weight))(student)
