"""The sampled token's losses against full logits in fp64, and the laws of an operator."""

import pytest
import torch

from hsd_kernels import Head, fused_hsd_kl, fused_token_logps, fused_token_loss, reference, token_ops
from hsd_kernels.testing import assert_within_budget, draw

T, D, V = 12, 16, 61
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
pytestmark = pytest.mark.usefixtures("poisoned_memory")
TERMS = {
    "surrogate": ("advantages", "old_logps"),
    "on policy": ("advantages",),
    "k3": ("reference_logps",),
    "both": ("advantages", "old_logps", "reference_logps"),
}


def operands(dtype=F64, tokens=T):
    hidden, weight, bias = draw(tokens, D), draw(V, D, scale=0.5, seed=2), draw(V, seed=3)
    return [t.to(dtype).requires_grad_() for t in (hidden, weight, bias)]


def given(terms="both", tokens=T, **options):
    """Old log-probs around the clip, a reference apart from the policy, some tokens dropped, of any sign."""
    hidden, weight, bias = (t.detach() for t in operands(F64, tokens))
    ids = torch.arange(tokens) * 7 % V
    logps = reference.token_logps(hidden, Head(weight, bias), ids)
    found = {
        "advantages": draw(tokens, dtype=F64, seed=4),
        "old_logps": logps + 0.3 * draw(tokens, dtype=F64, seed=5),
        "reference_logps": logps + draw(tokens, dtype=F64, seed=6),
    }
    options |= {name: found[name] for name in TERMS[terms]}
    if "reference_logps" in options:
        options["reference_coef"] = 0.3
    weights = draw(tokens, dtype=F64, seed=7)
    weights[::4] = 0.0
    return ids, options | {"token_weights": weights}


def run(function, tensors, ids, upstream=None, form=None, **options):
    hidden, weight, bias = (t.detach().clone().requires_grad_() for t in tensors)
    out = function(hidden, Head(weight, bias, **form or {}), ids, **options)
    loss = out.loss if isinstance(out, tuple) else out
    loss.backward(upstream)
    return [loss.detach(), hidden.grad, weight.grad, bias.grad]


@pytest.mark.parametrize("rows", [1, 5, 100])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("terms", TERMS)
def test_loss_and_gradients(terms, reduction, rows):
    ids, options = given(terms, temperature=0.7, epsilon_low=0.1, epsilon_high=0.3, reduction=reduction)
    options |= {"form": {"logit_scale": -1.5, "softcap": 4.0}, "upstream": None}
    if reduction == "none":
        options["upstream"] = draw(T, dtype=F64, seed=8)
    found = run(fused_token_loss, operands(), ids, **options, memory_bytes=rows * V * 8)
    for got, want in zip(found, run(reference.token_loss, operands(), ids, **options), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dual_clip", [None, 1.5])
def test_clips(dual_clip):
    """Ratios on both sides of every clip, for advantages of both signs: value and slope by hand."""
    logps = torch.tensor([-1.0] * 8, dtype=F64)
    ratios = torch.tensor([0.5, 0.9, 1.1, 1.4, 0.5, 0.9, 1.1, 4.0], dtype=F64)
    gain = torch.tensor([1.0] * 4 + [-2.0] * 4, dtype=F64)
    options = {"advantages": gain, "old_logps": logps - ratios.log(), "dual_clip": dual_clip, "reduction": "none"}
    head = torch.eye(2, dtype=F64)
    p = logps.exp()
    hidden = torch.stack([p, 1.0 - p], -1).log().requires_grad_()
    out = fused_token_loss(hidden, head, torch.zeros(8, dtype=torch.long), **options)
    far = 1.5 if dual_clip else 4.0
    objective = torch.tensor([0.5, 0.9, 1.1, 1.2, -1.6, -1.8, -2.2, -2.0 * far], dtype=F64)
    torch.testing.assert_close(out.loss, -objective)
    live = torch.tensor([1, 1, 1, 0, 0, 1, 1, dual_clip is None], dtype=F64)
    (g,) = torch.autograd.grad(out.loss.sum(), hidden)
    torch.testing.assert_close(g[:, 0], -(ratios * gain * live) * (1.0 - p))


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("gap", [0.0, 1e-4, 19.0, 21.0, 89.0, 1e4])
def test_exponentials_are_bounded(gap, dtype):
    ids = torch.arange(T) * 7 % V
    tensors = [t.detach() for t in operands(dtype)]
    logps = fused_token_logps(tensors[0], Head(*tensors[1:]), ids)
    for options in (
        {"reference_logps": logps + gap, "reference_coef": 1.0},
        {"advantages": -torch.ones(T), "old_logps": logps - gap},
        {"advantages": torch.ones(T), "old_logps": logps + gap},
    ):
        tangent = 1.0 + max(0.0, gap - 20.0)
        found = run(fused_token_loss, tensors, ids, **options)
        if dtype != F16 or gap < 20.0 or "advantages" not in options:
            assert found[0].isfinite()
        finite = dtype != F16 or gap < 10.0  # e^20 is no number of fp16: an unscaled gradient may be infinite, not NaN
        for g in found[1:]:
            assert not g.isnan().any() and (g.isfinite().all() or not finite)
        if dtype == F32 and "reference_logps" in options:
            want = torch.tensor(min(gap, 20.0), dtype=F64).exp() * tangent - 1.0 - gap
            torch.testing.assert_close(found[0].double(), want, rtol=1e-4, atol=1e-8)


def test_k3_of_nearly_equal_policies_is_not_a_rounding_error():
    ids = torch.arange(T) * 7 % V
    tensors = [t.detach() for t in operands(F32)]
    logps = fused_token_logps(tensors[0], Head(*tensors[1:]), ids)
    gap = 1e-3 * torch.ones(T)
    loss = fused_token_loss(tensors[0], Head(*tensors[1:]), ids, reference_logps=logps + gap, reference_coef=1.0).loss
    assert abs(loss.item() / 0.5e-6 - 1.0) < 2e-3


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("terms", TERMS)
def test_error_budget(terms, dtype):
    ids, options = given(terms)
    tensors = operands(dtype)
    found = run(fused_token_loss, tensors, ids, **options)
    exact = run(reference.token_loss, [t.double() for t in tensors], ids, **options)
    narrow = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    eager = run(reference.token_loss, [t.float() for t in tensors], ids, **narrow)
    for name, got, same, want in zip("lhwb", found, eager, exact, strict=True):
        assert got.dtype == (F32 if name == "l" else dtype)
        scale = want.abs().max().item() + 20.0 * torch.finfo(F32).eps / torch.finfo(got.dtype).eps
        assert_within_budget(name, got, same.to(got.dtype), want, scale=scale)


@pytest.mark.parametrize("size", [10.0, 15.0, 20.0])
def test_gradient_of_a_confident_token(size):
    """1 - p of the sampled token down to 1e-8: a softmax minus one would be 0 or noise."""
    hidden = torch.zeros(3, 8)
    hidden[:, 2] = size
    hidden += 0.1 * draw(3, 8)
    ids = torch.full((3,), 2)
    found = run(fused_token_loss, (hidden, torch.eye(8), torch.zeros(8)), ids, advantages=torch.ones(3))
    exact = run(
        reference.token_loss,
        [t.double() for t in (hidden, torch.eye(8), torch.zeros(8))],
        ids,
        advantages=torch.ones(3),
    )
    torch.testing.assert_close(found[1].double(), exact[1], rtol=1e-5, atol=0.0)


def test_logps_are_those_of_full_logits_and_differentiable():
    hidden, weight, bias = operands()
    ids = torch.arange(T) * 7 % V
    mask = torch.ones(T).masked_fill(torch.arange(T) % 3 == 0, 0.0)
    poisoned = hidden.detach().clone()
    poisoned[mask == 0] = torch.nan
    ids_with_padding = ids.where(mask != 0, -100)

    def sequence_ratio(logps, old):
        return ((logps - old) * mask).view(3, 4).mean(-1).exp().sum()

    old = draw(T, dtype=F64, seed=9)
    leaf = poisoned.requires_grad_()
    logps = fused_token_logps(leaf, Head(weight, bias), ids_with_padding, token_weights=mask)
    assert (logps[mask == 0] == 0).all()
    got = torch.autograd.grad(sequence_ratio(logps, old), (leaf, weight, bias))
    want_logps = reference.token_logps(hidden, Head(weight, bias), ids)
    torch.testing.assert_close(logps[mask != 0], want_logps[mask != 0])
    for g, w in zip(got, torch.autograd.grad(sequence_ratio(want_logps, old), (hidden, weight, bias)), strict=True):
        torch.testing.assert_close(g, w)
    with torch.no_grad():
        assert not fused_token_logps(hidden, weight, ids).requires_grad


def test_log_probs_agree_with_those_of_the_divergence():
    hidden, weight, bias = (t.detach() for t in operands(F32))
    ids = torch.arange(T) * 7 % V
    stats = fused_hsd_kl(hidden, hidden + 1.0, Head(weight, bias), target_ids=ids, return_stats=True).stats
    torch.testing.assert_close(fused_token_logps(hidden, Head(weight, bias), ids), stats.student_logps)


def test_without_old_log_probs_it_is_the_policy_gradient():
    hidden, weight, bias = operands()
    ids, options = given("on policy")
    loss = fused_token_loss(hidden, Head(weight, bias), ids, **options, reduction="sum").loss
    logps = reference.token_logps(hidden, Head(weight, bias), ids)
    want = -(options["token_weights"] * options["advantages"] * logps).sum()
    torch.testing.assert_close(*(torch.autograd.grad(x, hidden)[0] for x in (loss, want)))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("terms", TERMS)
def test_gradcheck(terms, reduction):
    ids, options = given(terms, tokens=4, reduction=reduction)
    hidden, weight, bias = operands(tokens=4)
    cut = [hidden, weight.detach()[:11].requires_grad_(), bias.detach()[:11].requires_grad_()]
    ids = ids % 11
    if terms in ("surrogate", "both"):  # away from the clip's corners
        options |= {"epsilon_low": 0.9, "epsilon_high": 30.0}
    if terms == "on policy":  # its value is constant: the gradient is of the estimator
        options["old_logps"] = reference.token_logps(cut[0], Head(*cut[1:]), ids).detach() + 0.01

    def loss(h, w, b):
        return fused_token_loss(h, Head(w, b), ids, **options).loss

    assert torch.autograd.gradcheck(loss, cut)


@pytest.mark.parametrize(
    ("dtype", "reduction", "wanted"),
    [
        (F32, "mean", (True, True, True)),
        (BF16, "none", (True, True, True)),
        (F16, "sum", (True, False, False)),
        (F32, "none", (True, False, False)),
    ],
)
def test_opcheck(dtype, reduction, wanted):
    hidden, weight, bias = operands(dtype)
    if not wanted[1]:
        weight, bias = weight.detach(), bias.detach()
    ids, options = given("both")
    tensors = dict(hidden=hidden, weight=weight, bias=bias, target_ids=ids)
    tensors |= {n: options[n] for n in ("token_weights", "advantages", "old_logps", "reference_logps")}
    given_options = token_ops.Options(1.0, 3.0, 0.7, *wanted, None, reduction, dual_clip=3.0, reference_coef=0.1)
    packed = token_ops._OPTIONS.pack(given_options)
    torch.library.opcheck(torch.ops.hsd_kernels.fused_token_loss.default, tuple(tensors.values()), packed)
    backward = [t.detach() if t is not None else None for t in (hidden, weight, bias, ids, options["token_weights"])]
    op = torch.ops.hsd_kernels.fused_token_loss_backward.default
    torch.library.opcheck(op, (*backward, None, None, None), packed)


@pytest.mark.parametrize(("reduction", "dynamic"), [("mean", True), ("none", None)])
def test_fullgraph_with_any_number_of_tokens(reduction, dynamic):
    hidden, weight, bias = operands(F32)
    ids, options = given("both", reduction=reduction)

    def step(hidden, ids, per_token):
        out = fused_token_loss(hidden, Head(weight, bias), ids, **options | per_token)
        return out.loss.sum() + fused_token_logps(hidden, Head(weight, bias), ids).mean(), out.logps

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (T, 7, 9):
        per_token = {k: v[:n] for k, v in options.items() if isinstance(v, torch.Tensor)}
        found = []
        for function in (step, compiled):
            loss, logps = function(hidden[:n], ids[:n], per_token)
            found.append((loss, logps, *torch.autograd.grad(loss, (hidden, weight, bias))))
        for eager, traced in zip(*found, strict=True):
            assert torch.equal(eager, traced)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_and_forward_mode_derivatives_are_refused(reduction):
    hidden, weight, _ = operands(F32)
    ids = torch.arange(T)
    loss = fused_token_loss(hidden, weight, ids, advantages=torch.ones(T), reduction=reduction).loss.sum()
    with pytest.raises(RuntimeError, match=r"^fused_token_loss: expected create_graph=False"):
        torch.autograd.grad(loss, hidden, create_graph=True)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(hidden.detach(), hidden.detach())
        with pytest.raises(RuntimeError, match=r"^fused_token_loss: expected tensors without a tangent"):
            fused_token_logps(dual, weight.detach(), ids)


@pytest.mark.parametrize("changed", ["hidden", "weight", "bias"])
def test_inputs_changed_before_a_per_token_backward_are_an_error(changed):
    tensors = dict(zip(("hidden", "weight", "bias"), operands(F32), strict=True))
    logps = fused_token_logps(tensors["hidden"], Head(tensors["weight"], tensors["bias"]), torch.arange(T))
    with torch.no_grad():
        tensors[changed].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logps.sum().backward()


def test_what_is_kept_for_the_backward():
    hidden, weight, _ = operands(F32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        fused_token_loss(hidden, weight, torch.arange(T), advantages=torch.ones(T))
    assert sum(kept) == T * D + V * D


def test_fp16_with_a_loss_scale():
    tensors = operands(F16, 64)
    ids = torch.arange(64) % V
    options = {"advantages": 0.02 * draw(64), "num_items": 32768}
    found = run(fused_token_loss, tensors, ids, torch.tensor(65536.0), **options)
    exact = run(reference.token_loss, [t.double() for t in tensors], ids, **options)
    for got, want in zip(found[1:], exact[1:], strict=True):
        assert ((got.double() - want * 65536.0).abs().sum() <= 2e-3 * (want * 65536.0).abs().sum()).item()


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("terms", TERMS)
def test_a_frozen_head_makes_the_gradient_of_a_per_token_loss_in_the_forward(terms, dtype):
    ids, options = given(terms, reduction="none")
    hidden, weight, bias = (t.detach() for t in operands(dtype))
    upstream = draw(T, seed=8)
    upstream[options["token_weights"] == 0] = torch.nan

    def gradient(weight):
        leaf = hidden.clone().requires_grad_()
        fused_token_loss(leaf, Head(weight, bias), ids, **options).loss.backward(upstream)
        return leaf.grad

    found, want = gradient(weight), gradient(weight.requires_grad_())
    rounded = 4 * torch.finfo(dtype).eps * want.abs().max().item()  # once to be kept, and once more
    torch.testing.assert_close(found, want, rtol=0.0, atol=rounded)


@pytest.mark.parametrize("made", ["hidden", "weight", "target_ids", "token_weights"])
def test_a_tensor_of_inference_mode(made):
    """Autograd refuses to save one for the backward of a per-token loss. Sampled tokens often are."""
    hidden, weight, _ = operands(F32)
    call = {"hidden": hidden, "head": weight, "target_ids": torch.arange(T), "token_weights": torch.ones(T)}
    name = "head" if made == "weight" else made
    with torch.inference_mode():
        of_inference = call[name].detach().clone()
    plain = call | {name: call[name].detach().clone()}
    trained = weight if made == "hidden" else hidden
    found, want = (
        torch.autograd.grad(fused_token_logps(**given).sum(), trained) for given in (call | {name: of_inference}, plain)
    )
    assert torch.equal(found[0], want[0])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_have_the_layout_that_a_compiler_is_told(reduction):
    hidden, weight, bias = (t.detach().t().contiguous().t() if t.dim() == 2 else t.detach() for t in operands(F32))
    ids, options = given("both", reduction=reduction)
    tensors = [t.requires_grad_() for t in (hidden, weight, bias)]
    found = []
    for function in (fused_token_loss, torch.compile(fused_token_loss, fullgraph=True, backend="aot_eager")):
        torch.compiler.reset()
        found.append(torch.autograd.grad(function(hidden, Head(weight, bias), ids, **options).loss.sum(), tensors))
    for eager, traced in zip(*found, strict=True):
        assert torch.equal(eager, traced) and eager.stride() == traced.stride()
    packed = token_ops._OPTIONS.pack(token_ops.Options(1.0, None, 1.0, True, True, True, None, reduction))
    per_token = [options[n] for n in ("token_weights", "advantages", "old_logps", "reference_logps")]
    torch.library.opcheck(
        torch.ops.hsd_kernels.fused_token_loss.default, (hidden, weight, bias, ids, *per_token), packed
    )


@pytest.mark.parametrize("mask", [torch.ones(T).bool(), torch.arange(T), -torch.arange(T) / 8.0])
def test_weights_of_log_probs_are_a_mask(mask):
    hidden, weight, _ = (t.detach() for t in operands(F32))
    want = fused_token_logps(hidden, weight, torch.arange(T))
    assert torch.equal(
        fused_token_logps(hidden, weight, torch.arange(T), token_weights=mask), want.masked_fill(mask == 0, 0.0)
    )


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_dropped_tokens_are_not_read_and_nothing_to_do_is_zero(dtype):
    hidden, weight, bias = operands(dtype)
    poisoned = hidden.detach().clone()
    poisoned[::4] = torch.nan
    ids, options = given("both")
    ids[::4] = -100
    options["advantages"][::4] = torch.nan
    found = run(fused_token_loss, (poisoned, weight, bias), ids, **options)
    assert all(t.isfinite().all() for t in found) and (found[1][::4] == 0).all()
    options["token_weights"] = torch.zeros(T)
    assert all((t == 0).all() for t in run(fused_token_loss, (poisoned, weight, bias), ids, **options))


def test_autocast_is_the_explicit_cast():
    tensors = operands(F32)
    ids, options = given("both")
    with torch.autocast("cpu", BF16):
        found = run(fused_token_loss, tensors, ids, **options)
    want = run(fused_token_loss, [t.to(BF16) for t in tensors], ids, **options)
    assert torch.equal(found[0], want[0])
    for got, expected in zip(found[1:], want[1:], strict=True):
        assert got.dtype == F32 and torch.equal(got, expected.float())


def test_leading_dimensions_are_only_a_view():
    hidden, weight, _ = (t.detach() for t in operands(F32))
    flat = fused_token_loss(hidden, weight, torch.arange(T), advantages=torch.ones(T), reduction="none")
    shape = (3, 4)
    shaped = fused_token_loss(
        hidden.view(3, 4, D), weight, torch.arange(T).view(shape), advantages=torch.ones(shape), reduction="none"
    )
    for a, b in zip(flat, shaped, strict=True):
        assert torch.equal(a.view(shape), b)


ONES = torch.ones(T)
REFUSED = {
    "nothing to do": ({"advantages": None}, ValueError, "advantages: expected a tensor"),
    "old log-probs alone": (
        {"advantages": None, "reference_logps": ONES, "reference_coef": 0.1, "old_logps": ONES},
        ValueError,
        "old_logps: expected None without advantages",
    ),
    "reference without coef": ({"reference_logps": ONES}, ValueError, "reference_logps: expected a tensor with"),
    "coef without reference": ({"reference_coef": 0.1}, ValueError, "reference_logps: expected a tensor with"),
    "shape": ({"advantages": torch.ones(T, 1)}, ValueError, r"advantages: expected shape \(12,\), got \(12, 1\)"),
    "advantages grad": ({"advantages": torch.ones(T, requires_grad=True)}, ValueError, "advantages: expected .*detach"),
    "targets": ({"target_ids": torch.full((T,), V)}, ValueError, r"target_ids: expected values in \[0, 61\)"),
    "float targets": ({"target_ids": torch.zeros(T)}, TypeError, "target_ids: expected integers"),
    "no targets": ({"target_ids": None}, TypeError, "target_ids: expected a torch.Tensor, got NoneType"),
    "weight dtype": ({"head": torch.ones(V, D).double()}, TypeError, "head.weight: expected the dtype of hidden"),
    "hidden": ({"hidden": torch.ones(T, D + 1)}, ValueError, r"hidden: expected shape \(..., 16\)"),
    "vocabulary": ({"head": torch.ones(0, D)}, ValueError, r"head.weight: expected shape \(V, D\) with V > 0"),
    "cold": ({"temperature": 1e-39}, ValueError, "temperature: expected logit_scale.* and 1e-39"),
    "sparse": ({"hidden": torch.ones(T, D).to_sparse()}, TypeError, "hidden: expected a dense tensor, got"),
    "epsilon": ({"epsilon_low": -0.1}, ValueError, "epsilon_low: expected a finite number >= 0"),
    "dual clip": ({"dual_clip": 1.0}, ValueError, "dual_clip: expected None or a number > 1"),
    "temperature": ({"temperature": 0.0}, ValueError, "temperature: expected a finite number > 0"),
    "reduction": ({"reduction": "batchmean"}, ValueError, "reduction: expected one of"),
    "weights": ({"token_weights": ONES * torch.nan}, ValueError, "token_weights: expected finite numbers, got 12"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_errors_name_the_argument(case):
    changes, kind, message = REFUSED[case]
    call = {"hidden": torch.ones(T, D), "head": torch.ones(V, D), "target_ids": torch.arange(T), "advantages": ONES}
    with pytest.raises(kind, match=f"^{message}"):
        fused_token_loss(**call | changes)


@pytest.mark.parametrize(
    ("weights", "kind", "message"),
    [
        ([1.0] * T, TypeError, "expected a torch.Tensor or None, got list"),
        (ONES * torch.nan, ValueError, "expected finite numbers, got 12"),
        (torch.ones(T, 1), ValueError, r"expected shape \(12,\), got \(12, 1\)"),
        (torch.ones(T, requires_grad=True), ValueError, "expected a tensor without gradient"),
    ],
)
def test_weights_of_log_probs_are_checked_as_those_of_a_loss(weights, kind, message):
    call = {"hidden": torch.ones(T, D), "head": torch.ones(V, D), "target_ids": torch.arange(T)}
    for function, more in ((fused_token_logps, {}), (fused_token_loss, {"advantages": ONES})):
        with pytest.raises(kind, match=f"^token_weights: {message}"):
            function(**call, **more, token_weights=weights)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["hidden", *TERMS["both"]])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_a_strange_token_takes_no_gradient_from_the_others(dtype, name, bad):
    ids, options = given("both", reduction="sum", dual_clip=3.0)
    weights, others = options["token_weights"], torch.arange(T) != 5

    def gradients(poison):
        tensors = [t.detach() for t in operands(dtype)]
        held = options | {key: options[key].clone() for key in TERMS["both"]}
        (held | {"hidden": tensors[0]})[name][5] = poison
        return run(fused_token_loss, tensors, ids, **held)[1:]

    want, found = gradients(0.1), gradients(bad)
    torch.testing.assert_close(found[0][others], want[0][others])
    if bad != bad or name == "hidden":  # an infinite log-prob may be bounded by a clip
        assert all(g.isnan().all() for g in (found[0][5], *found[1:]))
    weights[5] = 0.0
    for got, like in zip(gradients(bad), gradients(0.1), strict=True):
        assert torch.equal(got, like)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("rise", [-20.0, 5.0, 20.0])
def test_a_large_slope_takes_no_gradient_from_the_others(rise, dtype):
    """A token of negative advantage whose ratio is e^rise: nothing clips it."""
    ids, tensors = torch.arange(T) * 7 % V, [t.detach() for t in operands(dtype)]
    logps = fused_token_logps(tensors[0], Head(*tensors[1:]), ids)
    at = torch.arange(T) == 5
    advantages = torch.where(at, -1e-4, 1.0)
    _, want, _, _ = run(fused_token_loss, tensors, ids, advantages=advantages, old_logps=logps)
    options = {"advantages": advantages, "old_logps": logps - rise * at}
    found = run(fused_token_loss, tensors, ids, **options)
    torch.testing.assert_close(found[1][~at], want[~at], rtol=0.0, atol=0.0)
    exact = run(reference.token_loss, [t.double() for t in tensors], ids, **options)
    for name, got, truth in zip("hwb", found[1:], exact[1:], strict=True):
        error = ((got.double() - truth).abs().sum() / truth.abs().sum()).item()
        assert error < {F32: 1e-5, BF16: 1e-2, F16: 1e-3}[dtype], f"{name}: {error:.1e}"
