"""The custom operators: opcheck, torch.compile over the public function, and what autograd may not do with them."""

import threading

import pytest
import torch

from hsd_kernels import fused_hsd_kl

T, D, V = 12, 16, 61


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def operands(dtype=torch.float32):
    student, weight, bias = (draw(*s, seed=i, dtype=dtype) for i, s in enumerate(((T, D), (V, D), (V,))))
    teacher, reference = draw(T, D, seed=3, dtype=dtype), draw(T, D, seed=4, dtype=dtype)
    return student.requires_grad_(), teacher, reference, weight.requires_grad_(), bias.requires_grad_()


@pytest.mark.parametrize(
    ("dtype", "reduction", "wanted"),
    [
        (torch.float32, "mean", [True, True, True]),
        (torch.bfloat16, "none", [True, True, True]),
        (torch.float16, "mean", [True, False, False]),
        (torch.float64, "none", [True, False, False]),
    ],
)
def test_opcheck_forward(dtype, reduction, wanted):
    student, teacher, reference, weight, bias = operands(dtype)
    if not wanted[1]:
        weight, bias = weight.detach(), bias.detach()
    args = (student, teacher, reference, weight, bias, None, None, None, None, torch.arange(T), draw(T).abs())
    options = ("jsd", 0.3, 0.7, 0.5, "opsd", 1.0, None, False, 0.2, None, None, "torch", None)
    torch.library.opcheck(torch.ops.hsd_kernels.fused_hsd_kl.default, (*args, *options, reduction, None, 0, wanted))


def test_opcheck_backward():
    student, teacher, reference, weight, bias = (t.detach() for t in operands())
    args = (student, teacher, reference, weight, bias, None, None, None, None, draw(T), draw(2, T).abs())
    options = ("forward_kl", 0.5, 1.0, None, "opsd", 1.0, None, False, 0.2, None, None, "torch", None)
    op = torch.ops.hsd_kernels.fused_hsd_kl_backward.default
    torch.library.opcheck(op, (*args, *options, [True, True, True]))


@pytest.mark.parametrize(("reduction", "dynamic"), [("mean", True), ("none", None)])
def test_fullgraph_with_any_number_of_tokens(reduction, dynamic):
    student, teacher, reference, weight, bias = operands()

    def step(student, teacher, reference, weights, ids):
        given = {"reference_hidden": reference, "reference_coef": 0.3, "token_weights": weights, "target_ids": ids}
        out = fused_hsd_kl(student, teacher, weight, bias, **given, reduction=reduction, return_stats=True)
        return out.loss.sum(), out.student_logps

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (T, 7, 9):
        found = []
        for function in (step, compiled):
            for t in (student, weight, bias):
                t.grad = None
            loss, logps = function(student[:n], teacher[:n], reference[:n], draw(T).abs()[:n], torch.arange(n))
            loss.backward()
            found.append((loss, logps, student.grad, weight.grad, bias.grad))
        for eager, traced in zip(*found, strict=True):
            assert torch.equal(eager, traced)


@pytest.mark.parametrize("dynamic", [True, None])
def test_fullgraph_with_any_filter(dynamic):
    student, teacher, _, weight, bias = operands()

    def step(eps):
        return fused_hsd_kl(student, teacher, weight, bias, filter_eps=eps)

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for eps in (None, "auto", 1e-3, 1e-2, 1e-1):
        assert torch.equal(compiled(eps), step(eps))


def test_autocast_is_respected_under_compile():
    student, teacher, _, weight, bias = operands()

    def step():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return fused_hsd_kl(student, teacher, weight, bias)

    torch.compiler.reset()
    want = step()
    got = torch.compile(step, fullgraph=True, backend="aot_eager")()
    assert torch.equal(got, want) and not torch.equal(want, fused_hsd_kl(student, teacher, weight, bias))


def test_what_dynamo_of_torch_2_8_cannot_trace_is_not_traced(monkeypatch):
    """Inside the operators it may be called."""
    student, teacher, _, weight, _ = operands()
    monkeypatch.setattr(torch.amp, "is_autocast_available", torch._dynamo.disable(torch.amp.is_autocast_available))
    torch.compiler.reset()
    step = torch.compile(lambda h: fused_hsd_kl(h, teacher, weight), fullgraph=True, backend="aot_eager")
    assert torch.equal(step(student), fused_hsd_kl(student, teacher, weight))


def test_a_hook_under_compile_is_refused_by_name():
    student, teacher, _, weight, _ = operands()
    torch.compiler.reset()
    step = torch.compile(
        lambda h: fused_hsd_kl(h, teacher, weight, token_weight_fn=lambda s: s.kl), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(Exception, match="token_weight_fn"):
        step(student)


def test_a_hook_that_raises_leaves_nothing_behind():
    from hsd_kernels import ops

    student, teacher, _, weight, _ = operands()

    def broken(stats):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fused_hsd_kl(student, teacher, weight, token_weight_fn=broken)
    assert not ops._hooks


def test_threads_do_not_share_a_hook_number(monkeypatch):
    """Each of two hooks is lent while the other one is being lent."""
    from hsd_kernels import ops

    class Slow(dict):
        def __setitem__(self, number, hook):
            barrier.wait()  # both have drawn their numbers, neither has stored its hook
            super().__setitem__(number, hook)

    barrier = threading.Barrier(2, timeout=10.0)
    monkeypatch.setattr(ops, "_hooks", Slow())
    student, teacher, _, weight, _ = (t.detach() for t in operands())
    found = {}

    def work(scale):
        fn = lambda stats: torch.full_like(stats.kl, scale)  # noqa: E731
        found[scale] = fused_hsd_kl(student, teacher, weight, token_weight_fn=fn)

    threads = [threading.Thread(target=work, args=(scale,)) for scale in (2.0, 3.0)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    want = fused_hsd_kl(student, teacher, weight)
    for scale in (2.0, 3.0):
        torch.testing.assert_close(found[scale], scale * want)


def test_hooks_may_nest():
    """A hook that itself computes a loss with a hook: each call finds its own."""
    student, teacher, _, weight, _ = operands()
    inner = fused_hsd_kl(student, teacher, weight, token_weight_fn=lambda s: 3.0 * s.kl).detach()
    seen = []

    def outer(stats):
        seen.append(fused_hsd_kl(student, teacher, weight, token_weight_fn=lambda s: 3.0 * s.kl).detach())
        return torch.full_like(stats.kl, 2.0)

    got = fused_hsd_kl(student, teacher, weight, token_weight_fn=outer)
    assert torch.equal(seen[0], inner)
    torch.testing.assert_close(got, 2.0 * fused_hsd_kl(student, teacher, weight))
