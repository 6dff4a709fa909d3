"""fused_hsd_kl against the eager reference in fp64 on the same rounded inputs: losses, gradients, statistics."""

import pytest
import torch
from kernel_cases import DTYPES, TRAINED, Case, D, T, V, check, wide

from hsd_kernels import Divergence, fused_hsd_kl, reference
from hsd_kernels.divergence import DIVERGENCES
from hsd_kernels.testing import assert_within_budget

OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"form": {"softcap": 2.0}},
    "logit_scale": {"form": {"logit_scale": 0.25}},
    "negative logit_scale": {"form": {"logit_scale": -0.5}},
    "cold": {"divergence": {"temperature": 0.1}},
    "hot": {"divergence": {"temperature": 10.0}},
    "clip": {"divergence": {"clip": 0.02}},
    "non-negative clip": {"divergence": {"clip": 0.02, "clip_form": "nonnegative"}},
    "reference": {"reference_dim": D, "reference_coef": 0.3},
    "reference with its own head": {
        "reference_dim": 20,
        "reference_coef": 2.0,
        "divergence": {"temperature": 0.7},
    },
    "weights": {"token_weights": True},
    "num_items": {"num_items": 37.0},
    "own head": {"teacher_dim": D},
    "larger teacher": {"teacher_dim": 24, "teacher_bias": True},
    "floor": {"divergence": {"floor": 0.6}},
    "top_k": {"divergence": {"top_k": 5}},
    "renormalised": {"divergence": {"top_k": 5, "top_of": "teacher", "rest": "renormalise", "temperature": 0.7}},
    "top_k and everything": {
        "bias": True,
        "teacher_dim": 10,
        "teacher_bias": True,
        "form": {"softcap": 3.0, "logit_scale": -1.5},
        "divergence": {"top_k": 4, "floor": 0.3, "clip": 0.05},
        "reference_dim": 10,
        "reference_coef": 0.5,
        "token_weights": True,
    },
    "everything": {
        "bias": True,
        "teacher_dim": 10,
        "teacher_bias": True,
        "form": {"softcap": 3.0, "logit_scale": 1.5},
        "divergence": {"temperature": 0.7, "clip": 0.05},
        "reference_dim": 10,
        "reference_coef": 0.5,
        "token_weights": True,
        "num_items": 5,
    },
}


def case_of(name, dtype, kind="forward_kl", seed=0, **changes):
    given = dict(changes) | OPTIONS[name]
    divergence = {"beta": 0.3} | given.pop("divergence", {})
    return Case.make(dtype, kind, seed, divergence=divergence, **given)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_and_gradients(dtype, divergence, reduction):
    for beta in (0.0, 0.1, 0.5, 1.0) if divergence == "jsd" else (0.5,):
        case = Case.make(dtype, divergence, bias=True, token_weights=True, divergence={"beta": beta})
        upstream = torch.linspace(-2.0, 3.0, T) if reduction == "none" else torch.tensor(0.7)
        check(case, dtype, reduction=reduction, upstream=upstream)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options(dtype, divergence, name):
    case = case_of(name, dtype, divergence, seed=1)
    check(case, dtype)
    check(case, dtype, reduction="none", upstream=torch.linspace(-1.0, 2.0, T))


@pytest.mark.parametrize("name", ["plain", "bias", "softcap", "cold", "larger teacher", "everything"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_against_log_softmax(dtype, name):
    case = case_of(name, dtype, seed=2)
    case.options["target_ids"] = torch.arange(T) * 7 % V
    live = case.options.get("token_weights", torch.ones(T)) != 0
    out = case.call(fused_hsd_kl, return_stats=True)

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
        found["kl"] = (terms if case.divergence.clip is None else terms.clamp_max(case.divergence.clip)).sum(-1)
        return found

    exact, eager = statistics(torch.float64), statistics(wide(dtype))
    for key, value in exact.items():
        got = getattr(out.stats, key)
        assert (got[~live] == 0).all(), f"{key} of a dropped token"
        scale = case.noise * (1.0 + value.abs().max().item())
        assert_within_budget(key, got[live], eager[key][live], value[live], scale)
    assert out.loss == case.call(fused_hsd_kl)


def test_mean_counts_the_live_tokens_or_num_items():
    case = Case.make(torch.float64, token_weights=True)
    live = int((case.options["token_weights"] != 0).sum())
    total = case.call(fused_hsd_kl, reduction="sum")
    torch.testing.assert_close(case.call(fused_hsd_kl), total / live)
    torch.testing.assert_close(case.call(fused_hsd_kl, num_items=100), total / 100)
    per_token = case.call(fused_hsd_kl, reduction="none")
    torch.testing.assert_close(per_token.sum(), total)
    assert (per_token[case.options["token_weights"] == 0] == 0).all()
    for reduction in ("sum", "none"):
        got = case.call(fused_hsd_kl, reduction=reduction, num_items=100)
        assert torch.equal(got, total if reduction == "sum" else per_token)


@pytest.mark.parametrize("weights", [torch.bool, torch.int64, torch.float64, torch.bfloat16], ids=str)
def test_token_weights_of_any_real_dtype(weights):
    case = Case.make(torch.float32)
    w = torch.tensor([0, 1, 1] * (T // 3))
    kept = w.bool()
    got = case.call(fused_hsd_kl, token_weights=w.to(weights))
    cut = {k: v[kept] if k.endswith("hidden") else v for k, v in case.tensors.items()}
    torch.testing.assert_close(got, case.call(fused_hsd_kl, cut))


def test_leading_dimensions_are_only_a_view():
    case = Case.make(torch.float32, token_weights=True)
    ids = torch.arange(T) % V
    flat = case.call(fused_hsd_kl, target_ids=ids, reduction="none", return_stats=True)
    shaped = {k: v.view(3, 4, -1) if k.endswith("hidden") else v for k, v in case.tensors.items()}
    options = {"token_weights": case.options["token_weights"].view(3, 4), "target_ids": ids.view(3, 4)}
    got = case.call(fused_hsd_kl, shaped, **options, reduction="none", return_stats=True)
    assert torch.equal(flat.loss.view(3, 4), got.loss)
    for a, b in zip(flat.stats, got.stats, strict=True):
        assert torch.equal(a.view(3, 4), b)


def test_divergences_are_what_their_names_say():
    """Two outcomes, by hand: p = (0.8, 0.2) of the teacher, q = (0.5, 0.5) of the student."""
    p, q = torch.tensor([0.8, 0.2]).double(), torch.tensor([0.5, 0.5]).double()
    hidden, weight = [x.log()[None] for x in (q, p)], torch.eye(2).double()

    def kl(a, b):
        return (a * (a / b).log()).sum()

    torch.testing.assert_close(fused_hsd_kl(*hidden, weight), kl(p, q))
    torch.testing.assert_close(fused_hsd_kl(*hidden, weight, divergence="reverse_kl"), kl(q, p))
    m = 0.7 * q + 0.3 * p
    got = fused_hsd_kl(*hidden, weight, divergence=Divergence("jsd", beta=0.3))
    torch.testing.assert_close(got, 0.3 * kl(p, m) + 0.7 * kl(q, m))
    clipped = (p * (p / q).log()).clamp_max(0.1).sum()
    assert clipped < 0
    torch.testing.assert_close(fused_hsd_kl(*hidden, weight, divergence=Divergence(clip=0.1)), clipped)


GRADCHECKED = ["plain", "softcap", "clip", "weights", "larger teacher", "top_k", "renormalised", "everything"]


@pytest.mark.parametrize("name", GRADCHECKED)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("loss_fn", [reference.hsd_kl, fused_hsd_kl], ids=["reference", "fused"])
def test_gradcheck(loss_fn, divergence, name):
    # The teacher needs a head of its own here: finite differences of a shared one would move the teacher too.
    case = case_of(name, torch.float64, divergence, seed=3, teacher_dim=D)
    case.tensors.setdefault("bias", torch.randn(V, dtype=torch.float64))
    cut = {k: v[:3] if k.endswith("hidden") else v[:7] for k, v in case.tensors.items()}
    if "token_weights" in case.options:
        case.options["token_weights"] = torch.tensor([0.5, 0.0, -2.0], dtype=torch.float64)
    trained = [cut.pop(n).clone().requires_grad_() for n in TRAINED]

    def loss(reduction, *inputs):
        return case.call(loss_fn, cut | dict(zip(TRAINED, inputs, strict=True)), reduction=reduction)

    for reduction in ("mean", "none"):
        assert torch.autograd.gradcheck(lambda *x, r=reduction: loss(r, *x), trained)


@pytest.mark.parametrize("loss_fn", [reference.hsd_kl, fused_hsd_kl], ids=["reference", "fused"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_shared_head_has_the_gradient_of_a_frozen_copy_for_the_teacher(divergence, loss_fn):
    """The link between gradcheck, which needs the copy, and the shared head."""
    case = Case.make(torch.float64, divergence, bias=True)
    copied = Case(dict(case.tensors), case.divergence)
    copied.tensors |= {"teacher_weight": case.tensors["weight"], "teacher_bias": case.tensors["bias"]}
    shared, own = case.run(loss_fn), copied.run(loss_fn)
    torch.testing.assert_close(shared[0], own[0])
    for name in TRAINED:
        torch.testing.assert_close(shared[1][name], own[1][name])
