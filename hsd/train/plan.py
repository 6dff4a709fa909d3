"""What a run holds on each GPU, and what it sends: counted from its configuration, before anything is loaded.

Not measured. The count leaves out what allocators and NCCL keep, and is about an MLP model with attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hsd.progress import counted
from hsd.train.config import HSDConfig
from hsd.train.limits import Engine
from hsd.train.teachers import AVERAGE, EMA, copies
from hsd_kernels.memory import MEMORY_BYTES
from hsd_kernels.token_driver import CHUNK_BYTES

ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
GB = 10**9
TRL_TILE = (4096, 32_768)  # tokens and columns of logits that TRL's own loss holds at a time, whatever the vocabulary
TRL_REFERENCE = "TRL's reference"


@dataclass(frozen=True)
class Shape:
    """A model's sizes, in elements."""

    parameters: int
    trained: int  # with LoRA the adapter's
    layer: int  # of the largest layer
    hidden: int
    vocabulary: int
    layers: int
    per_token: int  # activations of one layer that its backward reads


@dataclass(frozen=True)
class Item:
    what: str
    bytes: float
    phase: str = "always"  # or "update", "rollouts"


@dataclass(frozen=True)
class Plan:
    memory: list[Item]  # of a GPU
    traffic: list[Item]  # that a GPU sends in an optimizer step

    def total(self, phase: str) -> float:
        return sum(item.bytes for item in self.memory if item.phase in ("always", phase))

    def first_too_much(self, memory: float) -> Item | None:
        """The first item, in order, with which a phase exceeds ``memory`` bytes."""
        for phase in ("update", "rollouts"):
            held = 0.0
            for item in self.memory:
                if item.phase in ("always", phase):
                    held += item.bytes
                    if held > memory:
                        return item
        return None


def engine_named(name: str) -> Engine:
    """Raises ValueError for another name than those of `ENGINES`."""
    if name not in ENGINES:
        raise ValueError(f"engine: expected one of {', '.join(ENGINES)}, got {name!r}")
    if name.startswith("zero"):
        return Engine("deepspeed", zero={"stage": int(name[-1])})
    return Engine("fsdp") if name == "fsdp2" else Engine()


def shape_of(config: Any, lora_rank: int | None = None) -> Shape:
    """Of a transformers configuration; the model is built without storage. LoRA on all linear layers of the body."""
    import torch
    from transformers import AutoModelForCausalLM

    from hsd.policy.body_and_head import body_and_head

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    text, parts = config.get_text_config(), body_and_head(model)
    blocks: dict[str, int] = {}
    adapters = per_token = 0
    for name, module in parts.body.named_modules():
        block = ".".join(name.split(".")[:2]) if name.split(".")[0] in ("layers", "h") else ""
        own = sum(p.numel() for p in module.parameters(recurse=False))
        blocks[block] = blocks.get(block, 0) + own
        if isinstance(module, torch.nn.Linear):
            adapters += (lora_rank or 0) * (module.in_features + module.out_features)
            per_token += module.in_features + module.out_features
    parameters, layers = sum(p.numel() for p in model.parameters()), text.num_hidden_layers
    return Shape(
        parameters=parameters,
        trained=parameters if lora_rank is None else adapters,
        layer=max((size for block, size in blocks.items() if block), default=0),
        hidden=text.hidden_size,
        vocabulary=parts.linear.weight.shape[0],
        layers=layers,
        per_token=per_token // layers,
    )


def plan(
    args: HSDConfig, shape: Shape, engine: Engine, gpus: int, *, room: float, weight_bytes: int, prompt: int
) -> Plan:
    """Count for each of ``gpus``.

    Args:
        room: bytes of a GPU, of which vLLM takes its share.
        weight_bytes: of a weight as loaded (``model.dtype``).
        prompt: tokens of a teacher's prompt, with its demonstration; a student's counts as long.
    """
    half = args.bf16 or args.fp16
    c = 2 if half else 4  # bytes of what is computed
    narrow = engine.name == "deepspeed" and half  # DeepSpeed casts the model and keeps fp32 masters
    w = 2 if narrow else 4 if engine.name == "fsdp" and shape.trained == shape.parameters else weight_bytes
    whole = engine.name == "ddp"
    split = {  # over how many GPUs: weights, gradients, optimizer
        "ddp": (1, 1, 1),
        "fsdp": (gpus, gpus, gpus),
        "deepspeed": {0: (1, 1, 1), 1: (1, 1, gpus), 2: (1, gpus, gpus), 3: (gpus, gpus, gpus)}[engine.stage],
    }[engine.name]
    p, t = shape.parameters, shape.trained
    moments = 0 if args.optim == "sgd" else 8
    g = w if t == p else 4  # adapters are fp32
    memory = [
        Item("weights", p * w / split[0]),
        Item("gradients", t * g / split[1]),
        Item("optimizer (two moments in fp32)", t * moments / split[2]),
    ]
    if narrow:
        memory.append(Item("fp32 masters of bf16 weights", t * 4 / split[2]))
    if whole and gpus > 1:
        memory.append(Item("DDP's buckets, a second gradient", t * g))
    peft = t != p
    frozen = sorted(copies(args, peft=peft) | ({TRL_REFERENCE} if args.beta and not peft else set()))
    for name in frozen:
        size = t if peft else p
        memory.append(Item(f"frozen policy: {name}", size * (4 if peft else w) / split[0]))
        if name in (EMA, AVERAGE) and narrow:
            memory.append(Item(f"fp32 average of {name}", size * 4 / split[0]))
    head = shape.vocabulary * shape.hidden
    tokens = args.per_device_train_batch_size * (prompt + (args.max_completion_length or 0))
    if not whole and split[0] > 1:
        memory.append(Item("gathered layers, this one and the next", 2 * shape.layer * c, "update"))
        memory.append(Item("gathered head of the student", head * c, "update"))
    elif whole and half and w == 4:
        memory.append(Item("autocast's bf16 copies of the weights", p * 2, "update"))
    twins = [name for name in frozen if not peft]
    if twins and split[0] > 1:
        memory.append(Item("gathered head of a frozen policy", head * c * len({*twins} - {AVERAGE}), "update"))
    whose = "fused" if args.own_loss else "TRL's"
    if args.own_loss:
        chunks = MEMORY_BYTES["cuda"] if args.has_teacher else CHUNK_BYTES
        memory.append(Item("fused loss: chunks", args.memory_bytes or chunks, "update"))
    else:
        rows = min(args.per_device_train_batch_size * (args.max_completion_length or 0), TRL_TILE[0])
        wide = 4 if args.cast_lm_head_to_fp32 else c
        memory.append(Item("TRL's loss: tile of logits", rows * TRL_TILE[1] * wide, "update"))
    if not peft:
        memory.append(Item(f"{whose} loss: dW in fp32", head * 4, "update"))
    inputs, insides = shape.layers * shape.hidden, shape.per_token
    kept = inputs + insides if args.gradient_checkpointing else shape.layers * insides
    memory.append(Item(f"activations of {tokens:,} tokens, about", tokens * kept * c, "update"))
    if args.use_vllm and args.vllm_mode == "colocate":
        phase = "rollouts" if args.vllm_enable_sleep_mode else "always"
        share = args.vllm_gpu_memory_utilization
        memory.append(Item(f"vLLM ({share:.0%} of the GPU)", share * room, phase))
    elif not args.use_vllm and engine.stage == 3 and args.ds3_gather_for_generation:
        memory.append(Item("whole weights while transformers samples", p * c, "rollouts"))
    return Plan(memory, _traffic(args, shape, engine, gpus, split[0] > 1, c, g, twins))


def _traffic(
    args: HSDConfig, shape: Shape, engine: Engine, gpus: int, gathers: bool, c: int, g: int, twins: list[str]
) -> list[Item]:
    if gpus == 1:
        return []
    share, micro = (gpus - 1) / gpus, args.gradient_accumulation_steps
    times = counted(micro, "time")
    once, p, t = share * shape.parameters * c, shape.parameters, shape.trained
    if not gathers:
        found = [Item("gradients, all-reduced", 2 * share * t * g)]
        if engine.stage:
            found = [Item("gradients, reduced to their owners", share * t * g * (micro if engine.stage == 2 else 1))]
            found.append(Item("updated weights, all-gathered", share * t * c))
            if p == t and {EMA, AVERAGE}.intersection(twins) and c == 2:
                found.append(Item("fp32 masters for averages, all-reduced", 2 * share * p * 4))
        return found
    found = [
        Item(f"weights for the student's forward and backward, {times}", 2 * once * micro),
        Item(f"gradients, reduce-scattered, {times}", share * t * c * micro),
    ]
    if args.has_teacher and args.teacher in ("live", "trust_region"):
        found.append(Item(f"weights for the live teacher, {times}", once * micro))
    reads = set(twins) - {AVERAGE}
    if reads:
        found.append(Item(f"weights for {' and '.join(sorted(reads))}, {times}", len(reads) * once * micro))
    return found
