"""Refused under FSDP and DeepSpeed, as far as the configuration alone shows it, without a model."""

from __future__ import annotations

import os

from hsd.train.config import HSDConfig
from hsd.train.teachers import copies


def check_launch(args: HSDConfig, *, peft: bool) -> None:
    """`check_sharded` before there is an accelerator: by accelerate's environment and the fields that it will read."""
    deepspeed = getattr(args, "deepspeed_plugin", None)
    fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if deepspeed is not None or fsdp or args.fsdp_plugin_args is not None:
        check_sharded(args, zero_stage=getattr(deepspeed, "zero_stage", 0), peft=peft)


def check_sharded(args: HSDConfig, *, zero_stage: int, peft: bool) -> None:
    """Raise ValueError for what FSDP or DeepSpeed (at a ZeRO stage) rule out; ``peft``: whether LoRA is trained."""
    if zero_stage == 3:
        raise ValueError("deepspeed: expected ZeRO stage 0 to 2, got 3: the partitioned head is not gathered here")
    if str(args.peer_rule).endswith("perplexity"):
        raise ValueError(f"peer_rule: expected one without perplexity under sharding, got {args.peer_rule!r}")
    if args.method_spec.scores:
        raise ValueError(f"method: expected one without a scoring pass under sharding, got {args.method!r}")
    if args.own_loss and args.prefix_sharing in ("tree", "prompt"):
        raise ValueError(f"prefix_sharing: expected 'auto' or 'none' under sharding, got {args.prefix_sharing!r}")
    if copies(args, peft=peft):
        raise ValueError(
            "teacher, reference_coef, reference_refresh_steps: expected 'live', 0 and None (or LoRA) under FSDP and "
            "DeepSpeed, where a frozen copy of sharded weights is not supported, got "
            f"{args.teacher!r}, {args.reference_coef} and {args.reference_refresh_steps}"
        )
