"""SSOPD (arXiv 2605.17497): GRPO, and in each mixed group one dense row: its longest failure learns from its shortest
success.

    L = S + 1/groups sum_g 0.5 4 s (1 - s) 1/m sum_{t <= m} sum_v min(q(v) log(q(v) / p(v)), 0.05)        # KL(q || p)

s is the group's success rate, m = min(1024, |y|), q reads the shortest success as its context.

Confidence: high (paper). The teacher's weights are the student's here. GRPO's S is the mean over rollouts.
"""

from torch import Tensor

from hsd.hindsight.context import Context
from hsd.hindsight.teacher_prompts import RolloutView, parts
from hsd.methods.method import Method
from hsd.methods.term import Stats, Term


def contexts(view: RolloutView) -> list[Context]:
    group = view.group
    if not group.is_mixed:
        return []
    length = [len(r.token_ids) for r in group.rollouts]
    if view.i != max(group.failures, key=lambda j: (length[j], -j)):
        return []
    shortest = min(group.successes, key=lambda j: (length[j], j))
    return [Context(parts(answer=view.answer, demonstration=view.rollout(shortest)))]


def weight(s: Stats) -> Tensor:
    rate, m = s["group_success"], s["length"].clamp_max(s.settings["tokens"])
    # One row a group, not a mean over the group's rollouts.
    of_group = s["group_size"] * 4.0 * rate * (1.0 - rate)
    return of_group * (s["position"] < s.settings["tokens"]) * s["length"] / m.clamp_min(1)


METHOD = Method(
    "ssopd",
    contexts,
    terms=(Term("divergence", weight), Term("advantage")),
    settings={"tokens": 1024},
    defaults={
        "show_answer": False,
        "kl_clip": 0.05,
        "divergence_coef": 0.5,
        "policy_coef": 1.0,
        "reference_coef": 0.0,
    },
)
