"""top_k and the teacher's floor: every row backend against autograd of the reference, and what follows by algebra."""

import importlib.util
import math

import pytest
import torch

from hsd_kernels import Divergence, Head, fused_hsd_kl, reference, rows
from hsd_kernels.row_stats import RowStats
from hsd_kernels.testing import assert_within_budget, double, row_spec
from hsd_kernels.testing import draw as gaussian

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
NEEDS_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
DEVICE = {"triton": "cuda" if torch.cuda.is_available() else "cpu"}
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy in the interpreter, on -inf
every_backend = pytest.mark.parametrize("impl", ["torch", "cpp", pytest.param("triton", marks=NEEDS_TRITON)])


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


def found(loss_fn, tensors, divergence, head=Head, **options):
    """(loss, gradients)."""
    student, teacher, weight = (t.clone().requires_grad_(i != 1) for i, t in enumerate(tensors))
    loss = loss_fn(student, teacher, head(weight), divergence=divergence, **options)
    return [t.detach() for t in (loss, *torch.autograd.grad(loss, (student, weight)))]


def near(tokens=6, dim=8, vocab=301, device="cpu"):
    """(student, teacher, head) in fp32."""
    student = gaussian(tokens, dim)
    teacher = student + 0.3 * gaussian(tokens, dim, seed=1)
    return [t.to(device) for t in (student, teacher, gaussian(vocab, dim, seed=2))]


def with_softcap(weight):
    return Head(weight, gaussian(len(weight), seed=5).to(weight), logit_scale=-0.8, softcap=6.0)


@every_backend
@pytest.mark.parametrize("head", [Head, with_softcap], ids=["plain", "softcap and bias"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_single_precision_stays_within_the_budget(options, head, impl):
    for kind in KINDS if impl != "triton" else [KINDS[len(options) % 3]]:
        d, tensors = Divergence(kind, **options), near(device=DEVICE.get(impl, "cpu"))
        eager, exact = (found(reference.hsd_kl, t, d, head) for t in (tensors, double(*tensors)))
        for name, got, want, truth in zip(
            "lhw", found(fused_hsd_kl, tensors, d, head, impl=impl), eager, exact, strict=True
        ):
            assert_within_budget(name, got, want, truth, scale=20.0 * max(truth.abs().max().item(), 1e-2))


@every_backend
@pytest.mark.parametrize("kind", KINDS)
def test_a_top_k_that_leaves_nothing_out_is_none(kind, impl):
    tensors = near(vocab=61, device=DEVICE.get(impl, "cpu"))
    plain = found(fused_hsd_kl, tensors, Divergence(kind), impl=impl)
    for k in (61, 70):
        for rest in ("tail", "renormalise"):
            same = found(fused_hsd_kl, tensors, Divergence(kind, top_k=k, rest=rest), impl=impl)
            assert all(map(torch.equal, same, plain))
    for change in ({"top_k": 60}, {"top_k": 60, "top_of": "teacher"}, {"floor": 1e-30}, {"top_k": 60, "floor": 1e-30}):
        same = found(fused_hsd_kl, tensors, Divergence(kind, **change), impl=impl)
        for a, b in zip(same, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
    less = found(fused_hsd_kl, tensors, Divergence(kind, top_k=20), impl=impl)
    assert not torch.allclose(less[1], plain[1], rtol=2e-5, atol=2e-6)


@every_backend
@pytest.mark.parametrize("kind", ["reverse_kl", "jsd"])
@pytest.mark.parametrize("lead", [12.0, 30.0, 70.0])
def test_a_tail_of_little_mass_keeps_its_relative_accuracy(lead, kind, impl):
    """1 minus the mass of the k tokens is 0 from exp(-17) on."""
    student, teacher = gaussian(4, 97), gaussian(4, 97, seed=1)
    student[:, :3] += lead
    teacher[:, :3] += lead - 2.0
    spec = row_spec(kind, top_k=3)
    z = student.double().requires_grad_()
    value = reference.per_token_divergence(z, teacher.double(), spec.divergence)
    (exact,) = torch.autograd.grad(value.sum(), z)
    backend = rows.passes(rows.resolve(impl, torch.device(DEVICE.get(impl, "cpu")), torch.float32), 97, spec)
    given = [t.to(DEVICE.get(impl, "cpu")) for t in (student, teacher, torch.arange(4), torch.ones(4))]
    out = torch.empty_like(given[0])
    backend.statistics_and_gradient_(*given[:2], spec, None, None, None, *given[2:], out)
    torch.testing.assert_close(out[:, 3:].cpu().double(), exact[:, 3:], rtol=3e-5, atol=1e-38)


@every_backend
def test_statistics_are_those_of_the_whole_row_and_the_logits_stay(impl):
    device = DEVICE.get(impl, "cpu")
    student, teacher = gaussian(5, 301).to(device), gaussian(5, 301, seed=1).to(device)
    student[2, :299] = -math.inf  # fewer tokens than k
    teacher[2, :298] = -math.inf
    before = student.clone(), teacher.clone()
    backend = rows.resolve(impl, student.device, torch.float32)
    given = (student, teacher, row_spec(top_k=4), None, None, torch.arange(5, device=device) + 297)
    given = (*given[:5], given[5].clamp(max=300), torch.arange(5, device=device))
    got = rows.passes(backend, 301, given[2]).statistics(*given)
    want = backend.statistics(*given[:2], row_spec(), *given[3:])
    for name in RowStats._fields:
        if name not in ("kl", "grad_sum"):
            torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-5, atol=2e-6, msg=name)
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])


@every_backend
@pytest.mark.parametrize("head", [Head, with_softcap], ids=["plain", "softcap and bias"])
def test_no_rows(head, impl):
    student, teacher, weight = near(tokens=0, vocab=40, device=DEVICE.get(impl, "cpu"))
    loss, *gradients = found(fused_hsd_kl, (student, teacher, weight), Divergence(top_k=3), head, impl=impl)
    assert loss == 0 and all((g == 0).all() for g in gradients)
    backend = rows.passes(rows.resolve(impl, student.device, student.dtype), 40, row_spec(top_k=3))
    x, none = weight.new_empty(0, 40), weight.new_empty(0)
    stats = backend.statistics_and_gradient_(x, x, row_spec(top_k=3), None, None, None, none, none, x.clone())
    assert stats.kl.shape == (0,)


@every_backend
@pytest.mark.parametrize("rest", ["tail", "renormalise"])
def test_a_tie_at_the_kth_place_has_one_answer(rest, impl):
    """Statistics and gradient are two calls under a hook. Swapped ids would exchange the gradients of equal logits."""
    student, teacher, weight = near(vocab=50, device=DEVICE.get(impl, "cpu"))
    weight[10:40] = weight[10]  # 30 tokens of one logit
    d = Divergence("reverse_kl", top_k=8, rest=rest)
    own = weight + 0.1 * gaussian(50, 8, seed=3).to(weight)
    options = {"teacher_head": own, "impl": impl}
    at_once = found(fused_hsd_kl, (student, teacher, weight), d, **options)
    hooked = found(
        fused_hsd_kl, (student, teacher, weight), d, **options, token_weight_fn=lambda s: torch.ones_like(s.kl)
    )
    for a, b in zip(at_once, hooked, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@every_backend
@pytest.mark.parametrize("kind", KINDS)
def test_fewer_possible_tokens_than_k_are_a_smaller_vocabulary(kind, impl):
    tensors = near(vocab=20, device=DEVICE.get(impl, "cpu"))
    bias = torch.full((20,), -math.inf).to(tensors[0])
    bias[[1, 7, 12]] = 0.0
    got = found(fused_hsd_kl, tensors, Divergence(kind, top_k=5), lambda w: Head(w, bias), impl=impl)
    alone = (*tensors[:2], tensors[2][[1, 7, 12]])
    want = found(fused_hsd_kl, alone, Divergence(kind), impl=impl)
    assert (got[2][bias == -math.inf] == 0).all()
    for a, b in zip((*got[:2], got[2][[1, 7, 12]]), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@every_backend
@pytest.mark.parametrize("rest", ["tail", "renormalise"])
def test_a_nan_stays_in_its_row_and_a_row_of_weight_zero_is_zeros(rest, impl):
    device = DEVICE.get(impl, "cpu")
    spec = row_spec("reverse_kl", top_k=3, rest=rest)
    backend = rows.passes(rows.resolve(impl, torch.device(device), torch.float32), 40, spec)
    for side in range(2):
        pair = [gaussian(4, 40, seed=i).to(device) for i in range(2)]
        pair[side][1:3, 30] = math.nan
        weights, out = torch.tensor([1.0, 0.0, 1.0, 1.0], device=device), torch.full((4, 40), math.nan, device=device)
        stats = backend.statistics_and_gradient_(
            *pair, spec, None, None, None, torch.arange(4, device=device), weights, out
        )
        assert stats.kl.isnan().tolist() == [False, True, True, False]
        assert (out[1] == 0).all() and out[2].isnan().any() and not out[[0, 3]].isnan().any()


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


def test_a_floored_buckets_gradient_is_that_of_a_constant():
    """Of p (log p - c): c follows p's value and has no gradient."""
    z, q = draw(1, V).requires_grad_(), draw(2, V)
    loss = fused_hsd_kl(
        z[None],
        q[None],
        torch.eye(V, dtype=torch.float64),
        divergence=Divergence("reverse_kl", floor=0.5),
        impl="torch",
    )
    log_p, log_q = z.log_softmax(-1), q.log_softmax(-1)
    c = torch.maximum(log_q, log_p.detach() + math.log(0.5))
    assert 0 < (c > log_q).sum() < V
    for got, wanted in zip(
        *(torch.autograd.grad(x, z) for x in (loss, (log_p.exp() * (log_p - c)).sum())), strict=True
    ):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(("beta", "kind"), [(1e-6, "forward_kl"), (1.0 - 1e-6, "reverse_kl")])
def test_a_jsd_of_one_side_is_its_kl(beta, kind):
    """JSD_b / b -> KL(q || p) for b -> 0, and JSD_b / (1 - b) -> KL(p || q) for b -> 1; at the ends it is the KL."""
    z, eye = draw(1, V).requires_grad_(), torch.eye(V, dtype=torch.float64)
    q = z.detach() + 0.3 * draw(2, V)

    def of(divergence):
        loss = fused_hsd_kl(z[None], q[None], eye, divergence=divergence, impl="torch")
        return loss, *torch.autograd.grad(loss, z)

    for near_end, end, want in zip(
        of(Divergence("jsd", beta=beta)), of(Divergence("jsd", beta=round(beta))), of(Divergence(kind)), strict=True
    ):
        torch.testing.assert_close(end, want, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(near_end / 1e-6, want, rtol=1e-4, atol=1e-5)


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
