"""Weights in pieces: refused by name, whole inside `gathered`."""

import sys
import types
from contextlib import contextmanager

import pytest
import torch
from ranks import run_ranks

from hsd_kernels import fused_hsd_kl, gathered


class Partitioned(torch.nn.Parameter):
    """As DeepSpeed leaves a ZeRO-3 parameter: an id, and no elements."""


def partitioned(whole):
    p = torch.nn.Parameter(torch.empty(0))
    p.ds_id, p.whole = 3, whole
    return p


def test_a_plain_tensor_passes_through():
    weight = torch.randn(5, 4)
    with gathered(weight) as found:
        assert found is weight


def test_zero3_parameter_is_refused_with_the_way_out():
    h = torch.randn(2, 4)
    with pytest.raises(TypeError, match=r"^head.weight: expected a plain tensor, got a ZeRO-3.*gathered"):
        fused_hsd_kl(h, h, partitioned(torch.randn(5, 4)))


def test_zero3_parameter_is_gathered_by_the_engine(monkeypatch):
    weight = partitioned(torch.randn(5, 4))
    log = []

    @contextmanager
    def GatheredParameters(params):
        log.append("in")
        params[0].data = params[0].whole
        yield
        params[0].data = torch.empty(0)
        log.append("out")

    deepspeed = types.ModuleType("deepspeed")
    zero = types.ModuleType("deepspeed.zero")
    zero.GatheredParameters = GatheredParameters
    monkeypatch.setitem(sys.modules, "deepspeed", deepspeed)
    monkeypatch.setitem(sys.modules, "deepspeed.zero", zero)
    h, t = torch.randn(2, 4, requires_grad=True), torch.randn(2, 4)
    with gathered(weight) as whole:
        loss = fused_hsd_kl(h, t, whole)
        loss.backward()
    assert log == ["in", "out"] and weight.numel() == 0
    assert weight.grad.shape == (5, 4) and weight.grad.abs().sum() > 0


def test_zero3_parameter_without_the_engine(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed.zero", None)
    with pytest.raises(ImportError, match="deepspeed"), gathered(partitioned(torch.randn(5, 4))):
        pass


def two_ranks(rank, world):
    """Each rank has other tokens; the gradient is that of the mean over ranks."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    torch.manual_seed(0)
    whole, h, t = torch.randn(7, 4), torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    weight = torch.nn.Parameter(distribute_tensor(whole, init_device_mesh("cpu", (world,)), [Shard(0)]))
    with gathered(weight) as plain:
        fused_hsd_kl(h[rank], t[rank], plain).backward()
    leaf = whole.clone().requires_grad_()
    fused_hsd_kl(h.flatten(0, 1), t.flatten(0, 1), leaf).backward()
    torch.testing.assert_close(weight.grad.full_tensor(), leaf.grad)


def test_the_gradient_of_a_gathered_dtensor_is_the_mean_over_ranks():
    run_ranks(two_ranks, 2)


def test_dtensor_is_gathered_and_its_gradient_goes_back(tmp_path):
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

    created = not dist.is_initialized()
    if created:
        dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        whole = torch.randn(7, 4)
        weight = torch.nn.Parameter(distribute_tensor(whole, init_device_mesh("cpu", (1,)), [Shard(0)]))
        h, t = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
        with gathered(weight) as plain:
            fused_hsd_kl(h, t, plain).backward()
        leaf = whole.clone().requires_grad_()
        fused_hsd_kl(h, t, leaf).backward()
        assert isinstance(weight.grad, DTensor)
        torch.testing.assert_close(weight.grad.full_tensor(), leaf.grad)
    finally:
        if created:
            dist.destroy_process_group()
