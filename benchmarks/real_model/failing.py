"""HSD over the failing rollouts alone: a success has no teacher.

hsd's loss over the rollouts that failed
"""

from dataclasses import replace

from hsd.hindsight.context import Context
from hsd.hindsight.teacher_prompts import RolloutView
from hsd.methods import METHODS

HSD = METHODS["hsd"]


def contexts(view: RolloutView) -> list[Context]:
    succeeded = view.group.accepts(view.group.rollouts[view.i].reward)
    return [] if succeeded or HSD.contexts is None else HSD.contexts(view)


METHOD = replace(HSD, name="hsd_failing", contexts=contexts)
