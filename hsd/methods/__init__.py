"""The self-distillation family, one file a method: equation, source, the teacher's context, defaults, own code."""

from hsd.methods import (
    actguide,
    antisd,
    atesd,
    atesd_learned,
    brts,
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
    mixed_policy,
    mopd,
    msd,
    npo,
    opcod,
    opsd,
    pbsd,
    plan_reference,
    rcsd,
    resd,
    rlcsd,
    rlrt,
    rlsd,
    sdft,
    sdpg,
    sdpo,
    sgsd,
    ssopd,
    stable_opd,
    step_critique,
    trace,
    vopd,
)
from hsd.methods.method import Method

MODULES = (
    *(hsd, hsd_unpaired, opsd, sdpo, sdft, mopd, atesd, atesd_learned, ccopd, msd),  # a divergence
    *(step_critique, rcsd, opcod, resd),  # under a text that a model has written
    *(grpo_opsd, ssopd, sdpg, trace),  # a divergence beside a policy gradient
    *(rlsd, egrsd, cl_egrsd, rlrt, rlcsd),  # the teacher weighs the advantage
    *(antisd, vopd, sgsd),  # the teacher makes the advantage, or the loss of the sampled token
    *(stable_opd, brts, mixed_policy, pbsd, plan_reference),  # sequences that are no rollouts
    *(grpo, dr_grpo, gspo, dapo, actguide, npo),  # no teacher
)
METHODS: dict[str, Method] = {module.METHOD.name: module.METHOD for module in MODULES}


def title(name: str) -> str:
    """A method's name in words and, as a rule, its source: the first words of its module's docstring."""
    module = next(module for module in MODULES if module.METHOD.name == name)
    words = " ".join((module.__doc__ or name).split("\n\n")[0].split())
    return words.split(": ")[0].rstrip(".:")


__all__ = ["METHODS", "MODULES", "Method", "title"]
