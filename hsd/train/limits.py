"""What a method, an engine and a model rule out between them; most of it shows before a model is loaded."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from trl.import_utils import is_vllm_available

from hsd.methods.reads import reads
from hsd.named import nearest
from hsd.policy.body_and_head import body_and_head, check_body_and_head
from hsd.train.config import HSDConfig
from hsd.train.teachers import check_fresh_adapter, copies

# Of zero_optimization: what moves or copies partitions, under which no twin has been run.
WITHOUT_TWINS = ("zero_hpz_partition_size", "zero_quantized_weights", "mics_shard_size")


@dataclass(frozen=True)
class Engine:
    """Who holds the weights: "ddp" (also one process), "fsdp" or "deepspeed"."""

    name: str = "ddp"
    fsdp_version: int = 2
    fsdp_offload: bool = False
    zero: dict[str, Any] | None = None  # DeepSpeed's zero_optimization

    @property
    def stage(self) -> int:
        return int((self.zero or {}).get("stage", 0))

    def __str__(self) -> str:
        if self.name == "ddp":
            return "unsharded"
        return f"FSDP{self.fsdp_version}" if self.name == "fsdp" else f"DeepSpeed ZeRO-{self.stage}"


def engine_of(accelerator: Any) -> Engine:
    state = accelerator.state
    if state.distributed_type == "FSDP":
        plugin = state.fsdp_plugin
        return Engine("fsdp", fsdp_version=plugin.fsdp_version, fsdp_offload=_offloads(plugin.cpu_offload))
    if state.distributed_type == "DEEPSPEED":
        return Engine("deepspeed", zero=state.deepspeed_plugin.deepspeed_config.get("zero_optimization", {}))
    return Engine()


def launched(args: HSDConfig) -> Engine:
    """`engine_of` before there is an accelerator: by accelerate's environment and the fields that it will read."""
    deepspeed = getattr(args, "deepspeed_plugin", None)
    if deepspeed is not None:
        return Engine("deepspeed", zero=deepspeed.deepspeed_config.get("zero_optimization", {}))
    if args.fsdp_plugin_args is not None:
        given = args.fsdp_plugin_args
        return Engine("fsdp", int(given["fsdp_version"]), bool(given.get("cpu_offload")))
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        offload = os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true"
        return Engine("fsdp", int(os.environ.get("FSDP_VERSION", "1")), offload)
    return Engine()


def _offloads(policy: Any) -> bool:
    """Of accelerate's ``cpu_offload``: FSDP1's, FSDP2's, a bool or None."""
    return type(policy).__name__ == "CPUOffloadPolicy" or bool(getattr(policy, "offload_params", policy is True))


def check_columns(name: str, columns: Collection[str], args: HSDConfig) -> None:
    """Raise ValueError where the method needs a column that is not among ``columns``; none at all are not known."""
    needed = {"prompt", "answer", *args.method_spec.needs}
    wanted = f"method={args.method!r}"
    if args.has_teacher and args.fallback == "solution":
        needed, wanted = needed | {"solution"}, f"{wanted} and fallback='solution'"
    if columns and not needed <= set(columns):
        missing = min(needed - set(columns))
        wanted = f"columns {sorted(needed)} for {wanted}{nearest(missing, columns)}"
        raise ValueError(f"{name}: expected {wanted}, got {sorted(columns)}")


def lacking(args: HSDConfig, rows: Any) -> str | None:
    """In a line, the columns that the method reads and that rows do without, of a data set or of a list of rows; None
    where every row has them."""
    found = []
    for name in reads(args.method_spec).columns:
        columns = getattr(rows, "column_names", None)
        if columns is None:
            values: Any = [row.get(name) for row in rows]
        else:
            values = rows[name] if name in columns else [None] * len(rows)
        if without := sum(map(_is_blank, values)):
            found.append(f"the column {name!r}, which {without} of {len(values)} rows lack or leave blank")
    return f"method {args.method} reads {', and '.join(found)}; it trains on those without" if found else None


def _is_blank(value: Any) -> bool:
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def check_method(args: HSDConfig, given: dict[str, Any]) -> None:
    """Raise ValueError where ``given``, arguments of the trainer by name, do not go with the method."""
    for name in ("environment_factory", "rollout_func"):  # they may change the question after the data set
        if args.has_teacher and given.get(name) is not None:
            raise ValueError(
                f"{name}: expected None with method={args.method!r}, whose teacher is given the data set's"
            )
    if args.draws and not args.own_loss:
        raise ValueError(f"policy_loss: expected 'fused' with method={args.method!r}, which draws, {args.why_trl()}")
    if given.get("writer_fn") is not None and not args.draws:
        raise ValueError(f"writer_fn: expected None with method={args.method!r}, which draws nothing")
    if given.get("feedback_fn") is not None and not args.method_spec.uses_feedback:
        raise ValueError(f"feedback_fn: expected None with method={args.method!r}, which shows no feedback")


def check_no_tensor_parallelism(model: Any, args: HSDConfig) -> None:
    """Raise ValueError where ranks would share one model's matrices: TRL gives every rank rollouts of its own."""
    deepspeed = getattr(getattr(args, "deepspeed_plugin", None), "deepspeed_config", {})
    asked = {
        "model": getattr(model, "tp_size", None),
        "model_init_kwargs": dict(args.model_init_kwargs or {}).get("tp_plan"),  # type: ignore[arg-type]
        "parallelism_config": getattr(args.parallelism_config, "tp_size", None),
        "deepspeed": deepspeed.get("tensor_parallel", {}).get("autotp_size"),
    }
    for name, value in asked.items():
        if value not in (None, 0, 1):
            what = "tp_plan" if name == "model_init_kwargs" else "tp_size"
            raise ValueError(
                f"{name}: expected no tensor parallelism, under which TRL's ranks sample different rollouts for one "
                f"model, got {what}={value!r}"
            )


def check_packages(args: HSDConfig) -> None:
    """Raise ValueError where ``use_vllm`` or ``report_to`` asks for a package that is not installed."""
    if args.use_vllm and not is_vllm_available():
        raise ValueError("use_vllm: expected the package vllm (pip install vllm) for True, got none")
    for name in args.report_to or ():
        try:
            for callback in get_reporting_integration_callbacks(name):
                callback()
        except (ValueError, RuntimeError, ImportError) as error:
            raise ValueError(f"report_to: expected names of installed packages, got {name!r}: {error}") from error


def check_engine(args: HSDConfig, engine: Engine, *, peft: bool) -> None:
    """Raise ValueError for what ``engine`` rules out; ``peft``: whether LoRA is trained."""
    beside = f"with a frozen policy beside the student (teacher={args.teacher!r}, reference_coef={args.reference_coef})"
    partitioned = engine.name == "fsdp" or engine.stage == 3
    if args.draws and partitioned:
        raise ValueError(f"method: expected one that draws nothing under {engine}, got {args.method!r}")
    if engine.name == "fsdp" and args.has_teacher:
        if engine.fsdp_version != 2:
            raise ValueError(
                f"fsdp_version: expected 2, got {engine.fsdp_version}, which flattens the weights that the loss reads"
            )
        if engine.fsdp_offload and copies(args, peft=peft):
            raise ValueError(f"fsdp_offload_params: expected False {beside}, got True")
    if partitioned and args.teacher_success_every:
        raise ValueError(
            "teacher_success_every: expected None where a rank holds a part of the weights, which cannot sample, "
            f"got {args.teacher_success_every}"
        )
    if partitioned and args.own_loss and args.tree_token_budget is not None:
        raise ValueError(
            f"tree_token_budget: expected None under {engine}, where ranks take part in each other's forward passes "
            f"and a tree over the budget takes as many as its rank's rollouts ask for, got {args.tree_token_budget}"
        )
    if engine.stage == 3 and copies(args, peft=peft):
        zero = engine.zero or {}
        for name in WITHOUT_TWINS:
            if zero.get(name) not in (None, False, 1, -1):
                raise ValueError(f"deepspeed: expected no {name} {beside}, got {zero[name]}")
        if (zero.get("offload_param") or {}).get("device", "none") != "none":
            raise ValueError(f"deepspeed: expected no offload_param {beside}, got {zero['offload_param']}")


def makes_loss(args: HSDConfig, policy: Any, tried: Any, engine: Engine, *, aux_loss: bool, whole: bool) -> bool:
    """Whether the loss is made here, not by TRL; a warning says why it is not although its options allow it.

    Args:
        tried: The policy, or a model that computes as it does, where no rank has its weights ``whole``.
        aux_loss: Whether the router of a mixture of experts has a loss of its own.

    Raises ValueError for a model that a method with a teacher, or ``policy_loss="fused"``, cannot train.
    """
    if not args.own_loss:
        return False
    reason = None
    if not args.has_teacher and aux_loss:
        reason = f"router_aux_loss_coef={args.router_aux_loss_coef}: the fused loss has no such term"
    elif not args.has_teacher and engine.name == "fsdp" and engine.fsdp_version != 2:
        reason = f"fsdp_version={engine.fsdp_version} flattens the weights that the fused loss reads"
    else:
        try:
            body_and_head(policy)
            check_body_and_head(tried, body_and_head(tried))
        except ValueError as error:
            if args.has_teacher:
                raise
            reason = str(error)
    if reason is None:
        if whole:
            check_fresh_adapter(policy, args)
        return True
    if args.policy_loss == "fused" or args.reference_coef or args.policy_coef != 1.0:
        raise ValueError(f"policy_loss: expected 'trl' for this model, got {args.policy_loss!r}: {reason}")
    warnings.warn(f"policy_loss: TRL's own loss, because {reason}", stacklevel=3)
    return False
