"""PBSD (arXiv 2605.05040): the privileged teacher's answer is preferred to the student's own.

    L = mean over rollouts of -log sigmoid(beta (g(y+) - g(y-))),  g(y) = sum_t log p(y_t | x) - log q(y_t | x, c)

y- is the rollout and y+ is drawn from the run's teacher, behind the context c that q reads: the answer and the
column ``solution``. q is frozen at the initial weights. At p = q the loss is log 2.

Confidence: medium to high (paper, second-hand). ``method_args.beta`` is not published. 2606.09348 is another "PBSD". A
rollout whose y+ is empty is left out.
"""

from torch import Tensor
from torch.nn.functional import logsigmoid

from hsd.hindsight.context import Context
from hsd.hindsight.teacher_prompts import parts
from hsd.methods.draw import Ask, Drawn, GroupView, Row, Talk
from hsd.methods.method import REQUIRED, Method, nothing
from hsd.methods.term import Stats, Term


def draw(view: GroupView) -> Talk:
    context = Context(parts(answer=view.group.answer, demonstration=view.row["solution"]))
    replies = yield [Ask(view.group.prompt, context, "teacher")] * len(view.texts)
    shown = (context,)
    pairs = zip(view.group.rollouts, replies, strict=True)
    both = [[Row(r.token_ids, shown), Row(o.token_ids, shown)] if r.text.strip() else [] for o, r in pairs]
    return Drawn(rows=dict(enumerate(both)))


def loss(logps: Tensor, s: Stats) -> Tensor:
    gap = ((logps - s.teacher_logps) * s["mask"]).sum(-1, keepdim=True)
    better = s["slot"] == 0
    value = -logsigmoid(s.settings["beta"] * (gap[better] - gap[~better]))
    # The pair's loss on every token of both its rows: the mean over a row's tokens and then over rows is that of pairs.
    both = logps.new_zeros(better.shape).masked_scatter(better, value)
    return both.masked_scatter(~better, value).expand(logps.shape)


METHOD = Method(
    "pbsd",
    nothing,
    terms=(Term("sampled", loss, rows=True),),
    draw=draw,
    max_rows=2,
    needs=("solution",),
    settings={"beta": REQUIRED},
    defaults={"teacher": "fixed", "divergence_coef": 0.0, "policy_coef": 1.0, "reference_coef": 0.0},
)
