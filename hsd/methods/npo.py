"""NPO (arXiv 2604.20733): in a weak group, the last rollout gives its place to one of the same run's later checkpoint.

    if the group's success rate <= gate: o_G := the column ``trajectory``, judged as the others are, with a ratio of 1
    L = GRPO's over the changed group

The gate's value is not published: ``method_args.gate``. Trajectories come from a scout run: train on for 20 to 70
steps, keep verified successes as a column of the data set (blank where there is none), go back, and start again with
them.

Confidence: medium (second-hand, detailed). Not here: AutoNPO, which finds moment and offset by a stalled reward, a
falling entropy and quality over variance. A trajectory that the rewards find wrong is not taken.
"""

from hsd.methods.draw import Ask, Drawn, GroupView, Talk
from hsd.methods.method import REQUIRED, Method


def draw(view: GroupView) -> Talk:
    group, text = view.group, view.row["trajectory"] or ""
    if group.success_rate > view.settings["gate"] or not text.strip():
        return None
    (reply,) = yield [Ask(group.prompt, given=text, scored=True)]
    return Drawn(rollouts={len(group.rollouts) - 1: reply} if group.accepts(reply.reward) else {})


METHOD = Method(
    "npo",
    draw=draw,
    needs=("trajectory",),
    settings={"gate": REQUIRED},
    defaults={"loss_type": "grpo"},
)
