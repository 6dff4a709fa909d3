"""Mixed-Policy Distillation (arXiv 2605.08776) with one model: the teacher shortens successes, and the student
learns the rewrite.

    L = mean over rewrites y of 1/|y| sum_t KL(p(. | x, y_<t) || q(. | x', y_<t))

y is what the run's teacher, the initial policy, writes behind x', the question with a success of the group and the wish
to say it more briefly. The student reads y behind the plain question x. The rollouts themselves have no loss.

Confidence: medium (second-hand). The source's teacher is a larger model (8 B for 1.7 B), rewrites each rollout, and
reads y behind x. Ours: x', for behind x the initial policy is the student, and neither would ever move. ``which`` is
"success" (the shortest of a group, once) or "all".
"""

from hsd.hindsight.context import Context
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
    asked = [view.ask("ask", attempt=view.texts[i]) for i in some]
    replies = yield [Ask(question, who="teacher") for question in asked]
    found = zip(some, asked, replies, strict=True)
    return Drawn(rows={i: [Row(r.token_ids, (Context(question=q),))] for i, q, r in found if r.text.strip()})


METHOD = Method(
    "mixed_policy",
    nothing,
    terms=(Term("divergence", rows=True),),
    draw=draw,
    max_rows=1,
    settings={"which": "success", "ask": ASK},
    defaults={"teacher": "fixed", "divergence": "reverse_kl", "reference_coef": 0.0},
)
