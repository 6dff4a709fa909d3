"""OPCoD (arXiv 2606.14368) with one model: the teacher sees the question's earliest success and a critique of the
rollout.

    L = 1/|tokens| sum_{i,t} min(pi / pi_old, 2) JSD_0.5(p, q),  q shown an own success and a critique of rollout i

In the source two models tutor each other; here the EMA of the student (0.05) criticises itself, or ``writer_fn`` of the
trainer does. Critiques must not give the answer away: one that does is not shown, and the alarm counts it. Failures
alone are criticised. A rollout with neither is left out.

Confidence: medium (paper; no public code). Full vocabulary for its top 100 and tail (``kl_top_k=100``). Not here: the
tutor's silence while its validation gap exceeds 0.2, and its concept tags.
"""

from dataclasses import dataclass, field

from hsd.hindsight.context import Context
from hsd.hindsight.teacher_prompts import RolloutView, parts
from hsd.methods.draw import Ask, Drawn, GroupView, Talk
from hsd.methods.method import Method
from hsd.methods.state import Saved

ASK = (
    "\n\nAn attempt that fails:\n{attempt}\n\nName the step where it goes wrong and the idea that is missing. Do not "
    "give the answer."
)


@dataclass
class Successes(Saved):
    """The tokens of the first successful rollout of each question."""

    by_question: dict[str, list[int]] = field(default_factory=dict)


def draw(view: GroupView) -> Talk:
    wrong = view.group.failures
    replies = []
    if wrong:
        replies = yield [Ask(view.ask("ask", attempt=view.texts[i]), who="teacher", secret=True) for i in wrong]
    question, right = str(view.group.prompt), view.group.successes
    if right:
        view.state.by_question.setdefault(question, list(view.group.rollouts[right[0]].token_ids))
    earliest = view.state.by_question.get(question)
    said = {i: r.text for i, r in zip(wrong, replies, strict=True) if not r.leaks}
    return Drawn(notes={i: (earliest, said.get(i)) for i in range(len(view.texts))})


def contexts(view: RolloutView) -> list[Context]:
    earliest, critique = view.note or (None, None)
    shown = parts(demonstration=earliest and view.shown(earliest), critique=(critique or "").strip())
    return [Context(shown, cut=("critique", "demonstration"))] if shown else []


METHOD = Method(
    "opcod",
    contexts,
    draw=draw,
    state=Successes,
    settings={"ask": ASK},
    defaults={
        "teacher": "ema",
        "teacher_ema_rate": 0.05,
        "show_answer": False,
        "divergence": "jsd",
        "loss_mean": "token",
        "importance_cap": 2.0,
        "reference_coef": 0.0,
    },
)
