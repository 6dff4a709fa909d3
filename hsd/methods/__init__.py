"""The self-distillation family, one file a method: equation, source, the teacher's context, defaults, own code."""

from hsd.methods import (
    antisd,
    atesd,
    ccopd,
    cl_egrsd,
    dapo,
    dr_grpo,
    egrsd,
    grpo,
    grpo_opsd,
    gspo,
    hsd,
    hsd_unpaired,
    mopd,
    msd,
    opsd,
    rlcsd,
    rlrt,
    rlsd,
    sdft,
    sdpg,
    sdpo,
    sgsd,
    ssopd,
    vopd,
)
from hsd.methods.method import Method

MODULES = (
    *(hsd, hsd_unpaired, opsd, sdpo, sdft, mopd, atesd, ccopd, msd),  # a divergence
    *(grpo_opsd, ssopd, sdpg),  # a divergence beside a policy gradient
    *(rlsd, egrsd, cl_egrsd, rlrt, rlcsd),  # the teacher weighs the advantage
    *(antisd, vopd, sgsd),  # the teacher makes the advantage, or the loss of the sampled token
    *(grpo, dr_grpo, gspo, dapo),  # no teacher
)
METHODS: dict[str, Method] = {module.METHOD.name: module.METHOD for module in MODULES}

__all__ = ["METHODS", "MODULES", "Method"]
