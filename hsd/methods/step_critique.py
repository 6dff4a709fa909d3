"""StepAlignFB (arXiv 2606.11173): the teacher reads a critique that keeps the rollout's right steps and mends the
others.

    L = 1/|tokens| sum_{i,t} KL(q || p),  q shown a critique of rollout i, written from it and the reference solution

The writer copies right steps verbatim and rewrites the wrong and the missing ones only. G is 1 in the source, the
weights initial, T 1.1 on both sides. A rollout whose critique or solution is blank is left out.

Confidence: medium to high (second-hand, a structured summary). Conflict: D(p || q) is printed and the prose says
forward KL; ``divergence="reverse_kl"`` is the other. The source's critic is another model (32 B, greedy): ``writer_fn``
of the trainer. Without one the run's teacher writes, at the rollouts' temperature.
"""

from hsd.hindsight.context import Context
from hsd.hindsight.teacher_prompts import RolloutView, parts
from hsd.methods.draw import Ask, Drawn, GroupView, Talk
from hsd.methods.method import Method

ASK = (
    "\n\nA reference solution:\n{solution}\n\nAn attempt:\n{attempt}\n\nWrite the attempt again. Copy each step that "
    "is right word for word. Rewrite only steps that are wrong, and add those that are missing."
)


def draw(view: GroupView) -> Talk:
    solution = view.row["solution"] or ""
    if not solution.strip():
        return None
    replies = yield [Ask(view.ask("ask", solution=solution, attempt=text), who="teacher") for text in view.texts]
    return Drawn(notes={i: reply.text for i, reply in enumerate(replies)})


def contexts(view: RolloutView) -> list[Context]:
    shown = parts(critique=(view.note or "").strip())
    return [Context(shown)] if shown else []


METHOD = Method(
    "step_critique",
    contexts,
    draw=draw,
    needs=("solution",),
    settings={"ask": ASK},
    defaults={"teacher": "fixed", "loss_mean": "token", "kl_temperature": 1.1, "reference_coef": 0.0},
)
