"""Mixed-Policy Distillation (arXiv 2605.08776) with one model: the teacher shortens successes, and both read the
rewrite.

    L = mean over rewrites y of 1/|y| sum_t KL(p(. | x, y_<t) || q(. | x, y_<t))

y is what the run's teacher, the initial policy, writes when it is asked to say a success of the group more briefly;
teacher and student read it behind the plain question. The rollouts themselves have no loss.

Confidence: medium (second-hand). The source's teacher is a larger model (8 B for 1.7 B) and rewrites each rollout; as
the initial policy is the student at the first step, the loss begins near 0 here. ``which`` is "success" (the shortest
of a group, once) or "all".
"""

from hsd.methods.draw import Ask, Drawn, GroupView, Row, Talk
from hsd.methods.method import Method, nothing
from hsd.methods.term import Term

ASK = "\n\nA solution:\n{attempt}\n\nWrite the same solution with as few words as possible."


def draw(view: GroupView) -> Talk:
    best, which = view.shortest_success, view.settings["which"]
    if which not in ("success", "all"):
        raise ValueError(f"method_args.which: expected 'success' or 'all', got {which!r}")
    some = range(len(view.texts)) if which == "all" else [] if best is None else [best]
    if not some:
        return None
    replies = yield [Ask(view.ask("ask", attempt=view.texts[i]), who="teacher") for i in some]
    return Drawn(rows={i: [Row(r.token_ids)] for i, r in zip(some, replies, strict=True) if r.text.strip()})


METHOD = Method(
    "mixed_policy",
    nothing,
    terms=(Term("divergence", rows=True),),
    draw=draw,
    max_rows=1,
    settings={"which": "success", "ask": ASK},
    defaults={"teacher": "fixed", "divergence": "reverse_kl", "reference_coef": 0.0},
)
