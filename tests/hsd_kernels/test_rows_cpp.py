"""The C++ rows against the fp64 reference, in every variant that this machine runs.

They fail where the library is not built: `make test` builds it, or `python setup.py build_ext --inplace`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from hsd_kernels import Head, fused_hsd_kl, native, reference
from hsd_kernels.divergence import DIVERGENCES, RowSpec
from hsd_kernels.row_stats import RowStats
from hsd_kernels.rows import cpp, passes
from hsd_kernels.rows import eager as torch_rows
from hsd_kernels.testing import assert_within_budget, row_spec

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
INF, NAN = math.inf, math.nan
BLOCK = 2048  # columns, csrc/cpu/rows.h
pytestmark = pytest.mark.usefixtures("poisoned_memory")
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)


@pytest.fixture(autouse=True, params=range(len(native.VARIANTS)), ids=native.VARIANTS)
def variant(request, monkeypatch):
    best = native.facts().fastest
    if request.param > best:
        pytest.skip(f"this machine runs up to {native.VARIANTS[best]}")
    monkeypatch.setattr(native, "variant", lambda: request.param)
    return request.param


class Inputs(NamedTuple):
    x_student: Tensor
    x_teacher: Tensor
    bias: Tensor | None
    teacher_bias: Tensor | None
    target_ids: Tensor | None
    weights: Tensor


def make_inputs(n=3, vocab=300, *, spread=3.0, distance=0.5, offset=0.0, dtype=F32, bias=None) -> Inputs:
    gen = torch.Generator().manual_seed(vocab + n)
    student = torch.randn(n, vocab, generator=gen) * spread + offset
    teacher = student + distance * torch.randn(n, vocab, generator=gen)
    biases = (torch.randn(vocab, generator=gen).to(bias) if bias else None for _ in range(2))
    ids = torch.randint(vocab, (n,), generator=gen)
    return Inputs(student.to(dtype), teacher.to(dtype), *biases, ids, torch.rand(n, generator=gen) + 0.5)


def run(backend, inputs: Inputs, spec: RowSpec, out: Tensor | None = None) -> tuple[RowStats, Tensor]:
    x_s, x_t, bias, teacher_bias, ids, weights = inputs
    backend = passes(backend, x_s.shape[1], spec)
    stats = backend.statistics(x_s, x_t, spec, bias, teacher_bias, ids, torch.arange(x_s.shape[0]))
    out = torch.full_like(x_s, NAN, dtype=F32) if out is None else out
    backend.gradient_(x_s, x_t, spec, bias, teacher_bias, stats, weights, out)
    return stats, out


def exact(inputs: Inputs, spec: RowSpec) -> tuple[dict[str, Tensor], Tensor]:
    """Statistics and gradient of the reference in fp64. -1e4 instead of -inf: exp is 0 there too, the log finite."""

    def compared(x: Tensor, bias: Tensor | None) -> Tensor:
        one = Head(torch.ones(1, 1, dtype=F64), None, spec.logit_scale, spec.softcap)
        x = x if bias is None else x + bias.double()
        return reference.logits(x.unsqueeze(-1), one, spec.divergence.temperature).squeeze(-1)

    x = inputs.x_student.double().clamp(min=-1e4).requires_grad_()
    z_s = compared(x + inputs.x_teacher.double() if spec.linear else x, inputs.bias)
    z_t = compared(inputs.x_teacher.double().clamp(min=-1e4), inputs.teacher_bias)
    kl = reference.per_token_divergence(z_s, z_t, spec.divergence)
    (kl * inputs.weights.double()).sum().backward()
    assert x.grad is not None
    found = {"kl": kl}
    for side, z in (("student", z_s), ("teacher", z_t)):
        logps = z.log_softmax(-1)
        found[f"{side}_lse"] = z.logsumexp(-1)
        found[f"{side}_entropy"] = -(logps.exp() * logps).sum(-1)
        if inputs.target_ids is not None:
            found[f"{side}_logps"] = logps.gather(-1, inputs.target_ids.unsqueeze(-1)).squeeze(-1)
    return {name: value.detach() for name, value in found.items()}, x.grad


def check(inputs: Inputs, spec: RowSpec, skip: tuple[str, ...] = ()) -> tuple[RowStats, Tensor]:
    stats, dz = run(cpp, inputs, spec)
    in_fp32 = inputs._replace(x_student=inputs.x_student.float(), x_teacher=inputs.x_teacher.float())
    torch_stats, torch_dz = run(torch_rows, in_fp32, spec)
    exact_stats, exact_dz = exact(inputs, spec)
    for name, value in exact_stats.items():
        if name not in skip:
            assert getattr(stats, name).dtype == F32
            # A log-sum-exp of V terms rounds at log V, however small what is left of it in the end.
            scale = max(1.0, math.log(inputs.x_student.shape[1]), value.abs().max().item())
            assert_within_budget(name, getattr(stats, name), getattr(torch_stats, name), value, scale)
    if "gradient" not in skip:
        scale = inputs.weights.max().item() * abs(spec.logit_scale) / spec.divergence.temperature  # p = 1
        assert_within_budget("gradient", dz, torch_dz, exact_dz, scale)
    return stats, dz


FORMS = {
    "plain": {},
    "temperature 0.1": {"temperature": 0.1},
    "temperature 10": {"temperature": 10.0},
    "softcap": {"softcap": 5.0, "temperature": 1.3},
    "logit_scale": {"logit_scale": 0.3, "softcap": 30.0},
    "negative logit_scale": {"logit_scale": -0.7},
    "clip": {"clip": 1e-3},
    "clip, softcap": {"clip": 1e-2, "softcap": 10.0},
    "nonnegative clip": {"clip": 1e-3, "clip_form": "nonnegative", "temperature": 1.3},
    "linear": {"linear": True},
    "linear, softcap, scale": {"linear": True, "softcap": 5.0, "logit_scale": -0.7},
    "floor": {"floor": 0.7},
    "floor, clip": {"floor": 0.8, "clip": 1e-3, "clip_form": "nonnegative", "softcap": 10.0},
    "top_k": {"top_k": 20, "temperature": 1.3},
    "top_k, floor, softcap": {"top_k": 3, "top_of": "teacher", "floor": 0.9, "softcap": 5.0, "logit_scale": -0.7},
    "top_k, renormalise, linear": {"top_k": 7, "rest": "renormalise", "clip": 1e-2, "linear": True},
}


@pytest.mark.parametrize("dtype, bias", [(F32, None), (F32, F32), (F32, BF16), (BF16, None), (BF16, BF16), (BF16, F32)])
@pytest.mark.parametrize("form", FORMS)
@every_divergence
def test_options(divergence, form, dtype, bias):
    # Eight rows: the rounding of lse, much of the error at temperature 0.1, is a matter of luck in each.
    inputs = make_inputs(n=8, vocab=BLOCK + 77, dtype=dtype, bias=bias)
    if FORMS[form].get("linear"):
        inputs.x_student.sub_(inputs.x_teacher)
    check(inputs, row_spec(divergence, beta=0.3, **FORMS[form]))


@pytest.mark.parametrize("vocab", [1, 7, 127, BLOCK, 4099, 50257])
@every_divergence
def test_vocabulary_sizes(divergence, vocab):
    check(make_inputs(n=2, vocab=vocab), row_spec(divergence))


def test_a_long_sum_is_exact():
    vocab = 151936
    zeros = torch.zeros(1, vocab)
    stats, _ = run(cpp, Inputs(zeros, zeros, None, None, None, torch.ones(1)), row_spec())
    expected = torch.tensor([vocab], dtype=F64).log().float()
    for name in ("student_lse", "teacher_lse", "student_entropy", "teacher_entropy"):
        assert torch.equal(getattr(stats, name), expected), name
    assert stats.student_logps is None and stats.teacher_logps is None


@every_divergence
@pytest.mark.parametrize("offset, spread", [(200.0, 3.0), (-200.0, 3.0), (0.0, 1e4)])
def test_large_logits(divergence, offset, spread):
    check(make_inputs(offset=offset, spread=spread), row_spec(divergence))


@every_divergence
def test_maxima_that_rise_in_every_block(divergence):
    inputs = make_inputs(vocab=5 * BLOCK)
    ramp = torch.linspace(-40.0, 40.0, 5 * BLOCK)
    for x in (inputs.x_student, inputs.x_teacher):
        x += ramp
    check(inputs, row_spec(divergence))


def test_small_softcapped_logits_keep_their_differences():
    check(make_inputs(spread=1e-3, distance=1e-4), row_spec(softcap=50.0, temperature=1e-3))


@every_divergence
def test_log_probs_below_the_range_of_exp_on_both_sides(divergence):
    inputs = make_inputs()
    for x, low in ((inputs.x_student, -150.0), (inputs.x_teacher, -120.0)):
        x[:, 40:200] += low
    check(inputs, row_spec(divergence))


@pytest.mark.parametrize("form", [{}, {"clip": 1e-2}, {"floor": 0.9}], ids=["plain", "clip", "floor"])
@every_divergence
def test_minus_infinity_in_both_rows(divergence, form):
    inputs = make_inputs(vocab=2 * BLOCK + 50)
    for x in (inputs.x_student, inputs.x_teacher):
        x[:, : BLOCK + 20] = -INF  # more than a whole block
        x[0, 2 * BLOCK - 1 :] = -INF
    inputs = inputs._replace(target_ids=torch.full((3,), BLOCK + 30))
    _, dz = check(inputs, row_spec(divergence, **form))
    assert (dz[:, : BLOCK + 20] == 0).all()
    stats, _ = run(cpp, inputs._replace(target_ids=torch.zeros(3, dtype=torch.long)), row_spec(divergence))
    assert (stats.student_logps == -INF).all() and (stats.teacher_logps == -INF).all()


@pytest.mark.parametrize("side", ["student", "teacher"])
@every_divergence
def test_minus_infinity_in_one_row(divergence, side):
    """Infinite where KL(p || q) has p > 0 at q = 0; the gradient of the reverse KL is then undefined."""
    inputs = make_inputs(vocab=BLOCK + 300)._replace(target_ids=torch.full((3,), BLOCK + 30))
    getattr(inputs, f"x_{side}")[1:, : BLOCK + 20] = -INF
    infinite = (divergence, side) in (("forward_kl", "student"), ("reverse_kl", "teacher"))
    skip = ("kl", "gradient") if infinite and side == "teacher" else ("kl",) if infinite else ()
    stats, _ = check(inputs, row_spec(divergence), skip)
    assert stats.kl.isinf().tolist() == [False, infinite, infinite]


def test_infinite_ratio_that_becomes_negligible_is_not_nan():
    """The teacher's mass where the student is -inf is 1 in the first block and exp(-200) in the end."""
    inputs = make_inputs(vocab=2 * BLOCK)
    inputs.x_student[:, :BLOCK], inputs.x_teacher[:, BLOCK:] = -INF, 200.0
    stats, dz = run(cpp, inputs, row_spec())
    assert stats.kl.isfinite().all() and dz.isfinite().all()


@pytest.mark.parametrize(
    "form",
    [{}, {"clip": 1e-2}, {"softcap": 5.0}, {"floor": 0.9}, {"top_k": 3}],
    ids=["plain", "clip", "softcap", "floor", "top_k"],
)
@pytest.mark.parametrize("side", ["student", "teacher"])
@every_divergence
def test_nan_is_not_hidden(divergence, side, form):
    for at in (17, 299):  # in a whole vector and in the last, partial one; a NaN with a payload
        inputs = make_inputs(vocab=300)
        getattr(inputs, f"x_{side}").view(torch.int32)[1, at] = 0x7FC12345
        stats, dz = run(cpp, inputs, row_spec(divergence, **form))
        assert stats.kl.isnan().tolist() == [False, True, False]
        assert getattr(stats, f"{side}_lse").isnan().tolist() == [False, True, False]
        assert dz[1].isnan().any() and not dz[[0, 2]].isnan().any()
        narrow = run(cpp, inputs, row_spec(divergence, **form), torch.zeros(3, 300, dtype=BF16))[1]
        assert torch.equal(narrow.isnan(), dz.isnan())


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_gradient_where_one_token_has_all_the_mass(divergence):
    """dz is then a small difference of g and ps G, which an error of lse in one of them would drown."""
    inputs = make_inputs()
    for x in (inputs.x_student, inputs.x_teacher):
        x[:, 5] = x.amax(-1) + 1.2
    spec = row_spec(divergence, temperature=0.1)
    _, exact_dz = exact(inputs, spec)
    stats, dz = run(cpp, inputs, spec)
    error, torch_error = ((t - exact_dz).abs().sum(-1) for t in (dz, run(torch_rows, inputs, spec)[1]))
    rounding = torch.finfo(F32).eps * stats.grad_sum.abs() * inputs.weights / spec.divergence.temperature
    assert (error <= 2.0 * (torch_error + rounding)).all(), f"L1 error {error}, torch {torch_error}"


@pytest.mark.parametrize("form", FORMS)
@every_divergence
def test_equal_rows_give_exactly_zero(divergence, form):
    inputs = make_inputs(vocab=BLOCK + 77, offset=20.0)
    spec = row_spec(divergence, **FORMS[form])
    inputs.x_student[:, 250:260] = INF if spec.logit_scale < 0.0 else -INF
    inputs = inputs._replace(x_teacher=inputs.x_student.clone())
    if spec.linear:
        inputs.x_student.zero_()
    stats, dz = run(cpp, inputs, spec)
    assert (stats.kl == 0).all() and (stats.grad_sum == 0).all() and (dz == 0).all()
    assert torch.equal(stats.student_lse, stats.teacher_lse)


@every_divergence
def test_kl_of_nearly_equal_rows_is_a_rounding_error(divergence):
    stats, _ = run(cpp, make_inputs(n=32, vocab=127, distance=1e-6), row_spec(divergence))
    assert (stats.kl.abs() < 1e-6).all()


@every_divergence
@pytest.mark.parametrize("backend", [cpp, torch_rows], ids=["cpp", "torch"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_row_of_weight_zero_is_zeros(dtype, backend, divergence):
    inputs = make_inputs()
    inputs.x_student[0, 7], inputs.x_teacher[1, 8], inputs.x_student[2, 9] = NAN, INF, -INF
    inputs.weights[:2] = 0.0
    _, dz = run(backend, inputs, row_spec(divergence), torch.full((3, 300), NAN, dtype=dtype))
    assert (dz[:2] == 0).all() and (dz[2] != 0).any()


# Memory


def test_strided_rows():
    inputs = make_inputs()
    wide = torch.full((3, 2, 512), NAN)
    wide[:, 0, :300], wide[:, 1, :300] = inputs.x_student, inputs.x_teacher
    out = torch.full((3, 450), NAN)
    strided = inputs._replace(x_student=wide[:, 0, :300], x_teacher=wide[:, 1, :300])
    like_stats, like_dz = run(cpp, inputs, row_spec())
    stats, dz = run(cpp, strided, row_spec(), out[:, :300])
    assert torch.equal(dz, like_dz) and out[:, 300:].isnan().all()
    torch.testing.assert_close(tuple(stats), tuple(like_stats), rtol=0.0, atol=0.0)
    assert wide[:, :, 300:].isnan().all()


@pytest.mark.parametrize("n", [0, 1])
def test_few_rows(n):
    stats, dz = run(cpp, make_inputs(n=n), row_spec())
    assert all(value is not None and value.shape == (n,) for value in stats) and dz.shape == (n, 300)
    assert not dz.isnan().any()


def test_targets():
    inputs = make_inputs()
    assert inputs.target_ids is not None
    wide, _ = run(cpp, inputs, row_spec())
    narrow, _ = run(cpp, inputs._replace(target_ids=inputs.target_ids.int()), row_spec())
    torch.testing.assert_close(wide.student_logps, narrow.student_logps, rtol=0.0, atol=0.0)
    strange, _ = run(cpp, inputs._replace(target_ids=torch.tensor([-1, 0, 300])), row_spec())
    for logps in (strange.student_logps, strange.teacher_logps):
        assert logps is not None and logps.isnan().tolist() == [True, False, True]


@every_divergence
def test_repeatable_whatever_the_number_of_threads(divergence):
    inputs = make_inputs(n=9, vocab=5000)
    threads = torch.get_num_threads()
    found = []
    for n in (1, 1, 2, 5, 16):
        torch.set_num_threads(n)
        found.append(run(cpp, inputs, row_spec(divergence)))
    torch.set_num_threads(threads)
    for stats, dz in found[1:]:
        torch.testing.assert_close(tuple(stats), tuple(found[0][0]), rtol=0.0, atol=0.0)
        assert torch.equal(dz, found[0][1])


# Elementary functions


def elementary(function: int, x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    torch.ops.hsd_cpu.elementary(out, x, function=function, variant=native.variant())
    return out


def near_zero(end: float) -> Tensor:
    return torch.cat([torch.linspace(0.0, end, 200_001), end * torch.logspace(-30, 0, 50_001)])


def test_elementary_functions_in_ulps():
    """A unit in the last place of a result is at most 1.2e-7 of it."""
    for function, x, exact_fn, bound in (
        (0, torch.cat([near_zero(-87.3), torch.linspace(0.0, 80.0, 50_001)]), torch.exp, 1.2e-7),
        (1, near_zero(-90.0), torch.expm1, 1.8e-7),
        (2, near_zero(-0.999), torch.log1p, 2.4e-7),
        (3, torch.cat([near_zero(-12.0), near_zero(12.0)]), torch.tanh, 4.8e-7),
    ):
        found, expected = elementary(function, x).double(), exact_fn(x.double())
        error = ((found - expected).abs() / expected.abs().clamp(min=1e-300)).max().item()
        assert error <= bound, f"function {function}: relative error {error:.2e}"
        assert (found[expected == 0] == 0).all()


def test_elementary_functions_at_the_ends():
    ends = torch.tensor([-INF, -1e30, -88.0, 0.0, NAN])
    assert str(elementary(0, ends).tolist()) == "[0.0, 0.0, 0.0, 1.0, nan]"
    assert str(elementary(1, ends).tolist()) == "[-1.0, -1.0, -1.0, 0.0, nan]"
    assert str(elementary(3, torch.tensor([-INF, 0.0, INF, NAN])).tolist()) == "[-1.0, 0.0, 1.0, nan]"
    assert elementary(2, torch.tensor([0.0, -1.0])).tolist() == [0.0, pytest.approx(-87.33655)]


# Refusals


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x_student": torch.zeros(3, 300, dtype=F64)}, "x_student: expected float32 or bfloat16"),
        ({"x_teacher": torch.zeros(3, 300, dtype=torch.float16)}, "x_teacher: expected float32 or bfloat16"),
        ({"x_teacher": torch.zeros(3, 300, dtype=BF16)}, "x_teacher: expected the dtype of x_student"),
        ({"x_teacher": torch.zeros(3, 299)}, r"x_teacher: expected shape \(3, 300\), got \(3, 299\)"),
        ({"x_student": torch.zeros(300, 3).t()}, "x_student: expected columns side by side"),
        ({"x_student": torch.zeros(3, 300, 1)}, "x_student: expected a matrix"),
        ({"bias": torch.zeros(300, dtype=F64)}, "bias: expected float32 or bfloat16"),
        ({"bias": torch.zeros(299)}, "bias: expected 300 contiguous"),
        ({"teacher_bias": torch.zeros(300, dtype=F64)}, "teacher_bias: expected float32 or bfloat16"),
        ({"target_ids": torch.zeros(2, dtype=torch.long)}, "target_ids: expected 3 contiguous"),
    ],
)
def test_what_the_rows_do_not_take(change, message):
    inputs = make_inputs()._replace(**change)
    with pytest.raises(RuntimeError, match=message):
        cpp.statistics(*inputs[:2], row_spec(), *inputs[2:5], torch.arange(3))


def test_what_the_gradient_does_not_take():
    inputs = make_inputs()
    with pytest.raises(RuntimeError, match="out: expected float32 or bfloat16"):
        run(cpp, inputs, row_spec(), torch.zeros(3, 300, dtype=F64))
    with pytest.raises(RuntimeError, match=r"out: expected shape \(3, 300\), got \(3, 301\)"):
        run(cpp, inputs, row_spec(), torch.zeros(3, 301))
    with pytest.raises(RuntimeError, match="weights: expected 3 contiguous"):
        run(cpp, inputs._replace(weights=torch.ones(2)), row_spec())


@pytest.mark.parametrize("number", [-1, len(native.VARIANTS)])
def test_a_variant_that_the_machine_lacks_is_an_error(number, monkeypatch):
    monkeypatch.setattr(native, "variant", lambda: number)
    with pytest.raises(RuntimeError, match="variant: expected at most"):
        run(cpp, make_inputs(), row_spec())


@pytest.mark.parametrize("dtype", [F32, BF16])
@every_divergence
def test_through_the_public_function(divergence, dtype):
    gen = torch.Generator().manual_seed(0)
    student, teacher, weight = (torch.randn(n, 16, generator=gen).to(dtype) for n in (10, 10, 301))
    found = []
    for impl in ("cpp", "torch"):
        leaves = student.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = fused_hsd_kl(
            leaves[0], teacher, leaves[1], divergence=divergence, impl=impl, memory_bytes=3 * 2 * 301 * 4
        )
        loss.backward()
        found.append((loss.detach(), *(t.grad for t in leaves)))
    tolerance = 1e-5 if dtype == F32 else 1e-2
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * want.abs().max().item())
