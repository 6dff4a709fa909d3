"""Shared by the adapters: a version check, and the loss on a model under the contexts of its own forward."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hsd.policy.body_and_head import BodyAndHead, body_and_head, check_body_and_head
from hsd.policy.forward import FrozenStates
from hsd_kernels import Head, HSDKLOutput, RowStats, fused_hsd_kl, gathered

T = TypeVar("T")

_checked: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@cache
def check_version(package: str, first: str, last: str) -> None:
    """Warn, once, when ``package`` is installed in a version before ``first`` or after ``last`` ("1.16" has 1.16.3)."""
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError:
        return
    from packaging.version import Version

    release, least, most = (Version(version).release for version in (found, first, last))
    if release < least or release[: len(most)] > most:
        warnings.warn(
            f"{package} {found}: this adapter was tested with {package} {first} to {last}; compare a loss before you "
            "trust it",
            stacklevel=3,
        )


@dataclass(frozen=True)
class ImportanceRatio:
    """Token weights min(exp(log p - log p_old), cap), for ``token_weight_fn``; the exponent is clamped to [-20, 20].

    The form of TRL's SDPO and lasgroup/SDPO. No gradient flows through it.
    """

    old_logps: Tensor  # (N,), log-probs of the targets when they were sampled
    cap: float
    values: Tensor  # (N,), the weights of the rows seen so far

    @staticmethod
    def of(old_logps: Tensor | None, cap: float | None) -> ImportanceRatio | None:
        """None unless both are given."""
        if old_logps is None or cap is None:
            return None
        flat = old_logps.detach().reshape(-1)
        return ImportanceRatio(flat, cap, torch.zeros_like(flat, dtype=torch.float32))

    def __call__(self, stats: RowStats) -> Tensor:
        assert stats.student_logps is not None
        gap = (stats.student_logps - self.old_logps[stats.rows]).clamp(-20.0, 20.0)
        ratio = gap.exp().clamp(max=self.cap)
        self.values[stats.rows] = ratio.float()
        return ratio


def checked_body_and_head(model: nn.Module) -> BodyAndHead:
    """`body_and_head`, and once for each model `check_body_and_head`, which sharded weights rule out.

    Raises ValueError naming the model class, as `hsd.policy.body_and_head` does.
    """
    parts = body_and_head(model)
    if model not in _checked:
        if not any(hasattr(p, "device_mesh") or hasattr(p, "ds_id") for p in model.parameters()):
            check_body_and_head(model, parts)
        _checked.add(model)
    return parts


def unwrapped(accelerator: Any, model: nn.Module) -> tuple[Any, BodyAndHead]:
    """What a prepared model wraps, and its body and head."""
    inner = accelerator.unwrap_model(model)
    with accelerator.autocast():  # the prepared model's own forward is in it
        return inner, checked_body_and_head(inner)


def forward(parts: BodyAndHead, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Last hidden states (B, S, D) behind the logits of ``model(input_ids=..., attention_mask=...)``.

    Without position ids, as the codebases adapted here call their models: positions then count the padding too, which
    changes the distance from a right-padded prompt to its completion (`hidden_states` would skip it).
    """
    return parts.body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state


@torch.no_grad()
def with_whole_head(head: Head, hidden: Tensor) -> FrozenStates:
    """A policy's states together with its head as it is now, for a teacher that does not share the student's head.

    A head in pieces is copied whole, (V, D); a plain one is not copied.
    """

    def whole(t: Tensor) -> Tensor:
        with gathered(t) as found:
            return found.clone() if hasattr(t, "ds_id") else found.detach()

    bias = None if head.bias is None else whole(head.bias)
    return FrozenStates(hidden.detach(), head.with_tensors(whole(head.weight), bias))


def divergence(student: Head, hidden: Tensor, teacher: FrozenStates, **options: Any) -> HSDKLOutput:
    """`fused_hsd_kl` with the ``student``'s head, logit scale and softcap, statistics included.

    A teacher without a head of its own shares the student's. States of different dtypes meet in the wider one.
    """
    dtype = torch.promote_types(hidden.dtype, teacher.hidden.dtype)

    def head(weight: Tensor, bias: Tensor | None) -> Head:
        return student.with_tensors(weight.to(dtype), None if bias is None else bias.to(dtype))

    with ExitStack() as stack:
        weight = stack.enter_context(gathered(student.weight))
        bias = None if student.bias is None else stack.enter_context(gathered(student.bias))
        out = fused_hsd_kl(
            hidden.to(dtype),
            teacher.hidden.to(dtype),
            head(weight, bias),
            teacher_head=None if teacher.head is None else head(teacher.head.weight, teacher.head.bias),
            return_stats=True,
            **options,
        )
    assert isinstance(out, HSDKLOutput)
    return out


def inside_forward(wrapper: nn.Module, model: nn.Module, compute: Callable[[], T]) -> T:
    """``compute()`` from within ``wrapper``'s forward, ``model`` being what it wraps (or itself): the hooks by which
    DDP and FSDP gather parameters and reduce gradients then apply, though the model's own forward is not used."""
    own = model.__dict__.get("forward")

    def restore() -> None:
        if own is None:
            model.__dict__.pop("forward", None)
        else:
            model.forward = own

    def forward(run: Callable[[], T]) -> T:
        restore()
        return run()

    model.forward = forward
    try:
        return wrapper(compute)
    finally:
        restore()
