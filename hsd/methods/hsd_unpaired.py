"""HSD's control: a success of another question in the place of the peer. What HSD gains over it is the peer's content.

    HSD's loss, in which c_i = (a*, o+) with o+ a success of another group of the step, where HSD shows a peer

A control of ours, with HSD's words, settings and answer. A step without a success elsewhere shows the answer alone.
tau is that of the peer that HSD would show.
"""

from hsd.hindsight.context import Context
from hsd.hindsight.teacher_prompts import RolloutView
from hsd.methods.method import Method, demonstrate


def contexts(view: RolloutView) -> list[Context]:
    elsewhere = [r for number, rollouts in enumerate(view.groups) if number != view.member.number for r in rollouts]
    others = [r for r in elsewhere if view.group.accepts(r.reward)]
    shows_peer = view.peer is not None and others
    return demonstrate(view, view.shown(view.rng.choice(others).token_ids) if shows_peer else None)


METHOD = Method("hsd_unpaired", contexts, draws_peers=True)
