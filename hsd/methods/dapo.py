"""DAPO (arXiv 2503.14476): GRPO with a mean over all tokens and a higher upper clip; dynamic sampling on demand.

    S = mean over all tokens of the step of -min(r_t A, clip(r_t, 0.8, 1.28) A),  no reference

Dynamic sampling is ``method_args.rounds``, 0 by default for its cost: as often as that a group whose rewards are all
equal is replaced by one of another question of the data set, drawn by the run's seed; the group that is unequal first
is taken, else the first one stays. The source fills the batch from the next questions; here some questions come more
often than others. Confidence: high (TRL's code) but for that. Its overlong punishment is a reward function of TRL's.
"""

from hsd.methods.draw import Ask, Drawn, GroupView, Talk
from hsd.methods.method import Method


def draw(view: GroupView) -> Talk:
    rewards = [r.reward for r in view.group.rollouts]
    for _ in range(int(view.settings["rounds"]) if min(rewards) == max(rewards) else 0):
        row = view.spare()
        replies = yield [Ask(row["prompt"], scored=True, row=row)] * len(rewards)
        found = [reply.reward for reply in replies]
        if min(found) < max(found):
            return Drawn(rollouts=dict(enumerate(replies)), row=row)
    return None


METHOD = Method("dapo", draw=draw, settings={"rounds": 0}, defaults={"loss_type": "dapo", "epsilon_high": 0.28})
