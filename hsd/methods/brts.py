"""BRTS (arXiv 2605.09725) with one model: the student's rollouts, and one selected trajectory of the teacher beside
them.

    L = mean over rollouts of mean_t KL(p || q)  +  10 x mean over groups of mean_t KL(q || p) along y

y is the first correct one of N = 4 texts that the teacher's weights write to the plain question, else one that they
write with the answer in the prompt, if that is correct; else the group has no y. q reads the answer in both.

Confidence: high on the conflict (code and second-hand). Conflict: the paper has the 10, N = 4 and both KLs; the
released script 0.05, N = 2, a policy gradient on top-16 and, on the trajectory, a gradient without the teacher in it:
this is the paper's form. The source's teacher is another model. Not here: the choice by overlap with the student, and
its fallback to the most similar wrong text, for which a draw would have to read logits.
"""

import torch
from torch import Tensor

from hsd.hindsight.context import Context
from hsd.hindsight.teacher_prompts import RolloutView, parts
from hsd.methods.draw import Ask, Drawn, GroupView, Reply, Row, Talk
from hsd.methods.method import Method
from hsd.methods.term import Stats, Term


def draw(view: GroupView) -> Talk:
    group, shown = view.group, Context(parts(answer=view.group.answer))

    def right(replies: list[Reply]) -> list[Reply]:
        return [reply for reply in replies if group.accepts(reply.reward)]

    found = right((yield [Ask(group.prompt, who="teacher", scored=True)] * int(view.settings["trajectories"])))
    if not found:
        found = right((yield [Ask(group.prompt, shown, "teacher", scored=True)]))
    return Drawn(rows={0: [Row(found[0].token_ids, (shown,))]} if found else {})


def contexts(view: RolloutView) -> list[Context]:
    return [Context(parts(answer=view.answer))] if view.answer else []


def trajectory(s: Stats) -> Tensor:
    return torch.full_like(s.kl, s.settings["trajectory_coef"])


METHOD = Method(
    "brts",
    contexts,
    terms=(
        Term("divergence"),
        Term("divergence", trajectory, divergence={"kind": "forward_kl"}, rows=True),
    ),
    draw=draw,
    max_rows=1,
    settings={"trajectories": 4, "trajectory_coef": 10.0},
    defaults={"teacher": "fixed", "divergence": "reverse_kl", "reference_coef": 0.0},
)
