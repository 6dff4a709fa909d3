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

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hsd.policy.body_and_head import BodyAndHead, body_and_head, hidden_states, probe_ids
from hsd.policy.forward import FrozenStates, with_own_head
from hsd.policy.frozen import (
    adapter_parameters,
    adapters_off,
    add_frozen_adapter,
    ema_update_,
    in_eval_mode,
    is_peft,
    under_adapter,
)
from hsd.policy.sharding import WIDE, Whole, load_policy_, save_policy
from hsd.train.config import HSDConfig
from hsd_kernels import Head

INITIAL, EMA, REFERENCE, AVERAGE = "initial_policy", "ema_teacher", "reference", "reference_average"
COPY = "copied_teacher"
IN_CHECKPOINTS = (EMA, REFERENCE, AVERAGE, COPY)

# (body and head, which prompts the rollouts follow: "student", "teacher" or both) -> states (B, T, D) of each
Forward = Callable[[BodyAndHead, Sequence[str]], Sequence[Tensor]]


def roles(args: HSDConfig) -> tuple[str | None, str | None]:
    """Names of the frozen weights of the teacher and of the reference; None where there are none."""
    kinds = {"fixed": INITIAL, "trust_region": INITIAL, "ema": EMA, "copy": COPY, "gated": COPY}
    teacher = kinds.get(args.teacher) if args.has_teacher else None
    reference = INITIAL if args.reference_refresh_steps is None else REFERENCE
    return teacher, reference if args.reference_coef else None


def copies(args: HSDConfig, *, peft: bool) -> set[str]:
    """Weights that a run keeps besides the student's. With LoRA the initial policy is the adapters off, and what an
    average adds is an adapter."""
    teacher, reference = roles(args)
    wanted = {name for name in (teacher, reference) if name is not None and not (peft and name == INITIAL)}
    return wanted | ({AVERAGE} if reference == REFERENCE else set())


class FrozenPolicies:
    """The policies that a run keeps besides the student: twins in ``models``, or, with LoRA, adapters of the student.

    Args:
        policy: The student as loaded, before an engine wraps it.
        held: How the ranks hold its weights, and so those of the twins.
    """

    def __init__(self, policy: Any, args: HSDConfig, held: Whole | None = None):
        self.args, self.held = args, held or Whole()
        self.teacher, self.reference = roles(args)
        self.peft = is_peft(policy)
        _check(policy, args, self.held)
        self.names = sorted(copies(args, peft=self.peft))
        self.models: dict[str, nn.Module] = {}
        for name in self.names:
            if self.peft:
                add_frozen_adapter(policy, name)
            else:
                self.models[name] = self.held.twin(policy)
        self._averages: dict[str, list[Tensor]] = {}  # in fp32, where the twin's weights are narrower
        self._initial_is_saved = False

    @property
    def live(self) -> bool:
        """Whether the student's own weights compute the teacher's states, alone or as a share."""
        return self.args.has_teacher and self.args.teacher in ("live", "trust_region")

    def forward(
        self, policy: Any, forward: Forward, *, teacher: bool, reference: bool
    ) -> tuple[FrozenStates | None, FrozenStates | None]:
        """The frozen part of the teacher (None for a live one), and the reference, one forward pass each of those that
        are read.

        A teacher and a reference of the same weights share one pass, so that a tree can share their prefixes.
        """
        taught, referred = self.teacher if teacher else None, self.reference if reference else None
        if taught is not None and taught == referred:
            of_reference, of_teacher = self._under(policy, taught, forward, ("student", "teacher"))
            return of_teacher, of_reference
        of_teacher = self._under(policy, taught, forward, ("teacher",))[0] if taught else None
        of_reference = self._under(policy, referred, forward, ("student",))[0] if referred else None
        return of_teacher, of_reference

    @contextmanager
    def sampler(self, policy: Any) -> Iterator[Any]:
        """The model that samples as the teacher does; of a teacher that is one model on ranks that hold it whole."""
        if self.teacher is None or self.teacher in self.models:
            yield self.models[self.teacher] if self.teacher else policy
            return
        with adapters_off(policy) if self.teacher == INITIAL else under_adapter(policy, self.teacher):
            yield policy

    def _under(self, policy: Any, name: str, forward: Forward, prompts: Sequence[str]) -> list[FrozenStates]:
        if name in self.models:
            twin = self.models[name]

            def states() -> list[FrozenStates]:
                parts = body_and_head(twin)
                return [with_own_head(parts, hidden) for hidden in forward(parts, prompts)]

            return self.held.inside(twin, states)
        with adapters_off(policy) if name == INITIAL else under_adapter(policy, name):
            return [FrozenStates(hidden) for hidden in forward(body_and_head(policy), prompts)]

    def combine(self, live: FrozenStates | None, frozen: FrozenStates | None, head: Head) -> FrozenStates | None:
        """The teacher, from its states under the student's weights and under frozen ones; None without a teacher."""
        if live is None or frozen is None:
            return live or frozen
        return mix_logits(frozen, live, head, self.args.trust_region_share)

    @torch.no_grad()
    def step(self, policy: nn.Module, steps_done: int, refresh: bool = False) -> None:
        """After an optimizer step; ``refresh``: whether the gate of a gated teacher has opened."""
        if EMA in self.names:
            self._move(policy, EMA, self.args.teacher_ema_rate)
        due = steps_done % self.args.teacher_copy_steps == 0 if self.args.teacher == "copy" else refresh
        if COPY in self.names and due:
            self._move(policy, COPY, 1.0)
        every = self.args.reference_refresh_steps
        if AVERAGE in self.names and every is not None:
            self._move(policy, AVERAGE, self.args.reference_ema_rate)
            if steps_done % every == 0:
                average = self.shards(policy, AVERAGE)
                for p, (_, new) in zip(self.parameters(policy, REFERENCE).values(), average.values(), strict=True):
                    self.held.write(p, new)

    def _move(self, policy: Any, name: str, rate: float) -> None:
        """Shard by shard, in fp32."""
        mine = self.shards(policy, name)
        theirs = adapter_parameters(policy, policy.active_adapter) if self.peft else dict(policy.named_parameters())
        for (p, average), student in zip(mine.values(), theirs.values(), strict=True):
            ema_update_([average], [self.held.master(student).to(average.dtype)], rate)
            self.held.write(p, average)

    def parameters(self, policy: Any, name: str) -> dict[str, Tensor]:
        """Of a frozen policy, by name."""
        return dict(self.models[name].named_parameters()) if name in self.models else adapter_parameters(policy, name)

    def shards(self, policy: Any, name: str) -> dict[str, tuple[Tensor, Tensor]]:
        """Each parameter with this rank's elements of it, those of an average in fp32: what a checkpoint holds."""
        own = {key: (p, self.held.shard(p)) for key, p in self.parameters(policy, name).items()}
        if name not in (EMA, AVERAGE) or all(shard.dtype in WIDE for _, shard in own.values()):
            return own
        if name not in self._averages:
            self._averages[name] = [shard.float() for _, shard in own.values()]
        return {key: (p, wide) for (key, (p, _)), wide in zip(own.items(), self._averages[name], strict=True)}

    def save(self, policy: Any, checkpoint: Path, *, writes: bool = True) -> None:
        """What changes goes into the checkpoint; the initial policy once, beside it, over that of an earlier run.

        All ranks call this; one ``writes``.
        """
        for name in self.names:
            if name != INITIAL or not self._initial_is_saved:
                path = frozen_file(checkpoint.parent if name == INITIAL else checkpoint, name)
                save_policy(self.held, self.shards(policy, name), path, writes=writes)
        self._initial_is_saved = True

    @torch.no_grad()
    def load(self, policy: Any, checkpoint: Path) -> None:
        for name in self.names:
            path = frozen_file(checkpoint.parent if name == INITIAL else checkpoint, name)
            if not path.exists():
                raise ValueError(
                    f"resume_from_checkpoint: expected {path}, which a run with teacher={self.args.teacher!r}, "
                    f"reference_coef={self.args.reference_coef} and reference_refresh_steps="
                    f"{self.args.reference_refresh_steps} saves; the checkpoint is of another kind of run"
                )
            shards = self.shards(policy, name)
            load_policy_(self.held, shards, path, type(policy).__name__)
            for p, shard in shards.values():
                self.held.write(p, shard)


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


def frozen_file(folder: Path, name: str) -> Path:
    """Where a frozen policy is saved: the initial one in the run's folder, others in a checkpoint."""
    return folder / f"{name}.safetensors"


@torch.no_grad()
def check_fresh_adapter(policy: Any, args: HSDConfig) -> None:
    """Raise ValueError where adapters off are to be the initial policy and are not: an adapter was trained before, or
    starts away from the base model (PiSSA, ``init_lora_weights=False``)."""
    if not is_peft(policy) or INITIAL not in roles(args):
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


def _check(policy: Any, args: HSDConfig, held: Whole) -> None:
    trained = [p for p in policy.parameters() if p.requires_grad]
    half = next((p.dtype for p in trained if p.dtype not in WIDE), None)
    if set(roles(args)) & {EMA, REFERENCE} and half is not None and not held.has_masters:
        raise ValueError(
            "teacher, reference_refresh_steps: expected fp32 weights for an average (bf16=True computes in bf16), "
            f"got {half}"
        )
