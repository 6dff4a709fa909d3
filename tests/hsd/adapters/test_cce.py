"""linear_divergence against full logits, with CCE's shift and ignore_index."""

import pytest
import torch

from hsd.adapters.cce import linear_divergence
from hsd_kernels import Divergence

B, T, D, V = 2, 6, 8, 29


@pytest.fixture
def tensors():
    g = torch.Generator().manual_seed(0)
    e, teacher, c = (torch.randn(*s, generator=g) for s in ((B, T, D), (B, T, D), (V, D)))
    targets = torch.randint(V, (B, T), generator=g)
    targets[0, :3] = -100
    return e.requires_grad_(), c.requires_grad_(), teacher, targets


def per_token(e, c, teacher, bias, softcap):
    def log_probs(h):
        x = h @ c.T + bias
        return (softcap * torch.tanh(x / softcap)).log_softmax(-1)

    ls, lt = log_probs(e), log_probs(teacher).detach()
    return (lt.exp() * (lt - ls)).sum(-1)


@pytest.mark.parametrize("shift", [0, 1, True, 2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_shift_ignore_index_and_softcap(shift, reduction, tensors):
    e, c, teacher, targets = tensors
    bias = torch.randn(V, generator=torch.Generator().manual_seed(1))
    counted = targets[:, int(shift) :] != -100
    rows = per_token(e, c, teacher, bias, 3.0)[:, : T - int(shift)] * counted
    expected = {"mean": rows.sum() / counted.sum(), "sum": rows.sum(), "none": rows}[reduction]
    found = linear_divergence(e, c, teacher, targets, bias, softcap=3.0, reduction=reduction, shift=shift)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(*(torch.autograd.grad(x.sum(), (e, c)) for x in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_options_of_the_kernel_pass_through(tensors):
    e, c, teacher, _ = tensors
    same = linear_divergence(e, c, teacher, divergence=Divergence("jsd", beta=0.0))
    torch.testing.assert_close(same, linear_divergence(e, c, teacher))
    assert linear_divergence(e, c, teacher, divergence="reverse_kl") != same


def test_what_it_refuses(tensors):
    e, c, teacher, targets = tensors
    with pytest.raises(ValueError, match=r"^targets: expected shape \(2, 6\), got \(2, 5\)"):
        linear_divergence(e, c, teacher, targets[:, 1:])
    with pytest.raises(ValueError, match=r"^shift: expected .* got 6"):
        linear_divergence(e, c, teacher, targets, shift=6)
