"""Policies that are not the student's own live weights: a fixed or EMA teacher, and the reference pi_0."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


def is_peft(model: Any) -> bool:
    """Whether a PEFT model is around the causal LM. Transformers puts the adapters of a saved LoRA run into the LM
    itself, which has a ``peft_config`` then and is an ordinary model in all else."""
    return hasattr(model, "get_base_model")


def inner_model(model: Any) -> Any:
    """The causal LM, without the PEFT model around it."""
    return model.get_base_model() if is_peft(model) else model


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode without gradients; tied weights stay tied."""
    twin = copy.deepcopy(model)
    twin.__dict__.pop("forward", None)  # a wrapper that was set on the model, as accelerate's, still calls that model
    twin.requires_grad_(False)
    return twin.eval()


def ema_update_(average: Sequence[Tensor], new: Sequence[Tensor], rate: float) -> None:
    """average <- (1 - rate) average + rate new, tensor by tensor, in the average's dtype.

    A bf16 average stands still: 1,000 steps of rate 0.005 from 1.0 towards 1.5 leave 1.0.
    """
    get_ema_multi_avg_fn(1.0 - rate)(list(average), list(new), 0)


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off inside; every module's own mode is restored."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[nn.Module]:
    """The initial policy of a LoRA run without a second model."""
    with model.disable_adapter():  # type: ignore[operator]
        yield model


def adapter_parameters(model: Any, adapter: str) -> dict[str, Tensor]:
    """An adapter's parameters by the names that they have under every adapter."""
    found = {}
    for name, p in model.named_parameters():
        parts = name.split(".")
        if adapter in parts:
            found[".".join("*" if part == adapter else part for part in parts)] = p
    return found


@torch.no_grad()
def add_frozen_adapter(model: Any, adapter: str) -> None:
    """A copy of PEFT's active adapter in the same model, without gradients and not active."""
    active = model.active_adapter
    trained = [p for p in model.parameters() if p.requires_grad]
    model.add_adapter(adapter, copy.deepcopy(model.peft_config[active]))
    source, copied = adapter_parameters(model, active), adapter_parameters(model, adapter)
    if source.keys() != copied.keys():
        odd = sorted(source.keys() ^ copied.keys())[:3]
        raise ValueError(f"model: expected an adapter that can be added twice, its copy differs in {odd}")
    for name, p in copied.items():
        p.copy_(source[name])
        p.requires_grad_(False)
    for p in trained:
        p.requires_grad_(True)


@contextmanager
def under_adapter(model: nn.Module, adapter: str) -> Iterator[nn.Module]:
    """Another adapter is active inside. PEFT's ``set_adapter`` would also move ``requires_grad``, which DDP, FSDP and
    DeepSpeed do not expect."""
    holders: list[Any] = [m for m in model.modules() if hasattr(m, "_active_adapter")]
    before = [m._active_adapter for m in holders]
    for module, active in zip(holders, before, strict=True):
        module._active_adapter = [adapter] if isinstance(active, list) else adapter
    try:
        yield model
    finally:
        for module, active in zip(holders, before, strict=True):
            module._active_adapter = active
