"""The self-distillation family, one file a method: equation, source, the teacher's context, defaults, own code."""

from hsd.methods import dapo, dr_grpo, grpo, grpo_opsd, gspo, hsd, opsd, rlsd, sdft, sdpo
from hsd.methods.method import Method

METHODS: dict[str, Method] = {
    module.METHOD.name: module.METHOD for module in (hsd, opsd, sdpo, sdft, rlsd, grpo_opsd, grpo, dr_grpo, gspo, dapo)
}

__all__ = ["METHODS", "Method"]
