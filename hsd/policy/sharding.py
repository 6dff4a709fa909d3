"""How a rank holds a policy's weights: whole, as DTensors of FSDP2, or as the flat parts of ZeRO-3.

A frozen policy is a twin with the student's partitioning, so an average moves shard by shard without a gather. A
checkpoint holds whole tensors, one gathered at a time, whatever made it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hsd.files import replacing
from hsd.policy.forward import FrozenStates
from hsd.policy.frozen import frozen_copy

WIDE = (torch.float32, torch.float64)
# (module whose forward is called, the model inside it, what runs in place of the model's forward) -> its result
Redirect = Callable[[Any, Any, Callable[[], Any]], Any]


class Whole:
    """Every rank has all weights: one process, DDP, ZeRO-1 and ZeRO-2.

    Args:
        dtype: what DeepSpeed casts the student to, whose fp32 masters are its optimizer's; None keeps the model's.
    """

    # Whether ranks hold parts only: all must take part in a forward pass, in the same order, and in `whole`.
    gathers = False

    def __init__(self, dtype: torch.dtype | None = None):
        self.dtype = dtype

    @property
    def has_masters(self) -> bool:
        """Whether the optimizer holds fp32 weights beside narrower ones of the model."""
        return self.dtype is not None

    def twin(self, policy: Any) -> nn.Module:
        """A frozen copy in eval mode, held as the policy is, or will be once it is wrapped."""
        twin = frozen_copy(policy)
        return twin if self.dtype is None else twin.to(self.dtype)

    def inside(self, twin: nn.Module, forward: Callable[[], list[FrozenStates]]) -> list[FrozenStates]:
        """``forward()`` where the twin's weights are whole; the heads that it returns outlive it."""
        return forward()

    def agree(self, here: bool, device: torch.device) -> bool:
        """Whether ``here`` is true on every rank."""
        if self.gathers:
            everywhere = torch.tensor(int(here), device=device)
            torch.distributed.all_reduce(everywhere, op=torch.distributed.ReduceOp.MIN)
            return bool(everywhere)
        return here

    def shape(self, p: Tensor) -> torch.Size:
        """Of the whole tensor."""
        return p.shape

    def shard(self, p: Tensor) -> Tensor:
        """This rank's elements of ``p``; writing to them writes to ``p``."""
        return p.detach()

    def master(self, p: Tensor) -> Tensor:
        """This rank's elements of a trained parameter, in fp32 where the optimizer has them in fp32."""
        if p.dtype in WIDE or not self.has_masters or not p.requires_grad:
            return p.detach()
        from deepspeed.utils import safe_get_full_fp32_param

        full = safe_get_full_fp32_param(p)
        assert full is not None
        return full

    def write(self, p: Tensor, shard: Tensor) -> None:
        """Replace this rank's elements of ``p``."""
        self.shard(p).copy_(shard)

    def whole(self, p: Tensor, shard: Tensor) -> Tensor:
        """The tensor whose shards are laid out as those of ``p``."""
        return shard

    def part(self, p: Tensor, value: Tensor) -> Tensor:
        """The shard of a whole tensor ``value`` that is laid out as ``p``; no rank talks to another."""
        return value


class Fsdp2(Whole):
    """DTensors, as accelerate's FSDP2 makes them."""

    gathers = True

    def __init__(self, accelerator: Any, redirect: Redirect):
        super().__init__()
        self.accelerator, self.redirect = accelerator, redirect

    def twin(self, policy: Any) -> nn.Module:
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        # From rank 0's weights where cpu_ram_efficient_loading left the other ranks without any.
        return fsdp2_prepare_model(self.accelerator, frozen_copy(policy)).requires_grad_(False).eval()

    def inside(self, twin: nn.Module, forward: Callable[[], list[FrozenStates]]) -> list[FrozenStates]:
        states = self.redirect(twin, twin, lambda: [_with_head_copied(s) for s in forward()])
        reshard(twin)
        return states

    def shard(self, p: Any) -> Tensor:
        return p.detach().to_local() if _is_dtensor(p) else p.detach()

    def master(self, p: Tensor) -> Tensor:
        return self.shard(p)

    def whole(self, p: Any, shard: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        if not _is_dtensor(p):
            return shard
        like = {"shape": p.shape, "stride": p.stride()}
        return DTensor.from_local(shard, p.device_mesh, p.placements, run_check=False, **like).full_tensor()

    def part(self, p: Any, value: Tensor) -> Tensor:
        from torch.distributed.tensor import distribute_tensor

        if not _is_dtensor(p):
            return value
        value = value.to(p.to_local().device)
        return distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None).to_local()


class Zero3(Whole):
    """Flat parts, ``p.ds_tensor``, of parameters that DeepSpeed gathers inside an engine's forward.

    Before the student's engine is made its parameters may be whole: a model that was given, an adapter.
    """

    gathers = True

    def __init__(self, accelerator: Any, redirect: Redirect, dtype: torch.dtype | None):
        super().__init__(dtype)
        self.accelerator, self.redirect = accelerator, redirect
        self.engines: dict[nn.Module, Any] = {}

    @torch.no_grad()
    def twin(self, policy: Any) -> nn.Module:
        import deepspeed

        if any(hasattr(p, "ds_id") for p in policy.parameters()):  # partitioned when it was loaded
            with torch.random.fork_rng(devices=[]):
                twin = type(policy)._from_config(deepcopy(policy.config), dtype=policy.dtype)
            twin.requires_grad_(False).eval()
            for mine, theirs in zip(twin.parameters(), policy.parameters(), strict=True):
                mine.ds_tensor.copy_(theirs.ds_tensor)
            for mine, theirs in zip(twin.buffers(), policy.buffers(), strict=True):
                mine.copy_(theirs)
        else:
            twin = frozen_copy(policy)
        config = deepcopy(self.accelerator.state.deepspeed_plugin.deepspeed_config)
        for trained in ("optimizer", "scheduler"):
            config.pop(trained, None)
        config["zero_optimization"].pop("offload_optimizer", None)
        engine, *_ = deepspeed.initialize(model=twin, config=config)
        engine.eval()
        self.engines[twin] = engine
        return twin

    def inside(self, twin: nn.Module, forward: Callable[[], list[FrozenStates]]) -> list[FrozenStates]:
        return self.redirect(self.engines[twin], twin, forward)

    def shape(self, p: Any) -> torch.Size:
        return p.ds_shape if hasattr(p, "ds_id") else p.shape

    def shard(self, p: Any) -> Tensor:
        return p.ds_tensor.detach() if hasattr(p, "ds_id") else p.detach()

    def master(self, p: Any) -> Tensor:
        if p.dtype in WIDE or not hasattr(p, "ds_id") or not p.requires_grad:
            return self.shard(p)
        from deepspeed.utils import safe_get_local_fp32_param

        local = safe_get_local_fp32_param(p)
        assert local is not None
        return local

    def write(self, p: Any, shard: Tensor) -> None:
        super().write(p, shard)
        if hasattr(p, "ds_id") and p.ds_status.name == "AVAILABLE":
            p.partition()  # a small parameter stays gathered, and would be read as it was

    def whole(self, p: Any, shard: Tensor) -> Tensor:
        if not hasattr(p, "ds_id"):
            return shard
        group = p.ds_process_group
        flat = shard.new_empty(shard.numel() * torch.distributed.get_world_size(group))
        torch.distributed.all_gather_into_tensor(flat, shard.contiguous(), group=group)
        return flat[: p.ds_numel].view(p.ds_shape)

    def part(self, p: Any, value: Tensor) -> Tensor:
        if not hasattr(p, "ds_id"):
            return value
        size = p.ds_tensor.numel()
        mine = value.flatten()[size * torch.distributed.get_rank(p.ds_process_group) :][:size]
        return nn.functional.pad(mine, (0, size - mine.numel()))


def weights_of(accelerator: Any, redirect: Redirect) -> Whole:
    """How this run's ranks hold their weights. FSDP1, under which no policy has a teacher here, is left to others."""
    state = accelerator.state
    if state.distributed_type == "FSDP" and state.fsdp_plugin.fsdp_version == 2:
        return Fsdp2(accelerator, redirect)
    if state.distributed_type != "DEEPSPEED":
        return Whole()
    config = state.deepspeed_plugin.deepspeed_config
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = next((half[key] for key in half if config.get(key, {}).get("enabled") is True), None)
    return Zero3(accelerator, redirect, dtype) if state.deepspeed_plugin.zero_stage == 3 else Whole(dtype)


def stored_tensors(policy: Any) -> dict[str, Tensor]:
    """What ``save_pretrained`` stores: parameters and persistent buffers; of a PEFT model the adapters alone."""
    kept = policy.state_dict().keys()
    found = {n: t for n, t in (*policy.named_parameters(), *policy.named_buffers()) if n in kept}
    if hasattr(policy, "peft_config"):
        adapters = set(policy.peft_config)
        found = {n: t for n, t in found.items() if t.requires_grad or adapters.intersection(n.split("."))}
    return found


@torch.no_grad()
def gather(held: Whole, shards: Mapping[str, tuple[Tensor, Tensor]], *, writes: bool) -> dict[str, Tensor]:
    """Whole tensors on the CPU, by name, of (parameter, its shard); one at a time, and kept where ``writes`` only."""
    found = {}
    for name, (p, shard) in shards.items():
        full = held.whole(p, shard)
        if writes:
            found[name] = full.detach().cpu().contiguous()
    return found


def save_policy(held: Whole, shards: Mapping[str, tuple[Tensor, Tensor]], path: Path, *, writes: bool = True) -> None:
    """Whole tensors by name to one file, from (parameter, its shard); the file appears whole or not at all.

    Every rank takes part where ``held.gathers``; the one that ``writes`` needs room for all of them on its CPU.
    """
    if not (writes or held.gathers):
        return
    tensors = gather(held, shards, writes=writes)
    if writes:
        with replacing(path) as part:
            save_file(tensors, part)


@torch.no_grad()
def load_policy_(held: Whole, shards: Mapping[str, tuple[Tensor, Tensor]], path: Path, what: str) -> None:
    """Copy each rank's part of a file of `save_policy` into the shards.

    Raises ValueError, before anything is copied, where names or the shapes of whole tensors differ.
    """
    with safe_open(path, "pt") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        expected = {name: tuple(held.shape(p)) for name, (p, _) in shards.items()}
        if stored != expected:
            odd = sorted(n for n in stored.keys() | expected.keys() if stored.get(n) != expected.get(n))[:3]
            raise ValueError(f"{path}: expected the parameters of {what}, differs in {odd}")
        for name, (p, shard) in shards.items():
            shard.copy_(held.part(p, file.get_tensor(name)))


def reshard(model: nn.Module) -> None:
    """Let go of gathered weights. FSDP2 keeps those of a head whose own forward never runs until an update outdates
    them."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _with_head_copied(states: FrozenStates) -> FrozenStates:
    """FSDP2 frees the storage of what it gathered."""
    head = states.head
    if head is None:
        return states
    bias = None if head.bias is None else head.bias.clone()
    return replace(states, head=head.with_tensors(head.weight.clone(), bias))


def _is_dtensor(p: Any) -> bool:
    return hasattr(p, "to_local")
