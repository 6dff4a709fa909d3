"""The module form: same results and options as the function, under torch.compile, and on two gloo ranks."""

import inspect

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hsd_kernels import Divergence, Head, fused_hsd_kl
from hsd_kernels.module import FusedHSDKL

B, T, D, V = 4, 5, 8, 31


class Student(nn.Module):
    """A body, and the head inside the loss. ``tied`` as in small language models."""

    def __init__(self, tied=False):
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(2))
        head = nn.Linear(D, V, bias=not tied)
        if tied:
            head.weight = self.embed.weight
        self.criterion = FusedHSDKL(head, divergence=Divergence("jsd", beta=0.3, temperature=0.7))

    def hidden(self, ids):
        h = self.embed(ids)
        for layer in self.layers:
            h = h + torch.tanh(layer(h))
        return h

    def forward(self, student_ids, teacher_ids, mask):
        with torch.no_grad():
            teacher = self.hidden(teacher_ids)
        return self.criterion(self.hidden(student_ids), teacher, token_weights=mask)


def make(tied=False):
    torch.manual_seed(0)
    return Student(tied)


def batch():
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(V, (2, B, T), generator=g)
    mask = torch.ones(B, T)
    mask[:, -1] = 0  # as many tokens on every rank: the mean over ranks is then the mean over the whole batch
    return ids[0], ids[1], mask


def tensors():
    g = torch.Generator().manual_seed(2)
    return torch.randn(6, D, generator=g), torch.randn(6, D, generator=g)


def test_options_are_those_of_the_function():
    """None forgotten, none with another default."""
    tensor = {"student_hidden", "teacher_hidden", "head"}
    functions = (fused_hsd_kl, Head)  # of a Head its scale and cap
    signatures = [inspect.signature(f).parameters.items() for f in functions]
    function = {n: p.default for s in signatures for n, p in s if n not in {*tensor, "weight", "bias"}}
    found = {}
    for method in (FusedHSDKL.__init__, FusedHSDKL.forward):
        parameters = inspect.signature(method).parameters
        found |= {n: p.default for n, p in parameters.items() if n not in {*tensor, "self"}}
    assert found == function


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", [{}, {"divergence": "reverse_kl", "reduction": "none"}])
def test_equals_the_function(bias, options):
    torch.manual_seed(0)
    head = nn.Linear(D, V, bias=bias)
    student, teacher = tensors()
    student.requires_grad_()
    weights = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.5, 1.0])
    form, options = {"logit_scale": 0.5, "softcap": 2.0}, options | {"return_stats": True}
    ours = FusedHSDKL(head, **form, **options)(student, teacher, token_weights=weights)
    want = fused_hsd_kl(student, teacher, Head(head.weight, head.bias, **form), token_weights=weights, **options)
    assert torch.equal(ours.loss, want.loss)
    for a, b in zip(ours.stats, want.stats, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    inputs = [student, *head.parameters()]
    for a, b in zip(*(torch.autograd.grad(x.loss.sum(), inputs) for x in (ours, want)), strict=True):
        assert torch.equal(a, b)


def test_the_head_is_the_models_own():
    model = make(tied=True)
    assert model.criterion.head.weight is model.embed.weight
    assert [n for n, _ in model.named_parameters()].count("embed.weight") == 1
    assert "criterion.head.weight" in model.state_dict()
    with pytest.raises(TypeError, match=r"^head: expected an nn.Linear, got Embedding"):
        FusedHSDKL(model.embed)
    assert "divergence=Divergence(kind='jsd', beta=0.3, temperature=0.7" in repr(model) and "reduction" not in repr(
        model
    )


def gradients(model, *inputs):
    model.zero_grad()
    loss = model(*inputs)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("tied", [False, True])
def test_fullgraph_compile(tied):
    model = make(tied)
    want, want_grads = gradients(model, *batch())
    want_grads = {n: g.clone() for n, g in want_grads.items()}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss, grads = gradients(compiled, *batch())
    torch.testing.assert_close(loss, want)
    for (name, g), w in zip(grads.items(), want_grads.values(), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-7, msg=name)


def sharded(model, own_group):
    """FSDP2: every layer, the criterion by itself or with the root, the root."""
    for layer in model.layers:
        fully_shard(layer)
    if own_group:
        fully_shard(model.criterion)
    return fully_shard(model)


WRAPPERS = {
    "ddp": (False, DistributedDataParallel),
    "ddp tied": (True, DistributedDataParallel),
    "fsdp2, head in the root": (False, lambda m: sharded(m, own_group=False)),
    "fsdp2 tied, head in the root": (True, lambda m: sharded(m, own_group=False)),
    "fsdp2, head by itself": (False, lambda m: sharded(m, own_group=True)),
}


def worker(rank, world):
    rows = slice(rank * B // world, (rank + 1) * B // world)
    for label, (tied, wrap) in WRAPPERS.items():
        want, want_grads = gradients(make(tied), *batch())
        loss, grads = gradients(wrap(make(tied)), *(t[rows] for t in batch()))
        dist.all_reduce(loss)
        torch.testing.assert_close(loss / world, want, rtol=1e-5, atol=1e-6, msg=label)
        grads = {n.removeprefix("module."): g for n, g in grads.items()}
        for name, w in want_grads.items():
            g = grads[name]
            g = g.full_tensor() if hasattr(g, "full_tensor") else g
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-6, msg=f"{label} {name} rank {rank}")


def test_gradients_of_two_ranks_are_those_of_one_process():
    run_ranks(worker, 2)
