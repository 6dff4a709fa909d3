"""The self-distillation family, one word each: objective, source and defaults are in each file."""

from hsd.methods import grpo, hindsight, opsd, rlsd, sdft, sdpo
from hsd.methods.method import HSD_DEFAULTS, Method, Shown, shown_to_teacher

METHODS = {
    m.name: m
    for m in (
        hindsight.METHOD,
        opsd.OPSD,
        sdpo.METHOD,
        sdft.METHOD,
        rlsd.METHOD,
        opsd.GRPO_OPSD,
        grpo.GRPO,
        grpo.DR_GRPO,
        grpo.GSPO,
        grpo.DAPO,
    )
}

__all__ = ["HSD_DEFAULTS", "METHODS", "Method", "Shown", "shown_to_teacher"]
