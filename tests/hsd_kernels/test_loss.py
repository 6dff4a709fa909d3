"""fused_hsd_kl against the eager reference in fp64 on the same rounded inputs: losses, gradients, statistics."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from hsd_kernels import fused_hsd_kl, reference
from hsd_kernels.divergence import DIVERGENCES
from hsd_kernels.testing import assert_within_budget

T, D, V = 12, 16, 61
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
RELATIVE_L1 = {torch.float64: 1e-13, torch.float32: 3e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}
TRAINED = ("student_hidden", "lm_head_weight", "bias")

OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 2.0},
    "logit_scale": {"logit_scale": 0.25},
    "negative logit_scale": {"logit_scale": -0.5},
    "cold": {"temperature": 0.1},
    "hot": {"temperature": 10.0},
    "clip": {"kl_clip": 0.02},
    "non-negative clip": {"kl_clip": 0.02, "kl_clip_form": "nonnegative"},
    "reference": {"reference_dim": D, "reference_coef": 0.3},
    "reference with its own head": {"reference_dim": 20, "reference_coef": 2.0, "temperature": 0.7},
    "weights": {"token_weights": True},
    "num_items": {"num_items": 37.0},
    "own head": {"teacher_dim": D},
    "larger teacher": {"teacher_dim": 24, "teacher_bias": True},
    "everything": {
        "bias": True,
        "teacher_dim": 10,
        "teacher_bias": True,
        "softcap": 3.0,
        "logit_scale": 1.5,
        "temperature": 0.7,
        "kl_clip": 0.05,
        "reference_dim": 10,
        "reference_coef": 0.5,
        "token_weights": True,
        "num_items": 5,
    },
}


@dataclass
class Case:
    """Inputs in ``dtype`` and the options of one call."""

    tensors: dict[str, Tensor]
    options: dict = field(default_factory=dict)

    @classmethod
    def make(
        cls,
        dtype,
        seed=0,
        bias=False,
        teacher_dim=None,
        teacher_bias=False,
        reference_dim=None,
        token_weights=False,
        **options,
    ):
        g = torch.Generator().manual_seed(seed)

        def draw(*shape, scale=1.0):
            return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype)

        tensors = {
            "student_hidden": draw(T, D),
            "teacher_hidden": draw(T, teacher_dim or D),
            "lm_head_weight": draw(V, D, scale=0.5),
        }
        if teacher_dim is not None:
            tensors["teacher_weight"] = draw(V, teacher_dim, scale=0.5)
        if reference_dim is not None:
            tensors["reference_hidden"] = draw(T, reference_dim)
            if reference_dim != D:
                tensors["reference_weight"] = draw(V, reference_dim, scale=0.5)
        if bias:
            tensors["bias"] = draw(V)
        if teacher_bias:
            tensors["teacher_bias"] = draw(V)
        if token_weights:
            w = draw(T)
            w[::3] = 0.0
            options["token_weights"] = w
        return cls(tensors, options)

    def run(self, loss_fn, dtype=None, upstream=None, **options):
        """(loss, gradients by name); ``upstream`` is the gradient for a per-token loss."""
        given = {k: v.to(dtype or v.dtype) for k, v in self.tensors.items()}
        given = {k: v.detach().clone().requires_grad_(k in TRAINED) for k, v in given.items()}
        merged = self.options | options
        if dtype is not None and "token_weights" in merged:
            merged["token_weights"] = merged["token_weights"].to(dtype)
        loss = loss_fn(**given, **merged)
        loss.backward(None if upstream is None else upstream.to(loss.dtype))
        return loss.detach(), {k: v.grad for k, v in given.items() if v.grad is not None}

    def logits(self, dtype, side):
        head = "teacher_weight" if side == "teacher" and "teacher_weight" in self.tensors else "lm_head_weight"
        bias = "bias" if head == "lm_head_weight" else "teacher_bias"
        x = self.tensors[f"{side}_hidden"].to(dtype) @ self.tensors[head].to(dtype).T
        x = x + self.tensors[bias].to(dtype) if bias in self.tensors else x
        x = x * self.options.get("logit_scale", 1.0)
        cap = self.options.get("softcap")
        x = x if cap is None else cap * torch.tanh(x / cap)
        return x / self.options.get("temperature", 1.0)

    @property
    def noise(self):
        """How many roundings at size 1 a log-prob may carry: one of each side's logit, and one of its
        log-sum-exp, which shifts a whole row and so does not average out as the errors of single logits do."""
        return 2.0 * (1.0 + max(self.logits(torch.float64, s).abs().max().item() for s in ("student", "teacher")))


def largest(t):
    return 1.0 if t is None else t.abs().max().item()


def relative_l1(t, exact):
    return ((t.double() - exact).abs().sum() / exact.abs().sum()).item()


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def eager_of(case, dtype, exact, **kwargs):
    """The eager computation at the precision promised: fp32 arithmetic on the rounded inputs. For fp64 the same error
    scaled down by the ratio of the precisions, because no better truth is at hand."""
    loss, grads = case.run(reference.hsd_kl, torch.float32, **kwargs)
    if dtype == torch.float64:
        shrink = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        loss = exact[0] + (loss.double() - exact[0]) * shrink
        grads = {k: exact[1][k] + (g.double() - exact[1][k]) * shrink for k, g in grads.items()}
    return loss, grads


def check(case, dtype, **kwargs):
    exact = case.run(reference.hsd_kl, torch.float64, **kwargs)
    eager = eager_of(case, dtype, exact, **kwargs)
    loss, grads = case.run(fused_hsd_kl, impl="torch", **kwargs)
    assert loss.dtype == wide(dtype)
    per_token = case.run(reference.hsd_kl, torch.float64, reduction="none", upstream=torch.ones(T))[0]
    noise = case.noise * (1.0 + per_token.abs().max().item())  # of a probability, times the log-ratio it weights
    terms = T if kwargs.get("reduction") == "sum" else 1
    assert_within_budget("loss", loss, eager[0], exact[0], scale=noise * terms)
    assert grads.keys() == exact[1].keys()
    token_weight = largest(case.options.get("token_weights", torch.ones(1))) * largest(kwargs.get("upstream"))
    token_weight *= 1.0 if kwargs.get("reduction", "mean") != "mean" else 1.0 / case.options.get("num_items", T)
    for name, grad in grads.items():
        assert grad.dtype == dtype
        # Logit noise reaches dz as it reaches the loss, and then a GEMM with the other factor of the logits.
        sharpness = abs(case.options.get("logit_scale", 1.0)) / case.options.get("temperature", 1.0)
        other = {"student_hidden": case.tensors["lm_head_weight"], "lm_head_weight": case.tensors["student_hidden"]}
        factor = sharpness * largest(other.get(name, torch.ones(1)))
        magnitude = noise * factor * torch.finfo(wide(dtype)).eps / torch.finfo(dtype).eps
        magnitude = magnitude * token_weight + largest(exact[1][name])
        assert_within_budget(name, grad, eager[1][name], exact[1][name], scale=magnitude)
        # Where the rows are saturated the whole gradient is rounding, eager or not.
        ours, theirs = relative_l1(grad, exact[1][name]), relative_l1(eager[1][name].to(dtype), exact[1][name])
        assert ours <= max(RELATIVE_L1[dtype], 2.0 * theirs), f"{name}: relative L1 {ours:.1e}, eager {theirs:.1e}"


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_and_gradients(dtype, divergence, reduction):
    for beta in (0.0, 0.1, 0.5, 1.0) if divergence == "jsd" else (0.5,):
        case = Case.make(dtype, bias=True, token_weights=True, divergence=divergence, beta=beta)
        upstream = torch.linspace(-2.0, 3.0, T) if reduction == "none" else torch.tensor(0.7)
        check(case, dtype, reduction=reduction, upstream=upstream)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options(dtype, divergence, name):
    case = Case.make(dtype, seed=1, divergence=divergence, beta=0.3, **OPTIONS[name])
    check(case, dtype)
    check(case, dtype, reduction="none", upstream=torch.linspace(-1.0, 2.0, T))


@pytest.mark.parametrize("name", ["plain", "bias", "softcap", "cold", "larger teacher", "everything"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_against_log_softmax(dtype, name):
    case = Case.make(dtype, seed=2, **OPTIONS[name])
    case.options["target_ids"] = torch.arange(T) * 7 % V
    live = case.options.get("token_weights", torch.ones(T)) != 0
    out = fused_hsd_kl(**case.tensors, **case.options, return_stats=True)

    def statistics(compute):
        found = {}
        for side in ("student", "teacher"):
            logits = case.logits(compute, side)
            logps = torch.nn.functional.log_softmax(logits, -1)
            found[f"{side}_logps"] = logps[torch.arange(T), case.options["target_ids"]]
            found[f"{side}_entropy"] = torch.distributions.Categorical(logits=logits, validate_args=False).entropy()
            found[f"{side}_lse"] = logits.exp().sum(-1).log()
        values = torch.nn.functional.log_softmax(case.logits(compute, "student"), -1)
        target = torch.nn.functional.log_softmax(case.logits(compute, "teacher"), -1)
        terms = torch.nn.functional.kl_div(values, target, log_target=True, reduction="none")
        found["per_token_kl"] = terms.clamp_max(case.options.get("kl_clip", float("inf"))).sum(-1)
        return found

    exact, eager = statistics(torch.float64), statistics(wide(dtype))
    for key, value in exact.items():
        got = getattr(out, key)
        assert (got[~live] == 0).all(), f"{key} of a dropped token"
        scale = case.noise * (1.0 + value.abs().max().item())
        assert_within_budget(key, got[live], eager[key][live], value[live], scale)
    assert out.loss == fused_hsd_kl(**case.tensors, **case.options)


def test_mean_counts_the_live_tokens_or_num_items():
    case = Case.make(torch.float64, token_weights=True)
    live = int((case.options["token_weights"] != 0).sum())
    total = fused_hsd_kl(**case.tensors, **case.options, reduction="sum")
    torch.testing.assert_close(fused_hsd_kl(**case.tensors, **case.options), total / live)
    torch.testing.assert_close(fused_hsd_kl(**case.tensors, **case.options, num_items=100), total / 100)
    per_token = fused_hsd_kl(**case.tensors, **case.options, reduction="none")
    torch.testing.assert_close(per_token.sum(), total)
    assert (per_token[case.options["token_weights"] == 0] == 0).all()
    for reduction in ("sum", "none"):
        got = fused_hsd_kl(**case.tensors, **case.options, reduction=reduction, num_items=100)
        assert torch.equal(got, total if reduction == "sum" else per_token)


@pytest.mark.parametrize("weights", [torch.bool, torch.int64, torch.float64, torch.bfloat16], ids=str)
def test_token_weights_of_any_real_dtype(weights):
    case = Case.make(torch.float32)
    w = torch.tensor([0, 1, 1] * (T // 3))
    kept = w.bool()
    got = fused_hsd_kl(**case.tensors, token_weights=w.to(weights))
    cut = {k: v[kept] if k.endswith("hidden") else v for k, v in case.tensors.items()}
    torch.testing.assert_close(got, fused_hsd_kl(**cut))


def test_leading_dimensions_are_only_a_view():
    case = Case.make(torch.float32, token_weights=True)
    ids = torch.arange(T) % V
    flat = fused_hsd_kl(**case.tensors, **case.options, target_ids=ids, reduction="none", return_stats=True)
    shaped = {k: v.view(3, 4, -1) if k.endswith("hidden") else v for k, v in case.tensors.items()}
    options = {"token_weights": case.options["token_weights"].view(3, 4), "target_ids": ids.view(3, 4)}
    for a, b in zip(flat, fused_hsd_kl(**shaped, **options, reduction="none", return_stats=True), strict=True):
        assert a is b is None or torch.equal(a.view(3, 4), b)


def test_divergences_are_what_their_names_say():
    """Two outcomes, by hand: p = (0.8, 0.2) of the teacher, q = (0.5, 0.5) of the student."""
    p, q = torch.tensor([0.8, 0.2]).double(), torch.tensor([0.5, 0.5]).double()
    hidden, weight = [x.log()[None] for x in (q, p)], torch.eye(2).double()

    def kl(a, b):
        return (a * (a / b).log()).sum()

    torch.testing.assert_close(fused_hsd_kl(*hidden, weight), kl(p, q))
    torch.testing.assert_close(fused_hsd_kl(*hidden, weight, divergence="reverse_kl"), kl(q, p))
    m = 0.7 * q + 0.3 * p
    got = fused_hsd_kl(*hidden, weight, divergence="jsd", beta=0.3)
    torch.testing.assert_close(got, 0.3 * kl(p, m) + 0.7 * kl(q, m))
    clipped = (p * (p / q).log()).clamp_max(0.1).sum()
    assert clipped < 0
    torch.testing.assert_close(fused_hsd_kl(*hidden, weight, kl_clip=0.1), clipped)


@pytest.mark.parametrize("name", ["plain", "softcap", "clip", "weights", "larger teacher", "everything"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("loss_fn", [reference.hsd_kl, fused_hsd_kl], ids=["reference", "fused"])
def test_gradcheck(loss_fn, divergence, name):
    # The teacher needs a head of its own here: finite differences of a shared one would move the teacher too.
    case = Case.make(torch.float64, seed=3, divergence=divergence, beta=0.3, **{"teacher_dim": D} | OPTIONS[name])
    case.tensors.setdefault("bias", torch.randn(V, dtype=torch.float64))
    cut = {k: v[:3] if k.endswith("hidden") else v[:13] for k, v in case.tensors.items()}
    if "token_weights" in case.options:
        case.options["token_weights"] = torch.tensor([0.5, 0.0, -2.0], dtype=torch.float64)
    trained = [cut.pop(n).clone().requires_grad_() for n in TRAINED]

    def loss(reduction, *inputs):
        return loss_fn(**dict(zip(TRAINED, inputs, strict=True)), **cut, **case.options, reduction=reduction)

    for reduction in ("mean", "none"):
        assert torch.autograd.gradcheck(lambda *x, r=reduction: loss(r, *x), trained)


@pytest.mark.parametrize("loss_fn", [reference.hsd_kl, fused_hsd_kl], ids=["reference", "fused"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_shared_head_has_the_gradient_of_a_frozen_copy_for_the_teacher(divergence, loss_fn):
    """The link between gradcheck, which needs the copy, and the shared head."""
    case = Case.make(torch.float64, bias=True, divergence=divergence)
    copied = Case(dict(case.tensors), case.options)
    copied.tensors |= {"teacher_weight": case.tensors["lm_head_weight"], "teacher_bias": case.tensors["bias"]}
    shared, own = case.run(loss_fn), copied.run(loss_fn)
    torch.testing.assert_close(shared[0], own[0])
    for name in TRAINED:
        torch.testing.assert_close(shared[1][name], own[1][name])
