"""logits_dtype=torch.bfloat16: the teacher's logits and the difference to the student's, both in bf16."""

import pytest
import torch
from kernel_cases import relative_l1

from hsd_kernels import fused_hsd_kl, reference, testing
from hsd_kernels.divergence import DIVERGENCES
from hsd_kernels.testing import double

BF16 = torch.bfloat16


def tensors(distance, tokens=48, dim=64, vocab=2000):
    g = torch.Generator().manual_seed(0)
    weight = 0.3 * torch.randn(vocab, dim, generator=g)
    teacher = torch.randn(tokens, dim, generator=g)
    student = teacher + distance * torch.randn(tokens, dim, generator=g)
    return [t.to(BF16) for t in (student, teacher, weight)]


def grads(loss_fn, dtype, *tensors, **options):
    return double(*testing.grads(loss_fn, *(t.to(dtype) for t in tensors), **options))


@pytest.mark.parametrize("options", [{}, {"softcap": 8.0}, {"temperature": 0.7, "logit_scale": -0.5}], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("distance", [0.01, 1.0])
def test_error_does_not_grow_as_the_sides_approach(distance, divergence, options):
    """What the form is for: two rounded logits would be 11 % and more apart where the KL is small."""
    inputs = tensors(distance)
    exact = grads(reference.hsd_kl, torch.float64, *inputs, divergence=divergence, **options)
    linear = grads(fused_hsd_kl, BF16, *inputs, divergence=divergence, logits_dtype=BF16, **options)
    for got, want, allowed in zip(linear, exact, (0.01, 0.02, 0.02), strict=True):
        assert relative_l1(got, want) <= allowed

    student, teacher, weight = inputs
    rounded = [(h @ weight.T).double() for h in (student, teacher)]
    eye = torch.eye(weight.shape[0], dtype=torch.float64)
    naive = grads(reference.hsd_kl, torch.float64, *rounded, eye, divergence=divergence, **options)[0]
    if distance == 0.01:
        assert relative_l1(naive, exact[0]) > 5.0 * relative_l1(linear[0], exact[0])


def test_same_states_are_exactly_zero():
    _, teacher, weight = tensors(0.1)
    for value in grads(fused_hsd_kl, BF16, teacher, teacher.clone(), weight, logits_dtype=BF16):
        assert (value == 0).all()


def test_workspace_is_half_as_wide(monkeypatch):
    from hsd_kernels import gemm

    seen = []
    original = gemm.project_out
    monkeypatch.setattr(gemm, "project_out", lambda h, w, out: seen.append(out.dtype) or original(h, w, out))
    for dtype in (None, torch.float32, BF16):
        grads(fused_hsd_kl, BF16, *tensors(0.1), logits_dtype=dtype)
    assert seen == [torch.float32, torch.float32, BF16]


def test_what_it_does_not_go_with():
    student, teacher, weight = tensors(0.1)
    for name, given in {
        "teacher_head": {"teacher_head": weight},
        "reference_hidden": {"reference_hidden": teacher, "reference_coef": 0.1},
    }.items():
        with pytest.raises(ValueError, match=f"^{name}: expected None with logits_dtype"):
            fused_hsd_kl(student, teacher, weight, logits_dtype=BF16, **given)
    for dtype in (torch.float16, torch.int8, "bfloat16"):
        with pytest.raises(ValueError, match=r"^logits_dtype: expected"):
            fused_hsd_kl(student, teacher, weight, logits_dtype=dtype)
    with pytest.raises(ValueError, match=r"^logits_dtype: expected torch.bfloat16 for bf16 inputs"):
        fused_hsd_kl(student.float(), teacher.float(), weight.float(), logits_dtype=BF16)


def test_statistics_stay_in_fp32():
    out = fused_hsd_kl(*tensors(0.1), logits_dtype=BF16, return_stats=True)
    exact = fused_hsd_kl(*(t.double() for t in tensors(0.1)), return_stats=True)
    for name in ("student_lse", "teacher_lse", "student_entropy", "teacher_entropy"):
        assert getattr(out.stats, name).dtype == torch.float32
        torch.testing.assert_close(getattr(out.stats, name).double(), getattr(exact.stats, name), rtol=0.0, atol=0.05)
