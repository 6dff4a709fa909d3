"""RCSD (arXiv 2606.19327): the teacher sees the answer, a rubric and its own short analysis of that rubric.

    L = 1/|tokens| sum_{i,t} sum_v min(q~(v) log(q~(v) / p~(v)), 0.05),  q~, p~ over q's top 20, renormalised

T is 1.2 on both sides; q reads question, answer, the column ``rubric`` and the analysis that the initial policy writes
of it, once a question. G is 1 in the source, 4,096 tokens, lr 5e-6. Initial weights teach.

Confidence: high (code). ``reason_first`` is on in its script. Not here: its option that masks the thinking tokens.
Where the rubric is blank the teacher reads the answer alone.
"""

from hsd.hindsight.context import Context
from hsd.hindsight.teacher_prompts import RolloutView, parts
from hsd.methods.draw import Ask, Drawn, GroupView, Talk
from hsd.methods.method import Method

ASK = (
    "\n\nReference answer: {answer}\n\nRubric:\n{rubric}\n\nBefore solving the problem, say in a few sentences what "
    "the rubric asks of a solution."
)


def draw(view: GroupView) -> Talk:
    rubric = view.row["rubric"] or ""
    if not view.settings["reason_first"] or not rubric.strip():
        return None
    words = view.ask("ask", answer=view.group.answer, rubric=rubric)
    (reply,) = yield [Ask(words, who="teacher")]
    return Drawn(notes=dict.fromkeys(range(len(view.texts)), reply.text))


def contexts(view: RolloutView) -> list[Context]:
    shown = parts(answer=view.answer, rubric=view.row["rubric"], analysis=(view.note or "").strip())
    return [Context(shown)] if shown else []


METHOD = Method(
    "rcsd",
    contexts,
    draw=draw,
    needs=("rubric",),
    settings={"reason_first": True, "ask": ASK},
    defaults={
        "teacher": "fixed",
        "kl_temperature": 1.2,
        "kl_clip": 0.05,
        "kl_top_k": 20,
        "kl_top_of": "teacher",
        "kl_rest": "renormalise",
        "loss_mean": "token",
        "reference_coef": 0.0,
    },
)
