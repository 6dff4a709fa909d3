"""The Triton rows against fp64 autograd on full logits: interpreted without a GPU, compiled with one."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from hsd_kernels import configs, reference
from hsd_kernels.divergence import RowSpec
from hsd_kernels.row_stats import RowStats
from hsd_kernels.rows import both_in_one_read, passes
from hsd_kernels.rows import eager as torch_rows
from hsd_kernels.testing import assert_within_budget, row_spec

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
triton_rows = pytest.importorskip("hsd_kernels.rows.triton_rows")
one_read = pytest.importorskip("hsd_kernels.rows.one_read")
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy in the interpreter, on -inf
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


@pytest.fixture(autouse=True, params=["two passes", "one read"])
def rows(request, monkeypatch):
    """Blocks of (2, 128) columns, so that a small V has several and a tail."""
    config = configs.RowConfig(block_v=256, num_warps=1, num_stages=1)
    monkeypatch.setattr(configs, "row_config", lambda kernel, capability: config)
    return {"two passes": triton_rows, "one read": one_read}[request.param]


class Inputs(NamedTuple):
    x_student: Tensor
    x_teacher: Tensor
    bias: Tensor | None
    teacher_bias: Tensor | None
    target_ids: Tensor | None
    weights: Tensor


def make_inputs(
    n=3,
    vocab=127,
    *,
    spread=3.0,
    distance=0.5,
    offset=0.0,
    dtype=torch.float32,
    bias=False,
    targets=True,
) -> Inputs:
    gen = torch.Generator().manual_seed(vocab + n)
    student = torch.randn(n, vocab, generator=gen) * spread + offset
    teacher = student + distance * torch.randn(n, vocab, generator=gen)
    bias_s, bias_t = (torch.randn(vocab, generator=gen).to(DEVICE) if bias else None for _ in range(2))
    ids = torch.randint(vocab, (n,), generator=gen).to(DEVICE) if targets else None
    weights = torch.rand(n, generator=gen) + 0.5
    student, teacher = student.to(DEVICE, dtype), teacher.to(DEVICE, dtype)
    return Inputs(student, teacher, bias_s, bias_t, ids, weights.to(DEVICE))


def compared_logits(x: Tensor, bias: Tensor | None, spec: RowSpec) -> Tensor:
    z = (x if bias is None else x + bias.double()) * spec.logit_scale
    if spec.softcap is not None:
        z = spec.softcap * torch.tanh(z / spec.softcap)
    return z / spec.divergence.temperature


def exact(inputs: Inputs, spec: RowSpec) -> tuple[dict[str, Tensor], Tensor]:
    """Statistics and gradient in fp64, the gradient by autograd."""

    def expected(log_p, log_ratio):
        return log_p.exp() * torch.where(log_p.exp() > 0, log_ratio, 0.0)

    x = inputs.x_student.double()
    x = (x + inputs.x_teacher.double() if spec.linear else x).requires_grad_()
    z_s = compared_logits(x, inputs.bias, spec)
    z_t = compared_logits(inputs.x_teacher.double(), inputs.teacher_bias, spec)
    ls, lt = z_s.log_softmax(-1), z_t.log_softmax(-1)
    if spec.divergence.kind == "forward_kl":
        f = expected(lt, lt - ls)
    elif spec.divergence.kind == "reverse_kl":
        f = expected(ls, ls - lt)
    else:
        nowhere = (ls == -math.inf) & (lt == -math.inf)
        at = [torch.where(nowhere, 0.0, log_p) for log_p in (ls, lt)]
        lm = torch.logaddexp(at[0] + math.log1p(-spec.divergence.beta), at[1] + math.log(spec.divergence.beta))
        f = spec.divergence.beta * expected(lt, lt - lm) + (1.0 - spec.divergence.beta) * expected(ls, ls - lm)
    if spec.divergence.clip_form == "nonnegative" and spec.divergence.kind != "jsd":
        f = f + (lt.exp() - ls.exp()) * (-1.0 if spec.divergence.kind == "forward_kl" else 1.0)
    kl = (f if spec.divergence.clip is None else f.clamp_max(spec.divergence.clip)).sum(-1)
    if spec.divergence.top_k is not None or spec.divergence.floor is not None:
        kl = reference.per_token_divergence(z_s, z_t, spec.divergence)
    (kl * inputs.weights.double()).sum().backward()
    assert x.grad is not None
    stats = {
        "kl": kl,
        "student_entropy": -expected(ls, ls).sum(-1),
        "teacher_entropy": -expected(lt, lt).sum(-1),
        "student_lse": z_s.logsumexp(-1),
        "teacher_lse": z_t.logsumexp(-1),
    }
    if inputs.target_ids is not None:
        for side, log_p in (("student", ls), ("teacher", lt)):
            stats[f"{side}_logps"] = log_p.gather(-1, inputs.target_ids.unsqueeze(-1)).squeeze(-1)
    return {name: value.detach() for name, value in stats.items()}, x.grad


def run(backend, inputs: Inputs, spec: RowSpec, out: Tensor | None = None) -> tuple[RowStats, Tensor]:
    x_s, x_t, bias, teacher_bias, ids, weights = inputs
    rows = torch.arange(x_s.shape[0], device=x_s.device)
    out = torch.full_like(x_s, math.nan, dtype=torch.float32) if out is None else out
    found = passes(triton_rows if backend is one_read else backend, x_s.shape[1], spec)
    if backend is one_read:
        both = both_in_one_read(found, x_s, spec)
        if both is None:
            pytest.skip("a JSD, a clip or a floor is two passes")
        return both(x_s, x_t, spec, bias, teacher_bias, ids, rows, weights, out), out
    stats = found.statistics(x_s, x_t, spec, bias, teacher_bias, ids, rows)
    found.gradient_(x_s, x_t, spec, bias, teacher_bias, stats, weights, out)
    return stats, out


def check(rows, inputs: Inputs, spec: RowSpec, gradient: bool = True) -> tuple[RowStats, Tensor]:
    stats, dz = run(rows, inputs, spec)
    in_fp32 = inputs._replace(x_student=inputs.x_student.float(), x_teacher=inputs.x_teacher.float())
    torch_stats, torch_dz = run(torch_rows, in_fp32, spec)
    exact_stats, exact_dz = exact(inputs, spec)
    for name, value in exact_stats.items():
        assert getattr(stats, name).dtype == torch.float32
        finite = value[value.isfinite()].abs()
        # A log-sum-exp of V terms rounds at log V, however small what is left of it in the end.
        scale = max(1.0, math.log(inputs.x_student.shape[1]), *finite.tolist())
        assert_within_budget(name, getattr(stats, name), getattr(torch_stats, name), value, scale)
    if inputs.target_ids is None:
        assert stats.student_logps is None and stats.teacher_logps is None
    if gradient:
        scale = inputs.weights.max().item() * abs(spec.logit_scale) / spec.divergence.temperature  # p = 1
        assert_within_budget("gradient", dz, torch_dz, exact_dz, scale)
    return stats, dz


@pytest.mark.parametrize("vocab", [1, 7, 127, 1000])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_vocabulary_sizes(rows, divergence, vocab):
    check(rows, make_inputs(vocab=vocab), row_spec(divergence))


def test_many_blocks(rows):
    check(rows, make_inputs(n=2, vocab=4099, targets=False), row_spec())


FORMS = {
    "temperature 0.1": {"temperature": 0.1},
    "temperature 10": {"temperature": 10.0},
    "softcap": {"softcap": 5.0, "temperature": 1.3},
    "logit_scale": {"logit_scale": 0.3, "softcap": 30.0},
    "negative logit_scale": {"logit_scale": -0.7},
    "clip": {"clip": 1e-3},
    "non-negative clip": {"clip": 1e-3, "clip_form": "nonnegative"},
    "linear": {"linear": True, "softcap": 20.0},
    "clip, softcap": {"clip": 1e-2, "softcap": 10.0},
    "floor": {"floor": 0.7},
    "floor, clip": {"floor": 0.8, "clip": 1e-3, "clip_form": "nonnegative"},
    "top_k": {"top_k": 20},
    "top_k, floor, softcap": {"top_k": 3, "top_of": "teacher", "floor": 0.9, "softcap": 5.0, "logit_scale": -0.7},
    "top_k, renormalise, linear": {"top_k": 7, "rest": "renormalise", "clip": 1e-2, "linear": True},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_options(rows, divergence, form):
    spec = row_spec(divergence, beta=0.3, **FORMS[form])
    check(rows, make_inputs(vocab=300, bias=True), spec)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits(rows, dtype):
    check(rows, make_inputs(vocab=300, dtype=dtype), row_spec("reverse_kl"))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("offset, spread", [(200.0, 3.0), (0.0, 1e4)])
def test_large_logits(rows, divergence, offset, spread):
    check(rows, make_inputs(vocab=300, offset=offset, spread=spread), row_spec(divergence, clip=None))


def test_small_softcapped_logits_keep_their_differences(rows):
    inputs = make_inputs(vocab=300, spread=1e-3, distance=1e-4)
    check(rows, inputs, row_spec(softcap=50.0, temperature=1e-3))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_log_probs_below_the_range_of_exp_on_both_sides(rows, divergence):
    inputs = make_inputs(vocab=300)
    for x, low in ((inputs.x_student, -150.0), (inputs.x_teacher, -120.0)):
        x[:, 40:200] += low
    check(rows, inputs, row_spec(divergence))


@pytest.mark.parametrize("form", [{}, {"clip": 1e-2}, {"floor": 0.9}])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_minus_infinity_in_both_rows(rows, divergence, form):
    inputs = make_inputs(vocab=600, targets=False)
    for x in (inputs.x_student, inputs.x_teacher):
        x[:, :300] = -math.inf  # more than a whole block
        x[0, 511:] = -math.inf
    check(rows, inputs, row_spec(divergence, **form))


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_minus_infinity_in_one_row(rows, divergence, side):
    """Infinite where KL(p || q) has p > 0 at q = 0; the gradient of the reverse KL is then undefined."""
    inputs = make_inputs(vocab=600, targets=False)
    getattr(inputs, f"x_{side}")[1:, :300] = -math.inf
    infinite = (divergence, side) in (("forward_kl", "student"), ("reverse_kl", "teacher"))
    stats, _ = check(rows, inputs, row_spec(divergence), gradient=not (infinite and side == "teacher"))
    assert stats.kl.isinf().tolist() == [False, infinite, infinite]


def test_infinite_ratio_that_becomes_negligible_is_not_nan(rows):
    """The teacher's mass where the student is -inf is 1 in the first block and exp(-200) in the end."""
    inputs = make_inputs(vocab=600)
    inputs.x_student[:, :256], inputs.x_teacher[:, 256:] = -math.inf, 200.0
    stats, dz = run(rows, inputs, row_spec())
    assert not stats.kl.isnan().any() and not dz.isnan().any()


@pytest.mark.parametrize("form", [{}, {"clip": 1e-2}, {"floor": 0.9}, {"top_k": 3}])
def test_nan_is_not_hidden(rows, form):
    inputs = make_inputs(vocab=300)
    inputs.x_teacher[1, 17] = math.nan
    for divergence in DIVERGENCES:
        stats, dz = run(rows, inputs, row_spec(divergence, **form))
        assert stats.kl.isnan().tolist() == [False, True, False]
        assert dz[1].isnan().any() and not dz[[0, 2]].isnan().any()


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_gradient_where_one_token_has_all_the_mass(rows, divergence):
    """dz is then a small difference of g and ps G, which an error of lse in one of them would drown."""
    inputs = make_inputs(vocab=300)
    for x in (inputs.x_student, inputs.x_teacher):
        x[:, 5] = x.amax(-1) + 1.2
    spec = row_spec(divergence, temperature=0.1)
    _, exact_dz = exact(inputs, spec)
    stats, dz = run(rows, inputs, spec)
    error, torch_error = ((t - exact_dz).abs().sum(-1) for t in (dz, run(torch_rows, inputs, spec)[1]))
    # A log-prob is rounded at its distance to the largest; a compiled kernel rounds other ones than torch does.
    z = inputs.x_student.double() / spec.divergence.temperature
    distance = (z.softmax(-1) * (z.amax(-1, keepdim=True) - z)).sum(-1)
    rounding = (stats.grad_sum.abs() + distance) * inputs.weights / spec.divergence.temperature
    rounding *= torch.finfo(torch.float32).eps
    assert (error <= 2.0 * (torch_error + rounding)).all(), f"L1 error {error}, torch {torch_error}"


@pytest.mark.parametrize("gap", [0.0, 20.0])
def test_the_likeliest_token_hides_no_other_one(rows, gap):
    """Its 1 and what lies beside it in memory, a load further or a block further are summed by one thread."""
    inputs = make_inputs(vocab=300)
    for x in (inputs.x_student, inputs.x_teacher):
        x[:] = -45.0
        x[:, 5] = 0.0
        x[range(3), [6, 5 + 128, 5 + 256]] = -gap
    inputs.x_teacher[:, 100] = -21.0
    stats, _ = run(rows, inputs, row_spec())
    for x, log_sum in ((inputs.x_student, stats.student_log_sum), (inputs.x_teacher, stats.teacher_log_sum)):
        rest = x.double().exp().sum(-1) - 1.0
        torch.testing.assert_close(log_sum.double(), rest.log1p(), rtol=2e-6, atol=0.0)
    if gap > 0.0:
        torch.testing.assert_close(stats.kl.double(), exact(inputs, row_spec())[0]["kl"], rtol=1e-4, atol=0.0)


@triton.jit
def elementary_kernel(x_ptr, out_ptr, N: tl.constexpr):  # pyright: ignore[reportInvalidTypeForm]
    at = tl.arange(0, N)
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, triton_rows._expm1(x))
    tl.store(out_ptr + N + at, triton_rows._log1p(x))
    tl.store(out_ptr + 2 * N + at, triton_rows._tanh(x))


def test_elementary_functions_keep_relative_accuracy():
    x = -torch.logspace(-30, 0, 1024, dtype=torch.float32, device=DEVICE) * 0.999
    out = torch.empty(3, x.numel(), device=DEVICE)
    elementary_kernel[(1,)](x, out, N=x.numel())  # pyright: ignore[reportArgumentType]
    expected = torch.stack([f(x.double()) for f in (torch.expm1, torch.log1p, torch.tanh)])
    torch.testing.assert_close(out.double(), expected, rtol=5e-7, atol=0.0)


@pytest.mark.parametrize("form", [{}, {"softcap": 5.0, "temperature": 0.7}, {"clip": 1e-2}])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_rows_give_exactly_zero(rows, divergence, form):
    inputs = make_inputs(vocab=300, offset=20.0)
    inputs.x_student[:, 250:] = -math.inf
    inputs = inputs._replace(x_teacher=inputs.x_student.clone())
    stats, dz = run(rows, inputs, row_spec(divergence, **form))
    # Compiled, a product is fused into a difference and leaves its own rounding there. The driver drops such rows.
    rounding = 0.0 if DEVICE == "cpu" else 2.0**-20
    assert (stats.kl.abs() <= rounding).all() and (stats.grad_sum.abs() <= rounding).all()
    assert (dz.abs() <= rounding * inputs.weights.abs().amax()).all()
    assert torch.equal(stats.student_lse, stats.teacher_lse)


def test_kl_of_nearly_equal_rows_is_a_rounding_error(rows):
    inputs = make_inputs(n=8, vocab=127, distance=1e-6)
    for divergence in DIVERGENCES:
        stats, _ = run(rows, inputs, row_spec(divergence))
        assert (stats.kl.abs() < 1e-6).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_row_of_weight_zero_is_zeros(rows, divergence):
    inputs = make_inputs(vocab=300)
    inputs.x_student[0, 7], inputs.x_teacher[1, 8] = math.nan, math.inf
    inputs.weights[:2] = 0.0
    _, dz = run(rows, inputs, row_spec(divergence))
    assert (dz[:2] == 0).all() and (dz[2] != 0).any()


def test_strided_rows(rows):
    inputs = make_inputs(vocab=300)
    wide = torch.full((3, 2, 512), math.nan, device=DEVICE)
    wide[:, 0, :300], wide[:, 1, :300] = inputs.x_student, inputs.x_teacher
    out = torch.full((3, 450), math.nan, device=DEVICE)
    strided = inputs._replace(x_student=wide[:, 0, :300], x_teacher=wide[:, 1, :300])
    stats, dz = run(rows, strided, row_spec(), out[:, :300])
    like_stats, like_dz = run(rows, inputs, row_spec())
    assert out[:, 300:].isnan().all()
    # Compiled, rows that are not 16 bytes apart are loaded and summed in another order.
    limits = {"rtol": 0.0, "atol": 0.0} if DEVICE == "cpu" else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close((dz, *stats), (like_dz, *like_stats), **limits)


@pytest.mark.parametrize("n", [0, 1])
def test_few_rows(rows, n):
    inputs = make_inputs(n=n, vocab=300)
    stats, dz = run(rows, inputs, row_spec())
    assert all(value is not None and value.shape == (n,) for value in stats) and dz.shape == (n, 300)
    assert not dz.isnan().any()


def test_int32_targets(rows):
    inputs = make_inputs(vocab=300)
    assert inputs.target_ids is not None
    wide, _ = run(rows, inputs, row_spec())
    narrow, _ = run(rows, inputs._replace(target_ids=inputs.target_ids.int()), row_spec())
    torch.testing.assert_close(wide.student_logps, narrow.student_logps, rtol=0.0, atol=0.0)
