"""CCOPD (arXiv 2605.30251): a student that is told the task in parts learns from itself told all at once.

    L = mean over rollouts of mean_t KL(p(. | h, o_<t) || q(. | c, o_<t))

h, the student's ``prompt``, is a conversation in which the task comes in shards; c, the column ``full_prompt`` (text or
messages), asks it in one turn and replaces h for the teacher. Initial weights teach. The rollout is the final answer.
Where c is blank the rollout is left out.

Confidence: medium to high (second-hand). Prefixes are shared as far as the two prompts agree.
"""

from hsd.hindsight.context import Context
from hsd.hindsight.groups import last_user_text
from hsd.hindsight.teacher_prompts import RolloutView
from hsd.methods.method import Method


def contexts(view: RolloutView) -> list[Context]:
    full = view.row["full_prompt"]
    return [Context(question=full)] if last_user_text(full or "").strip() else []


METHOD = Method(
    "ccopd",
    contexts,
    needs=("full_prompt",),
    defaults={"teacher": "fixed", "divergence": "reverse_kl", "reference_coef": 0.0},
)
