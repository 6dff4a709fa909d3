"""Policies that are not the student's own live weights: a fixed or EMA teacher, and the reference pi_0."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode without gradients; tied weights stay tied."""
    twin = copy.deepcopy(model)
    twin.requires_grad_(False)
    return twin.eval()


@torch.no_grad()
def ema_update_(teacher: nn.Module, student: nn.Module, rate: float) -> None:
    """teacher <- (1 - rate) teacher + rate student, parameter by parameter."""
    pairs = zip(teacher.parameters(), student.parameters(), strict=True)
    for mine, theirs in pairs:
        mine.lerp_(theirs.detach().to(mine.dtype), rate)


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
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file({name: p.detach().contiguous().cpu() for name, p in model.named_parameters()}, part)
    part.replace(path)


@torch.no_grad()
def load_policy_(model: nn.Module, path: Path) -> None:
    stored = load_file(path)
    own = dict(model.named_parameters())
    shapes, expected = ({name: t.shape for name, t in tensors.items()} for tensors in (stored, own))
    if shapes != expected:
        odd = sorted(n for n in shapes.keys() | expected.keys() if shapes.get(n) != expected.get(n))[:3]
        raise ValueError(f"{path}: expected the parameters of {type(model).__name__}, differs in {odd}")
    for name, p in own.items():
        p.copy_(stored[name])
