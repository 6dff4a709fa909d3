"""The custom operators: opcheck, torch.compile over the public function, and what autograd may not do with them."""

import threading
from dataclasses import fields

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hsd_kernels import Divergence, Head, fused_hsd_kl, fused_token_loss, ops

T, D, V = 12, 16, 61


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def operands(dtype=torch.float32):
    student, weight, bias = (draw(*s, seed=i, dtype=dtype) for i, s in enumerate(((T, D), (V, D), (V,))))
    teacher, reference = draw(T, D, seed=3, dtype=dtype), draw(T, D, seed=4, dtype=dtype)
    return student.requires_grad_(), teacher, reference, weight.requires_grad_(), bias.requires_grad_()


def operator_tensors(student, teacher, reference, weight, bias, target_ids, token_weights):
    given = {"student_hidden": student, "teacher_hidden": teacher, "reference_hidden": reference, "weight": weight}
    given |= {"bias": bias, "target_ids": target_ids, "token_weights": token_weights}
    return tuple(ops.Tensors(**dict.fromkeys(ops.Tensors._fields) | given))


def arguments(divergence, reduction, wanted):
    given = dict(logit_scale=1.0, softcap=None, linear=False, reference_coef=0.2, filter_eps=None, memory_bytes=None)
    given |= dict(impl="torch", group_name=None, reduction=reduction, num_items=None, hook=0)
    given |= dict(zip(("train_hidden", "train_weight", "train_bias"), wanted, strict=True))
    return ops._DIVERGENCE.pack(divergence) | ops._OPTIONS.pack(ops.Options(**given))


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
    given = arguments(Divergence("jsd", beta=0.3, temperature=0.7, clip=0.5), reduction, wanted)
    tensors = operator_tensors(student, teacher, reference, weight, bias, torch.arange(T), draw(T).abs())
    torch.library.opcheck(torch.ops.hsd_kernels.fused_hsd_kl.default, tensors, given)


def test_opcheck_of_buckets():
    student, teacher, reference, weight, bias = operands(torch.float32)
    given = arguments(Divergence("reverse_kl", top_k=3, top_of="teacher", floor=0.2), "mean", [True, True, True])
    tensors = operator_tensors(student, teacher, reference, weight, bias, torch.arange(T), draw(T).abs())
    torch.library.opcheck(torch.ops.hsd_kernels.fused_hsd_kl.default, tensors, given)


def test_opcheck_backward():
    student, teacher, reference, weight, bias = (t.detach() for t in operands())
    tensors = operator_tensors(student, teacher, reference, weight, bias, None, draw(2, T).abs())
    op = torch.ops.hsd_kernels.fused_hsd_kl_backward.default
    torch.library.opcheck(op, tensors, arguments(Divergence(), "none", [True, True, True]))


def test_every_field_of_a_divergence_crosses_the_operator():
    schema = torch.ops.hsd_kernels.fused_hsd_kl.default._schema
    options = [a for a in schema.arguments if a.kwarg_only]
    assert [a.name for a in schema.arguments if not a.kwarg_only] == list(ops.Tensors._fields)
    assert [a.name for a in options] == [f.name for record in (Divergence, ops.Options) for f in fields(record)]
    given = Divergence("jsd", beta=0.25, temperature=2, clip=0.5, clip_form="nonnegative")
    packed = ops._DIVERGENCE.pack(given)
    assert ops._DIVERGENCE.unpack(packed) == given and type(packed["temperature"]) is float


@pytest.mark.parametrize("dynamic", [True, None])
def test_fullgraph_with_any_divergence_and_head(dynamic):
    """Built inside the compiled function of its own arguments, and handed in as objects."""
    student, teacher, _, weight, bias = operands()

    def inside(h, beta, temperature, cap):
        head = Head(weight, bias, softcap=cap)
        return fused_hsd_kl(h, teacher, head, divergence=Divergence("jsd", beta=beta, temperature=temperature))

    def outside(h, head, divergence):
        return fused_hsd_kl(h, teacher, head, divergence=divergence, return_stats=True).stats.kl

    torch.compiler.reset()
    compiled = [torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager") for f in (inside, outside)]
    for beta, temperature, cap in ((0.3, 1.5, 4.0), (0.7, 0.5, 2.0), (0.1, 2.0, 3.0)):
        assert torch.equal(compiled[0](student, beta, temperature, cap), inside(student, beta, temperature, cap))
        given = student, Head(weight, bias, softcap=cap), Divergence(beta=beta, temperature=temperature, clip=0.1)
        assert torch.equal(compiled[1](*given), outside(*given))


@pytest.mark.parametrize(("reduction", "dynamic"), [("mean", True), ("none", None)])
def test_fullgraph_with_any_number_of_tokens(reduction, dynamic):
    student, teacher, reference, weight, bias = operands()

    def step(student, teacher, reference, weights, ids):
        given = {"reference_hidden": reference, "reference_coef": 0.3, "token_weights": weights, "target_ids": ids}
        out = fused_hsd_kl(student, teacher, Head(weight, bias), **given, reduction=reduction, return_stats=True)
        return out.loss.sum(), out.stats.student_logps

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
        return fused_hsd_kl(student, teacher, Head(weight, bias), filter_eps=eps)

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for eps in (None, "auto", 1e-3, 1e-2, 1e-1):
        assert torch.equal(compiled(eps), step(eps))


def test_autocast_is_respected_under_compile():
    student, teacher, _, weight, bias = operands()

    def step():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return fused_hsd_kl(student, teacher, Head(weight, bias))

    torch.compiler.reset()
    want = step()
    got = torch.compile(step, fullgraph=True, backend="aot_eager")()
    assert torch.equal(got, want) and not torch.equal(want, fused_hsd_kl(student, teacher, Head(weight, bias)))


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
    student, teacher, _, weight, _ = operands()

    def broken(stats):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fused_hsd_kl(student, teacher, weight, token_weight_fn=broken)
    assert not ops._hooks


def test_threads_do_not_share_a_hook_number(monkeypatch):
    """Each of two hooks is lent while the other one is being lent."""

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


@pytest.mark.parametrize(
    ("frozen", "reference", "reduction", "units"),
    [(False, False, "mean", 4), (True, False, "mean", 3), (False, True, "mean", 5), (False, False, "none", 6)],
)
def test_a_counter_of_flops_sees_the_products(frozen, reference, reduction, units):
    student, teacher, reference_hidden, weight, _ = operands()
    extra = {"reference_hidden": reference_hidden, "reference_coef": 0.1} if reference else {}
    with FlopCounterMode(display=False) as counter:
        fused_hsd_kl(
            student, teacher, weight.detach() if frozen else weight, reduction=reduction, **extra
        ).sum().backward()
    assert counter.get_total_flops() == units * 2 * T * D * V


@pytest.mark.parametrize(
    ("frozen", "reduction", "units"), [(False, "mean", 3), (True, "mean", 2), (False, "none", 4), (True, "none", 2)]
)
def test_a_counter_of_flops_sees_the_products_of_log_probs(frozen, reduction, units):
    student, _, _, weight, _ = operands()
    weight = weight.detach() if frozen else weight
    with FlopCounterMode(display=False) as counter:
        out = fused_token_loss(student, weight, torch.arange(T), advantages=torch.ones(T), reduction=reduction)
        out.loss.sum().backward()
    assert counter.get_total_flops() == units * 2 * T * D * V


class Exported(torch.nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.weight, self.loss = torch.nn.Parameter(draw(V, D, seed=2)), loss

    def forward(self, student, other):
        return self.loss(student, other, self.weight)


@pytest.mark.parametrize("leading", [(6,), (2, 3)])
@pytest.mark.parametrize("loss", ["kl", "token"])
def test_export_with_a_dynamic_number_of_tokens(loss, leading):
    def token(student, targets, weight):
        return fused_token_loss(student, weight, targets, advantages=torch.ones_like(student[..., 0]))

    def given(leading):
        return draw(*leading, D), draw(*leading, D, seed=1) if loss == "kl" else torch.zeros(leading, dtype=torch.long)

    module = Exported(fused_hsd_kl if loss == "kl" else token)
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    axis = len(leading) - 1
    program = torch.export.export(module, given(leading), dynamic_shapes=({axis: tokens}, {axis: tokens}))
    longer = given((*leading[:-1], 11))
    torch.testing.assert_close(program.module()(*longer), module(*longer))
