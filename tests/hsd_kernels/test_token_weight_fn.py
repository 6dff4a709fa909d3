"""The weight function: what it is shown, what its weights multiply, and that weight 0 drops a token."""

from collections import namedtuple

import pytest
import torch

from hsd_kernels import fused_hsd_kl, memory, reference
from hsd_kernels.row_stats import COLUMNS
from hsd_kernels.testing import draw, grads, rows_of_bytes, small_problem

F64, NAN = torch.float64, float("nan")
RowsOnly = namedtuple("RowsOnly", "rows")


def test_token_weight_fn_sees_its_rows_and_multiplies_the_weights(monkeypatch):
    monkeypatch.setattr(memory, "sizes", lambda *args, **options: memory.Sizes(chunk=4, buffer=8, stride=64))
    student, teacher, weight = small_problem(12)
    kept = torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0, 0.0, 0.5, 1.0, 1.0, -1.0, 1.0, 3.0])
    ids = torch.arange(12) * 5
    plain = fused_hsd_kl(student, teacher, weight, target_ids=ids, token_weights=kept, return_stats=True)
    table = draw(12).exp()  # what the hook knows about each token
    chunks = []

    def by_entropy_and_table(stats):
        chunks.append(stats)
        return stats.teacher_entropy * table[stats.rows]

    options = {"target_ids": ids}
    found = {}
    for reduction in ("none", "sum", "mean"):
        chunks.clear()
        found[reduction] = fused_hsd_kl(
            student,
            teacher,
            weight,
            token_weights=kept,
            token_weight_fn=by_entropy_and_table,
            reduction=reduction,
            **options,
        )
        assert [c.rows.tolist() for c in chunks] == [[0, 2, 3, 4], [6, 7, 8, 9], [10, 11]]
    for stats in chunks:
        for name in COLUMNS:
            torch.testing.assert_close(getattr(stats, name), getattr(plain.stats, name)[stats.rows], msg=name)
    want = plain.stats.kl * kept * plain.stats.teacher_entropy * table
    torch.testing.assert_close(found["none"], want)
    torch.testing.assert_close(found["sum"], want.sum())
    torch.testing.assert_close(found["mean"], want.sum() / 10)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("head", [True, False])
def test_token_weight_fn_gradient_is_that_of_fixed_weights(head, reduction):
    student, teacher, weight = small_problem(dtype=F64)
    upstream = draw(10, dtype=F64) if reduction == "none" else None
    entropy = fused_hsd_kl(student, teacher, weight, return_stats=True).stats.teacher_entropy
    calls = []

    def gate(stats):
        calls.append(len(stats.kl))
        return (stats.teacher_entropy > entropy.median()).double() * stats.kl

    kl = fused_hsd_kl(student, teacher, weight, reduction="none")
    fixed = (entropy > entropy.median()).double() * kl

    def run(**options):
        leaves = student.clone().requires_grad_(), weight.clone().requires_grad_(head)
        fused_hsd_kl(leaves[0], teacher, leaves[1], reduction=reduction, num_items=10, **options).backward(upstream)
        return [t.grad for t in leaves if t.requires_grad]

    hooked, weighted = run(token_weight_fn=gate), run(token_weights=fixed)
    assert calls == [10], "once per chunk, also where the backward runs the chunks again"
    for a, b in zip(hooked, weighted, strict=True):
        torch.testing.assert_close(a, b)


def test_token_weight_fn_runs_without_a_graph():
    student, teacher, weight = small_problem()

    def hook(stats):
        assert not torch.is_grad_enabled() and not any(t.requires_grad for t in stats if t is not None)
        return stats.kl * draw(10, grad=True)

    fused_hsd_kl(student.requires_grad_(), teacher, weight, token_weight_fn=hook).backward()


def test_nan_upstream_of_a_row_that_the_hook_dropped_reaches_nothing():
    torch.manual_seed(0)
    h_s, w = torch.randn(3, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    keep_last_two = lambda stats: (stats.rows > 0).float()  # noqa: E731
    loss = fused_hsd_kl(h_s, torch.randn(3, 8), w, token_weight_fn=keep_last_two, reduction="none")
    loss.backward(torch.tensor([float("nan"), 1.0, 1.0]))
    assert h_s.grad.isfinite().all() and w.grad.isfinite().all() and w.grad.abs().sum() > 0


def one_bad_row(bad):
    """Row 3 is NaN, or its reverse KL is infinite: a teacher with a head of its own can never produce token 5 there."""
    student, teacher, weight = small_problem()
    teacher_weight = weight.clone()
    if bad == "NaN":
        student[3] = NAN
    else:
        teacher_weight[:, 0], teacher_weight[5, 0] = 0.0, -1e20
        teacher[:, 0], teacher[3, 0] = 0.0, 1e20
    return student, teacher, weight, {"teacher_head": teacher_weight, "divergence": "reverse_kl"}


def backward(student, teacher, weight, upstream, head=True, **options):
    leaves = [student.clone().requires_grad_(), weight.clone().requires_grad_(head)]
    loss = fused_hsd_kl(leaves[0], teacher, leaves[1], **options)
    loss.backward(upstream)
    return [loss.detach(), *(t.grad for t in leaves if t.requires_grad)]


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("impl", ["auto", "torch"])
@pytest.mark.parametrize("bad", ["NaN", "infinite"])
def test_weight_zero_from_the_hook_is_weight_zero(bad, impl, reduction, head):
    student, teacher, weight, options = one_bad_row(bad)
    options |= {"reduction": reduction, "num_items": 10, "impl": impl, "memory_bytes": rows_of_bytes(4, 61)}
    terms = fused_hsd_kl(student, teacher, weight, **options | {"reduction": "none"})
    assert not terms[3].isfinite() and terms[[2, 4]].isfinite().all()
    problem = (student, teacher, weight, draw(10) if reduction == "none" else None, head)
    found = backward(*problem, **options, token_weight_fn=lambda stats: stats.kl.isfinite().float())
    want = backward(*problem, **options, token_weights=(torch.arange(10) != 3).float())
    for got, expected in zip(found, want, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_weight_zero_from_the_hook_leaves_the_reference_term(reduction):
    student, teacher, weight, options = one_bad_row("infinite")
    policy, upstream = draw(10, 16, seed=7), draw(10) if reduction == "none" else None
    options["reduction"] = reduction
    finite = lambda stats: stats.kl.isfinite().float()  # noqa: E731
    both = {"reference_hidden": policy, "reference_coef": 0.3, "token_weight_fn": finite}
    found = backward(student, teacher, weight, upstream, **options, **both)
    without = backward(student, teacher, weight, upstream, **options, token_weight_fn=finite)
    alone = grads(
        reference.hsd_kl, student, policy, weight, None, upstream, divergence="reverse_kl", reduction=reduction
    )
    for got, a, b in zip(found, without, alone, strict=True):
        torch.testing.assert_close(got, a + 0.3 * b)


@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_weight_from_the_hook_is_checked_as_a_given_one_is(reduction, bad):
    student, teacher, weight = small_problem(6)

    def one_bad(stats):
        return torch.where(stats.rows == 4, bad, 1.0)

    for options in ({"token_weight_fn": one_bad}, {"token_weights": one_bad(RowsOnly(torch.arange(6)))}):
        (name,) = options
        with pytest.raises(ValueError, match=f"^{name}: expected finite numbers, got 1 that are NaN or infinite$"):
            fused_hsd_kl(student, teacher, weight, reduction=reduction, **options)
    kept = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 1.0])  # a row that does not exist is not shown to the hook
    assert fused_hsd_kl(student, teacher, weight, token_weights=kept, token_weight_fn=one_bad).isfinite()


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_hook_may_write_on_what_it_is_shown(reduction, divergence):
    student, teacher, weight = small_problem()
    upstream = draw(10) if reduction == "none" else None
    options = {"divergence": divergence, "reduction": reduction}

    def in_place(stats):
        for name, column in stats._asdict().items():
            if name != "kl" and column is not None:
                column.fill_(7)
        return stats.kl.clamp_(max=0.5)

    found, want = (
        backward(student, teacher, weight, upstream, **options, token_weight_fn=fn)
        for fn in (in_place, lambda stats: stats.kl.clamp(max=0.5))
    )
    for got, expected in zip(found, want, strict=True):
        assert torch.equal(got, expected)
