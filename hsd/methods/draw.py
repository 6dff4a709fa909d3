"""What a method draws after the rollouts are scored: texts that a model writes, other rollouts, and extra rows.

A draw is a generator over one scored group. It yields lists of `Ask` and is sent the list of their `Reply`; what it
returns is a `Drawn`. The groups of a step are asked in rounds, a batch each, and all ranks run all generators::

    def draw(view):
        (reply,) = yield [Ask(question)]
        return Drawn(notes={0: reply.text})

The model is not in reach, and chance is ``view.rng``: a draw is a function of the group, the replies and the state.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from hsd.hindsight.context import Content, Context, extended
from hsd.hindsight.groups import Group, Prompt


@dataclass(frozen=True)
class Ask:
    """One text that is wanted.

    Args:
        prompt: What the writer reads. A rollout that replaces another one may be drawn under a hint.
        context: Beside the prompt, in the words in which a teacher is shown it.
        who: "policy", or the "teacher" with the weights that the run's teacher has; a ``writer_fn`` of the trainer
            stands in for both where the text is not scored.
        given: This text is the reply, and nothing is sampled.
        scored: Whether the run's rewards judge it, as an answer to ``row``, by default the group's.
        secret: Whether it must not give the group's answer away: such a text ``leaks``, and the alarm counts it.
    """

    prompt: Prompt
    context: Context | None = None
    who: Literal["policy", "teacher"] = "policy"
    given: str | None = None
    scored: bool = False
    row: Mapping[str, Any] | None = None
    secret: bool = False


@dataclass(frozen=True)
class Reply:
    text: str
    token_ids: tuple[int, ...]
    prompt_ids: tuple[int, ...] | None = None  # that it was sampled behind; None for a given text
    scores: tuple[float, ...] = ()  # of each reward function; NaN is no verdict
    reward: float = 0.0  # their weighted sum
    leaks: bool = False


@dataclass(frozen=True)
class Row:
    """A sequence that is no rollout, behind the group's question: what the terms with ``rows=True`` read.

    A text gets the end token. ``contexts`` are its teacher's, by default the question alone. The row's losses are
    averaged over its tokens, times ``weight``, and then over all rows of the step.
    """

    completion: Content
    contexts: tuple[Context, ...] = ()
    weight: float = 1.0


@dataclass(frozen=True)
class Drawn:
    """What a draw leaves, by the rollout's index in its group.

    Args:
        notes: `hsd.hindsight.teacher_prompts.RolloutView.note`, for the teacher's contexts.
        marks: Columns of `hsd.methods.term.Stats`: a number for each token of a rollout, 0 where nothing is said.
        rollouts: Scored replies that take the place of rollouts. Importance ratios are to the policy behind the prompt
            that they were sampled behind; a given text has a ratio of 1.
        rows: Extra rows, `Method.max_rows` a rollout at most.
        row: Another row of the data set, where all rollouts are replaced by answers to it.
    """

    notes: Mapping[int, Any] = field(default_factory=dict)
    marks: Mapping[str, Mapping[int, Sequence[float]]] = field(default_factory=dict)
    rollouts: Mapping[int, Reply] = field(default_factory=dict)
    rows: Mapping[int, Sequence[Row]] = field(default_factory=dict)
    row: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class GroupView:
    """All that a draw may use of one group."""

    group: Group
    row: Mapping[str, Any]  # of the data set
    texts: Sequence[str]  # of the rollouts, without special tokens
    pieces: Callable[[int], list[str]]  # a rollout's tokens, each as a text
    feedback: Sequence[str | None]  # of the environment, on each rollout
    rng: random.Random
    settings: Mapping[str, Any] = field(default_factory=dict)  # method_args
    state: Any = None
    spare: Callable[[], Mapping[str, Any]] = dict  # a row of the data set, at random
    step: int = 0  # the optimizer step of the generation

    def ask(self, setting: str, **fields: Any) -> Prompt:
        """The question with what ``settings[setting]`` says, a str.format template, at its end."""
        words = self.settings[setting].format(**fields)
        return extended(self.group.prompt, words)

    @property
    def shortest_success(self) -> int | None:
        rollouts = self.group.rollouts
        return min(self.group.successes, key=lambda j: (len(rollouts[j].token_ids), j), default=None)


Talk = Generator[list[Ask], list[Reply], Drawn | None]
Draw = Callable[[GroupView], Talk]


# Beside an answer these make another word or number of it: 5 is neither in 2.5 nor in 1,500, 5/6 or x5, and neither in
# .5 nor in -5, but in 10-5.
_BEFORE = r"(?<!\w)(?<!\d[.,/])(?:(?=\D)|(?<!^[-.])(?<![\s(\[{=:,$][-.]))"
_AFTER = r"(?!\w)(?![.,/]\d)"


def _in_one_spelling(text: str) -> str:
    """1,500.50 as 1500.5, 5.0 as 5, a minus as a hyphen, and a fraction in LaTeX with a slash."""
    text = re.sub(r"\\[dt]?frac\{(\w+)\}\{(\w+)\}", r"\1/\2", text.replace("\N{MINUS SIGN}", "-"))
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    return re.sub(r"(?<=\d)(?:\.0+|(\.\d*[1-9])0+)(?!\.?\d)", r"\1", text)


def gives_away(text: str, answers: Any) -> bool:
    """Whether the answer, or one of a list of accepted ones, stands in the text, as a word or number of its own."""
    accepted = [str(a).strip() for a in (answers if isinstance(answers, list) else [answers]) if a is not None]
    spelt = [re.escape(_in_one_spelling(a)) for a in accepted if a]
    return any(re.search(_BEFORE + a + _AFTER, _in_one_spelling(text)) is not None for a in spelt)


@dataclass(frozen=True)
class Outcome:
    drawn: list[Drawn]  # of each group
    log: list[tuple[int, Ask, Reply]]  # group, what was asked, what came
    dropped: int  # groups that went without, for the cap

    @property
    def notes(self) -> dict[tuple[int, int], Any]:
        """By group and index in it."""
        return {(n, i): note for n, drawn in enumerate(self.drawn) for i, note in drawn.notes.items()}


def converse(
    talks: Sequence[Talk], answer: Callable[[list[tuple[int, Ask]], int], Sequence[Reply]], cap: int
) -> Outcome:
    """Run the groups' draws to their ends, a round at a time. ``answer(asked, round)`` replies to (group, ask) pairs.

    A group whose asks would be more than ``cap`` of the step is dropped, with what it was told before.
    """
    drawn, log, dropped = [Drawn()] * len(talks), [], 0
    told: dict[int, list[Reply] | None] = dict.fromkeys(range(len(talks)))
    for number in range(cap + 1):  # a round without an ask changes nothing: there are no more rounds than asks
        batch: list[tuple[int, Ask]] = []
        for n, replies in told.items():
            try:
                asks = next(talks[n]) if replies is None else talks[n].send(replies)
            except StopIteration as end:
                drawn[n] = end.value or Drawn()
                continue
            if len(log) + len(batch) + len(asks) > cap or not asks:
                talks[n].close()
                dropped += 1
                continue
            batch += [(n, a) for a in asks]
        if not batch:
            break
        replies = answer(batch, number)
        log += [(n, ask, reply) for (n, ask), reply in zip(batch, replies, strict=True)]
        told = {n: [r for (m, _), r in zip(batch, replies, strict=True) if m == n] for n, _ in batch}
    return Outcome(drawn, log, dropped)
