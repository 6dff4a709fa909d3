"""Which weights the teacher and the reference have: the student's own, or copies that are frozen between steps.

| teacher | weights |
|---|---|
| live | the student of the moment |
| fixed | the initial policy (with LoRA: adapters off) |
| ema | an average that moves by ``teacher_ema_rate`` towards the student at each optimizer step |
| copy | the student as it stood at the last multiple of ``teacher_copy_steps`` steps |
| gated | the initial policy until the gate of ``teacher_gate`` opens, then the student of that step, and so on |
| trust_region | logits (1 - s) initial + s live, s = ``trust_region_share`` |

The reference is the initial policy, or, with ``reference_refresh_steps`` n, an average of the policy (moved by
``reference_ema_rate`` a step) as it stood at the last multiple of n steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hsd.policy.body_and_head import BodyAndHead, body_and_head, hidden_states, probe_ids
from hsd.policy.forward import FrozenStates, with_own_head
from hsd.policy.frozen import adapters_off, ema_update_, frozen_copy, in_eval_mode, load_policy_, save_policy
from hsd.train.config import HSDConfig
from hsd_kernels import Head

INITIAL, EMA, REFERENCE, AVERAGE = "initial_policy", "ema_teacher", "reference", "reference_average"
COPY = "copied_teacher"

# (body and head, which prompts the rollouts follow: "student", "teacher" or both) -> states (B, T, D) of each
Forward = Callable[[BodyAndHead, Sequence[str]], Sequence[Tensor]]


def roles(args: HSDConfig) -> tuple[str | None, str | None]:
    """Names of the frozen weights of the teacher and of the reference; None where there are none."""
    kinds = {"fixed": INITIAL, "trust_region": INITIAL, "ema": EMA, "copy": COPY, "gated": COPY}
    teacher = kinds.get(args.teacher) if args.has_teacher else None
    reference = INITIAL if args.reference_refresh_steps is None else REFERENCE
    return teacher, reference if args.reference_coef else None


def copies(args: HSDConfig, *, peft: bool) -> set[str]:
    """Those of `roles` that are copies of the weights. With LoRA the initial policy is the adapters off."""
    return {name for name in roles(args) if name is not None and not (peft and name == INITIAL)}


class FrozenPolicies:
    """The copies that a run needs, by name in ``models``; what the student's own module serves is not copied."""

    def __init__(self, policy: Any, args: HSDConfig):
        self.args = args
        self.teacher, self.reference = roles(args)
        peft = hasattr(policy, "peft_config")
        _check(policy, args, peft=peft)
        wanted = copies(args, peft=peft) | ({AVERAGE} if self.reference == REFERENCE else set())
        self.models: dict[str, nn.Module] = {name: frozen_copy(policy) for name in sorted(wanted)}
        self._initial_is_saved = False

    @property
    def live(self) -> bool:
        """Whether the student's own weights compute the teacher's states, alone or as a share."""
        return self.args.has_teacher and self.args.teacher in ("live", "trust_region")

    def forward(self, policy: Any, forward: Forward) -> tuple[FrozenStates | None, FrozenStates | None]:
        """The frozen part of the teacher (None for a live one), and the reference, one forward pass each.

        A teacher and a reference of the same weights share one pass, so that a tree can share their prefixes.
        """
        if self.teacher is not None and self.teacher == self.reference:
            reference, teacher = self._under(policy, self.teacher, forward, ("student", "teacher"))
            return teacher, reference
        teacher = self._under(policy, self.teacher, forward, ("teacher",))[0] if self.teacher else None
        reference = self._under(policy, self.reference, forward, ("student",))[0] if self.reference else None
        return teacher, reference

    def _under(self, policy: Any, name: str, forward: Forward, prompts: Sequence[str]) -> list[FrozenStates]:
        if name in self.models:
            parts = body_and_head(self.models[name])
            return [with_own_head(parts, hidden) for hidden in forward(parts, prompts)]
        with adapters_off(policy):
            return [FrozenStates(hidden) for hidden in forward(body_and_head(policy), prompts)]

    def combine(self, live: FrozenStates | None, frozen: FrozenStates | None, head: Head) -> FrozenStates | None:
        """The teacher, from its states under the student's weights and under frozen ones; None without a teacher."""
        if live is None or frozen is None:
            return live or frozen
        return mix_logits(frozen, live, head, self.args.trust_region_share)

    @torch.no_grad()
    def step(self, policy: nn.Module, steps_done: int, refresh: bool = False) -> None:
        """After an optimizer step; ``refresh``: whether the gate of a gated teacher has opened."""
        if EMA in self.models:
            ema_update_(self.models[EMA], policy, self.args.teacher_ema_rate)
        due = steps_done % self.args.teacher_copy_steps == 0 if self.args.teacher == "copy" else refresh
        if COPY in self.models and due:
            ema_update_(self.models[COPY], policy, 1.0)
        every = self.args.reference_refresh_steps
        if AVERAGE in self.models and every is not None:
            ema_update_(self.models[AVERAGE], policy, self.args.reference_ema_rate)
            if steps_done % every == 0:
                ema_update_(self.models[REFERENCE], self.models[AVERAGE], 1.0)

    def save(self, checkpoint: Path) -> None:
        """What changes goes into the checkpoint; the initial policy once, beside it, over that of an earlier run."""
        for name, model in self.models.items():
            if name != INITIAL:
                save_policy(model, _file(checkpoint, name))
            elif not self._initial_is_saved:
                save_policy(model, _file(checkpoint.parent, name))
        self._initial_is_saved = True

    def load(self, checkpoint: Path) -> None:
        for name, model in self.models.items():
            path = _file(checkpoint.parent if name == INITIAL else checkpoint, name)
            if not path.exists():
                raise ValueError(
                    f"resume_from_checkpoint: expected {path}, which a run with teacher={self.args.teacher!r}, "
                    f"reference_coef={self.args.reference_coef} and reference_refresh_steps="
                    f"{self.args.reference_refresh_steps} saves; the checkpoint is of another kind of run"
                )
            load_policy_(model, path)


def mix_logits(a: FrozenStates, b: FrozenStates, head: Head, share: float) -> FrozenStates:
    """States (B, T, .) whose logits are ``(1 - share)`` those of ``a`` plus ``share`` those of ``b``, before any soft
    cap.

    The head is linear: where both go through the student's head the states are mixed, else they are set side by side
    before ``[W_a, W_b]``.
    """
    if a.head is None and b.head is None:
        return FrozenStates(torch.lerp(a.hidden, b.hidden, share))
    heads = [a.head or head, b.head or head]
    known = [c * h.bias.detach() for h, c in zip(heads, (1.0 - share, share), strict=True) if h.bias is not None]
    hidden = torch.cat([(1.0 - share) * a.hidden, share * b.hidden], -1)
    weight = torch.cat([h.weight.detach() for h in heads], 1)
    bias = torch.stack(known).sum(0) if known else None
    return FrozenStates(hidden, head.with_tensors(weight, bias))


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


@torch.no_grad()
def check_fresh_adapter(policy: Any, args: HSDConfig) -> None:
    """Raise ValueError where adapters off are to be the initial policy and are not: an adapter was trained before, or
    starts away from the base model (PiSSA, ``init_lora_weights=False``)."""
    if not hasattr(policy, "peft_config") or INITIAL not in roles(args):
        return
    parts = body_and_head(policy)
    ids = probe_ids(parts)
    with in_eval_mode(policy):
        on = hidden_states(parts.body, ids, torch.ones_like(ids))
        with adapters_off(policy):
            off = hidden_states(parts.body, ids, torch.ones_like(ids))
    gap = ((on - off).abs().max() / off.abs().max()).item()
    # A fresh adapter adds exact zeros, but for DoRA, whose norms are rounded.
    dora = any(getattr(config, "use_dora", False) for config in policy.peft_config.values())
    if not gap <= (4 * torch.finfo(off.dtype).eps if dora else 0.0):
        raise ValueError(
            "model: expected a fresh adapter (adapters off = initial policy), got a trained one, or one that does not "
            f"start at 0: hidden states differ by {gap:.2g} of their size with the adapters on and off"
        )


def _check(policy: Any, args: HSDConfig, *, peft: bool) -> None:
    wanted = set(roles(args))
    if peft and copies(args, peft=peft):
        raise ValueError(
            "teacher, reference_refresh_steps: expected 'live', 'fixed' or 'trust_region' (adapters off) and None with "
            f"LoRA, got {args.teacher!r} and {args.reference_refresh_steps}"
        )
    half = next((p.dtype for p in policy.parameters() if p.dtype not in (torch.float32, torch.float64)), None)
    if wanted & {EMA, REFERENCE} and half is not None:
        # 1,000 steps of rate 0.005 from 1.0 towards 1.5 leave a bf16 weight at 1.0.
        raise ValueError(
            "teacher, reference_refresh_steps: expected fp32 weights for an average (bf16=True computes in bf16), "
            f"got {half}"
        )
