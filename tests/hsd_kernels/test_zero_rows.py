"""Zero where it should be zero: equal states, masked rows, no rows; and nothing hidden that is not zero."""

import pytest
import torch

from hsd_kernels import Divergence, Head, fused_hsd_kl, reference
from hsd_kernels.divergence import DIVERGENCES
from hsd_kernels.row_stats import COLUMNS
from hsd_kernels.testing import double, draw, flat, grads, rows_of_bytes, small_problem

INF, NAN = float("inf"), float("nan")
F32, BF16 = torch.float32, torch.bfloat16
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)


@every_divergence
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("options", [{}, {"clip": 0.1}, {"softcap": 2.0, "temperature": 0.3}], ids=str)
def test_equal_hidden_states_give_exactly_zero(dtype, divergence, options):
    # D = 13 and odd counts: a GEMM then sums the teacher's rows in another order than the student's.
    for tokens, dim, vocab in ((1, 13, 7), (5, 13, 127), (33, 13, 4099), (64, 64, 1000), (7, 100, 9001)):
        student, _, weight = small_problem(tokens, dim, vocab, dtype)
        bias = draw(vocab, dtype=dtype)
        for reduction, upstream in (("mean", None), ("none", torch.ones(tokens))):
            found = grads(
                fused_hsd_kl,
                student,
                student.clone(),
                weight,
                bias,
                upstream,
                divergence=divergence,
                reduction=reduction,
                **options,
            )
            for t in found:
                assert (t == 0).all(), (tokens, dim, vocab, reduction, t.abs().max().item())


@every_divergence
def test_some_equal_rows_among_others(divergence):
    student, teacher, weight = small_problem(9, 13, 127)
    teacher[::2] = student[::2]
    seen = []
    out = fused_hsd_kl(
        student,
        teacher,
        weight,
        divergence=divergence,
        token_weight_fn=lambda s: seen.append(s.kl) or torch.ones_like(s.kl),
        memory_bytes=rows_of_bytes(4, 127),
        return_stats=True,
    )
    for kl in (out.stats.kl, torch.cat(seen)):
        assert (kl[::2] == 0).all() and (kl[1::2] > 0.1).all()


def test_equal_hidden_states_under_two_heads_are_compared():
    student, _, weight = small_problem()
    options = {"teacher_head": draw(61, 16, seed=5), "reduction": "sum"}
    loss, *found = grads(fused_hsd_kl, student, student.clone(), weight, **options)
    assert loss > 1.0 and all(t.abs().max() > 0.01 for t in found)


def test_infinite_equal_rows_keep_their_nan():
    student, _, weight = small_problem()
    student[3] = INF
    assert fused_hsd_kl(student, student.clone(), weight, reduction="none")[3].isnan()


@every_divergence
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("impl", ["auto", "torch"])
@pytest.mark.parametrize("clip", [{}, {"clip": 0.5, "clip_form": "nonnegative"}], ids=["", "clip"])
def test_divergence_is_never_negative(clip, impl, dtype, divergence):
    options = {"divergence": divergence, "impl": impl, "reduction": "none", **clip}
    for near in (1e-7, 1e-5, 1e-3, 1e-2):
        student, teacher, weight = small_problem(512, 24, 301, dtype, near)
        for temperature in (0.3, 1.0):
            terms = fused_hsd_kl(student, teacher, weight, **flat(**options, temperature=temperature))
            assert (terms >= 0).all(), (near, terms.min().item())


def test_pointwise_clip_may_go_negative():
    student, teacher, weight = small_problem()
    assert (fused_hsd_kl(student, teacher, weight, divergence=Divergence(clip=1e-3), reduction="none") < 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_rows_masked(reduction):
    student, teacher, weight = small_problem()
    student[0], teacher[1] = NAN, INF
    bias = draw(61)
    upstream = torch.full((10,), NAN) if reduction == "none" else None
    found = grads(
        fused_hsd_kl, student, teacher, weight, bias, upstream, token_weights=torch.zeros(10), reduction=reduction
    )
    for t in found:
        assert (t == 0).all()
    out = fused_hsd_kl(student, teacher, weight, token_weights=torch.zeros(10), return_stats=True)
    assert (out.loss == 0).all() and all((getattr(out.stats, n) == 0).all() for n in COLUMNS if "logps" not in n)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("tokens", [0, 1])
def test_no_token_and_one_token(tokens, reduction):
    student, teacher, weight = small_problem(tokens)
    upstream = torch.ones(tokens) if reduction == "none" else None
    found = grads(fused_hsd_kl, student, teacher, weight, draw(61), upstream, reduction=reduction)
    exact = grads(reference.hsd_kl, *double(student, teacher, weight, draw(61)), upstream, reduction=reduction)
    if tokens == 0:
        exact[0] = torch.zeros_like(exact[0])  # the mean of no token is 0 here
    for got, want in zip(found, exact, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nan_and_inf_in_masked_rows_reach_nothing(reduction, side, bad):
    student, teacher, weight = small_problem()
    bias, kept = draw(61), torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 2.0, 1.0, 1.0, 1.0, 0.0])
    poisoned = [student.clone(), teacher.clone()]
    for i, name in enumerate(("student", "teacher")):
        if side in (name, "both"):
            poisoned[i][kept == 0] = bad
    options = {"token_weights": kept, "reduction": reduction, "memory_bytes": rows_of_bytes(3, 61)}
    upstream = draw(10) if reduction == "none" else None
    clean = grads(fused_hsd_kl, student, teacher, weight, bias, upstream, **options)
    if upstream is not None:
        upstream = upstream.masked_fill(kept == 0, bad)
    found = grads(fused_hsd_kl, *poisoned, weight, bias, upstream, **options)
    for got, want in zip(found, clean, strict=True):
        assert torch.equal(got, want)
    if upstream is not None:  # the path that does not run the chunks again
        hidden = poisoned[0].clone().requires_grad_()
        fused_hsd_kl(hidden, poisoned[1], Head(weight, bias), **options).backward(upstream)
        torch.testing.assert_close(hidden.grad, clean[1])
    assert (found[1][kept == 0] == 0).all()
    out = fused_hsd_kl(*poisoned, Head(weight, bias), **options, return_stats=True)
    assert out.loss.isfinite().all()
    for name, t in out.stats._asdict().items():
        assert t is None or t.isfinite().all(), name


@every_divergence
@pytest.mark.parametrize("loss_fn", [fused_hsd_kl, reference.hsd_kl], ids=["fused", "reference"])
def test_nan_in_a_live_row_is_not_hidden(loss_fn, divergence):
    for side in (0, 1):
        inputs = small_problem()
        inputs[side][3] = NAN
        for clip in (None, 0.1):
            options = {"divergence": Divergence(divergence, clip=clip)}
            terms = loss_fn(*inputs, **options, reduction="none")
            assert terms[3].isnan() and terms[[0, 1, 2, 4]].isfinite().all()
            assert loss_fn(*inputs, **options).isnan()


BACKENDS = [("torch", F32), ("torch", BF16), ("torch", torch.float16), ("cpp", F32), ("cpp", BF16)]
FORMS = [{}, {"clip": 0.05}, {"floor": 0.5}, {"top_k": 7}, {"filter_eps": "auto"}]
ROWS = [(*backend, kind, form) for backend in BACKENDS for kind in DIVERGENCES for form in FORMS]
# The interpreter is slow. test_rows_triton.py has more of its rows.
ROWS += [("triton", torch.float16, kind, form) for kind in ("forward_kl", "jsd") for form in ({}, {"clip": 0.05})]


@pytest.mark.parametrize(("impl", "dtype", "divergence", "options"), ROWS, ids=str)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy in the interpreter
def test_a_strange_row_takes_no_gradient_from_the_others(impl, dtype, divergence, options):
    others = torch.arange(10) != 3
    options = {"divergence": divergence, "impl": impl, "memory_bytes": rows_of_bytes(6, 61), **options}

    def gradients(side=0, bad=None, **more):
        inputs = small_problem(dtype=dtype)
        if bad is not None:
            inputs[side][3] = bad
        return grads(fused_hsd_kl, *inputs, draw(61, dtype=dtype), **options, **more)[1:]

    want = gradients()
    # A NaN keeps all columns in the filter.
    off = {"rtol": 0.0, "atol": 0.02 * want[0].abs().max().item()} if "filter_eps" in options else {}
    for side, bad in ((0, NAN), (1, NAN)) if impl == "triton" else ((0, NAN), (0, INF), (1, NAN), (1, -INF)):
        found = gradients(side, bad)
        torch.testing.assert_close(found[0][others], want[0][others], **off)
        assert all(g.isnan().all() for g in (found[0][3], *found[1:])), (side, bad)
    kept = others.float()
    for got, like in zip(gradients(0, NAN, token_weights=kept), gradients(token_weights=kept), strict=True):
        assert torch.equal(got, like)


def test_targets_of_dropped_tokens_may_be_anything():
    torch.manual_seed(0)
    h_s, h_t, w = torch.randn(3, 8), torch.randn(3, 8), torch.randn(11, 8)
    kept = torch.tensor([1.0, 0.0, 2.0])
    with_pad = fused_hsd_kl(h_s, h_t, w, token_weights=kept, target_ids=torch.tensor([4, -100, 10]), return_stats=True)
    plain = fused_hsd_kl(h_s, h_t, w, token_weights=kept, target_ids=torch.tensor([4, 0, 10]), return_stats=True)
    assert torch.equal(with_pad.stats.student_logps, plain.stats.student_logps)
    assert with_pad.stats.student_logps[1] == 0 and with_pad.stats.student_logps[0] < 0
