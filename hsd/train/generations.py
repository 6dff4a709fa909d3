"""Which optimizer steps a generation of rollouts serves, under GRPO's arguments."""

from __future__ import annotations

import math


def questions_of(args) -> float | None:
    """New questions of an optimizer step under these GRPO arguments; None where they say nothing."""
    rollouts, size = getattr(args, "generation_batch_size", None), getattr(args, "num_generations", None)
    if not rollouts or not size:
        return None
    return rollouts / size * args.gradient_accumulation_steps / (args.steps_per_generation * args.num_iterations)


def steps_of_a_generation(args) -> int:
    """Optimizer steps after which a run with these GRPO arguments begins with new rollouts."""
    if args is None:
        return 1
    micro = args.steps_per_generation * args.num_iterations
    return micro // math.gcd(micro, args.gradient_accumulation_steps)


def serves_a_multiple(step: int, every: int, args) -> bool:
    """Whether the rollouts of a generation at ``step`` are those of a step that is a multiple of ``every``."""
    served = max(1, args.steps_per_generation * args.num_iterations // args.gradient_accumulation_steps)
    return -step % every < served
