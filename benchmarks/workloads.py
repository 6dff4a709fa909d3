"""Inputs of the kernel benchmarks: (student_hidden (N, D), teacher_hidden (N, D), head weight (V, D)).

Drawn on the device: a head of (151,936, 4,096) would take seconds on a CPU, for every contender.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Workload = tuple[Tensor, Tensor, Tensor]


def gaussian(shape: tuple[int, int, int], dtype: torch.dtype, device: str, seed: int = 0) -> Workload:
    """Independent Gaussian states, a teacher near them, logits of standard deviation 2: flat distributions, so that
    nothing can be filtered. The work of the exact kernel does not depend on the values."""
    n, d, v = shape
    g = torch.Generator(device).manual_seed(seed)
    here = {"generator": g, "device": device}
    student = torch.randn(n, d, **here)
    teacher = student + 0.3 * torch.randn(n, d, **here)
    weight = torch.randn(v, d, **here) * (2.0 / d**0.5)
    return student.to(dtype), teacher.to(dtype), weight.to(dtype)


def peaked(shape: tuple[int, int, int], dtype: torch.dtype, device: str, seed: int = 0) -> Workload:
    """Like the states of a language model: each has one likely token, drawn by a Zipf-like law so that tokens repeat,
    and the teacher nearly agrees on most positions: its noise is 0.02 on three quarters and 0.5 on the rest."""
    n, d, v = shape
    g = torch.Generator(device).manual_seed(seed)
    here = {"generator": g, "device": device}
    weight = torch.randn(v, d, **here) * (1.5 / d**0.5)
    likely = (v ** torch.rand(n, **here)).long().clamp_max(v - 1)
    # The other logits have a standard deviation of 1.5, so that their log-sum-exp is log V + 1.1: 13 at V = 151,936.
    strength = math.log(v) + 1.0 + 8.0 * torch.rand(n, 1, **here)
    student = torch.randn(n, d, **here) + strength * weight[likely] / weight[likely].square().sum(-1, keepdim=True)
    noise = torch.where(torch.rand(n, 1, **here) < 0.75, 0.02, 0.5)
    teacher = student + noise * torch.randn(n, d, **here)
    return student.to(dtype), teacher.to(dtype), weight.to(dtype)


def recorded(path: str, tokens: int, dtype: torch.dtype, device: str) -> Workload:
    """The first ``tokens`` states that `smollm2_states.py` recorded."""
    states = torch.load(path, weights_only=True)
    found = states["student"].shape[0]
    if found < tokens:
        raise ValueError(f"tokens: expected at most the {found} in {path}, got {tokens}")
    parts = (states["student"][:tokens], states["teacher"][:tokens], states["weight"])
    return tuple(t.to(device, dtype) for t in parts)  # type: ignore[return-value]
