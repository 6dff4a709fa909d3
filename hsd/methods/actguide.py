"""ActGuide-RL (arXiv 2605.12004) in one turn: a group without any reward is drawn again under the head of a solution.

    k   = the least head of the solution's steps under which one of two probes is rewarded, by at most 5 bisections
    o   ~ p_old(. | x, plan_k), the whole group;  A of its rewards
    L   = the clipped surrogate of p(o | x) / p_old(o | x, plan_k), dual clip 3, mean over tokens
          + 0.001 k3(p, initial) at the question without a plan

Where no group is without a reward this is GRPO. Steps are the non-empty lines of the column ``solution``.

Confidence: high (code). Conflict: a comment in its configuration says no dual clip (``delta=1e9``). The source's agents
act in several turns and show the first k reference actions. Not here: its guided second loss, and its other
ratio (both off by default). There is no teacher.
"""

from hsd.hindsight.context import extended
from hsd.methods.draw import Ask, Drawn, GroupView, Talk
from hsd.methods.method import Method

PROBES, BISECTIONS = 2, 5


def draw(view: GroupView) -> Talk:
    rollouts = view.group.rollouts
    steps = [line for line in (view.row["solution"] or "").splitlines() if line.strip()]
    if max(r.reward for r in rollouts) > 0.0 or not steps:
        return None

    def under(k: int) -> Ask:
        plan = view.settings["plan"].format(text="\n".join(steps[:k]))
        return Ask(extended(view.group.prompt, plan), scored=True)

    low, high, found = 1, len(steps), None
    for _ in range(BISECTIONS):
        if low > high:
            break
        k = (low + high) // 2
        probes = yield [under(k)] * PROBES
        if any(probe.reward > 0.0 for probe in probes):
            found, high = k, k - 1
        else:
            low = k + 1
    if found is None:
        return None
    replies = yield [under(found)] * len(rollouts)
    return Drawn(rollouts=dict(enumerate(replies)))


METHOD = Method(
    "actguide",
    draw=draw,
    needs=("solution",),
    settings={"plan": "\n\nFollow this plan:\n{text}"},
    defaults={
        "loss_type": "dapo",
        "scale_rewards": "group",
        "delta": 3.0,
        "reference_coef": 0.001,
        "reference_kl": "k3",
    },
)
