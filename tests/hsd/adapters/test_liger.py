"""The Liger names against liger-kernel itself, its Triton kernel in Triton's interpreter, and its documentation."""

import inspect
import os

import pytest
import torch

from hsd.adapters.liger import LigerFusedLinearJSD, LigerFusedLinearJSDLoss, liger_fused_linear_jsd

N, D, E, V = 13, 8, 6, 37
IGNORE = -100


@pytest.fixture
def case():
    def make(bias=False, shared=False, dtype=torch.float32):
        g = torch.Generator().manual_seed(0)

        def randn(*shape, grad=False):
            return torch.randn(*shape, generator=g).to(dtype).requires_grad_(grad)

        student, weight = randn(N, D, grad=True), randn(V, D, grad=True)
        teacher, teacher_weight = (randn(N, D), weight) if shared else (randn(N, E), randn(V, E))
        labels = torch.randint(V, (N,), generator=g)
        labels[::3] = IGNORE
        biases = (randn(V, grad=True), randn(V)) if bias else ()
        return student, weight, teacher, teacher_weight, labels, *biases

    return make


def run(function, args):
    """(outputs, gradients of the tensors that want one)"""
    leaves = [a.detach().clone().requires_grad_(a.requires_grad) if a.is_floating_point() else a for a in args]
    if args[3] is args[1]:
        leaves[3] = leaves[1].detach()
    out = function(*leaves)
    (out[0] if isinstance(out, tuple) else out).backward()
    return out, [a.grad for a in leaves if a.requires_grad]


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("hard", [0.0, 0.5])
@pytest.mark.parametrize("bias", [False, True])
def test_chunked_loss_is_ligers(beta, hard, bias, case):
    theirs = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    options = {
        "weight_hard_loss": hard,
        "weight_soft_loss": 0.7,
        "beta": beta,
        "temperature": 1.7,
        "chunk_size": 4,
        "return_soft_hard_loss": True,
    }
    args = case(bias=bias)
    expected, expected_grads = run(theirs.LigerFusedLinearJSDLoss(compiled=False, **options), args)
    found, grads = run(LigerFusedLinearJSDLoss(**options), args)
    for a, b in zip(found, expected, strict=True):
        same(a, b)
    for a, b in zip(grads, expected_grads, strict=True):
        same(a, b)


def test_the_default_has_half_a_cross_entropy(case):
    """Liger's default, kept and said: 0.5 CE + 0.5 JSD."""
    theirs = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    args = case()
    found, _ = run(LigerFusedLinearJSDLoss(), args)
    same(found, run(theirs.LigerFusedLinearJSDLoss(compiled=False), args)[0])
    soft, _ = run(LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0), args)
    student, weight, *_, labels = args
    hard = torch.nn.functional.cross_entropy(student @ weight.T, labels, ignore_index=IGNORE)
    same(found, 0.5 * hard + 0.5 * soft)


def test_signatures_of_the_chunked_module():
    theirs = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    for method in ("__init__", "forward"):
        ours = inspect.signature(getattr(LigerFusedLinearJSDLoss, method)).parameters
        expected = inspect.signature(getattr(theirs.LigerFusedLinearJSDLoss, method)).parameters
        assert {n: p.default for n, p in ours.items()} == {n: p.default for n, p in expected.items()}


def test_signatures_of_the_triton_module_and_function():
    transformers = pytest.importorskip("liger_kernel.transformers", reason="liger-kernel is not installed")
    from liger_kernel.transformers import functional

    pairs = [
        (LigerFusedLinearJSD.__init__, transformers.LigerFusedLinearJSD.__init__),
        (LigerFusedLinearJSD.forward, transformers.LigerFusedLinearJSD.forward),
        (liger_fused_linear_jsd, functional.liger_fused_linear_jsd),
    ]
    for ours, theirs in pairs:
        a, b = (inspect.signature(f).parameters for f in (ours, theirs))
        assert [(n, p.default) for n, p in a.items()] == [(n, p.default) for n, p in b.items()]


def documented(student, weight, teacher, teacher_weight, labels, beta, temperature):
    """Liger's formula: beta KL(P || M) + (1 - beta) KL(Q || M), M = beta P + (1 - beta) Q, P teacher, Q student;
    beta 0 and 1 are KL(P || Q) and KL(Q || P); the mean is over the labels that are not ignored."""
    log_q = (student @ weight.T / temperature).log_softmax(-1)
    log_p = (teacher @ teacher_weight.T / temperature).log_softmax(-1).detach()
    p, q = log_p.exp(), log_q.exp()
    if beta == 0:
        terms = p * (log_p - log_q)
    elif beta == 1:
        terms = q * (log_q - log_p)
    else:
        log_m = (beta * p + (1 - beta) * q).log()
        terms = beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)
    rows = terms.sum(-1)
    return rows.mean() if labels is None else rows[labels != IGNORE].sum() / (labels != IGNORE).sum()


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_triton_jsds_documented_semantics(beta, labelled, shared, case):
    *tensors, labels = case(shared=shared)
    labels = labels if labelled else None
    expected, expected_grads = run(lambda *t: documented(*t, labels, beta, 2.0), tensors)
    module = LigerFusedLinearJSD(jsd_beta=beta, temperature=2.0)
    for form in (
        lambda *t: module(*t, labels),
        lambda *t: liger_fused_linear_jsd(*t, labels, beta, IGNORE, 2.0),
    ):
        found, grads = run(form, tensors)
        same(found, expected)
        for a, b in zip(grads, expected_grads, strict=True):
            same(a, b)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Liger's kernel is compared in the interpreter")
@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("labelled", [True, False])
def test_triton_jsd_is_ligers(beta, labelled, case):
    functional = pytest.importorskip("liger_kernel.transformers.functional", reason="liger-kernel is not installed")
    *tensors, labels = case()
    rest = (labels if labelled else None, beta, IGNORE, 1.7)
    expected, expected_grads = run(lambda *t: functional.liger_fused_linear_jsd(*t, *rest), tensors)
    found, grads = run(lambda *t: liger_fused_linear_jsd(*t, *rest), tensors)
    same(found, expected)
    for a, b in zip(grads, expected_grads, strict=True):
        same(a, b)


def test_the_direction_of_beta(case):
    """A teacher certain of one token: KL(teacher || student) is finite, KL(student || teacher) is huge."""
    weight = torch.eye(4)
    teacher, student = 200.0 * torch.eye(4)[:1], torch.zeros(1, 4)
    forward = liger_fused_linear_jsd(student, weight, teacher, weight, jsd_beta=0.0)
    reverse = liger_fused_linear_jsd(student, weight, teacher, weight, jsd_beta=1.0)
    same(forward, torch.tensor(4.0).log())
    assert reverse > 100


def test_nothing_to_learn_is_0(case):
    *tensors, labels = case()
    for loss in (LigerFusedLinearJSD(), LigerFusedLinearJSDLoss()):
        found, grads = run(lambda *t, loss=loss: loss(*t, torch.full_like(labels, IGNORE)), tensors)
        assert found == 0.0 and not any(g.any() for g in grads)


def test_what_it_refuses(case):
    *tensors, _ = case()
    with pytest.raises(ValueError, match=r"^accum_dtype: expected None or torch.float32, got torch.bfloat16"):
        LigerFusedLinearJSD(accum_dtype=torch.bfloat16)(*tensors, None)
    with pytest.raises(ValueError, match=r"^divergence.temperature"):
        LigerFusedLinearJSD(temperature=0)
    with pytest.raises(ValueError, match=r"^teacher_head.weight: expected shape \(37"):
        liger_fused_linear_jsd(*tensors[:3], torch.randn(V + 3, E))
