"""Policies that are not the student's own live weights: a fixed or EMA teacher, and the reference pi_0."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from hsd.files import replacing


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode without gradients; tied weights stay tied."""
    twin = copy.deepcopy(model)
    twin.requires_grad_(False)
    return twin.eval()


def ema_update_(teacher: nn.Module, student: nn.Module, rate: float) -> None:
    """teacher <- (1 - rate) teacher + rate student, parameter by parameter. Both have one architecture and dtype."""
    get_ema_multi_avg_fn(1.0 - rate)(list(teacher.parameters()), list(student.parameters()), 0)


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


def save_policy(model: nn.Module, path: Path) -> None:
    """Parameters by name to one file; it appears whole or not at all. Tied parameters are stored once."""
    with replacing(path) as part:
        save_file({name: p.detach().contiguous().cpu() for name, p in model.named_parameters()}, part)


@torch.no_grad()
def load_policy_(model: nn.Module, path: Path) -> None:
    """Copy the parameters of `save_policy` into ``model``.

    Raises ValueError, before anything is copied, where names or shapes differ.
    """
    stored = load_file(path)
    own = dict(model.named_parameters())
    shapes, expected = ({name: t.shape for name, t in tensors.items()} for tensors in (stored, own))
    if shapes != expected:
        odd = sorted(n for n in shapes.keys() | expected.keys() if shapes.get(n) != expected.get(n))[:3]
        raise ValueError(f"{path}: expected the parameters of {type(model).__name__}, differs in {odd}")
    for name, p in own.items():
        p.copy_(stored[name])
