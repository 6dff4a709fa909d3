"""Contexts and draws at their borders: unmixed groups, one rollout, blank texts, missing columns and verdicts."""

import random

import pytest
import torch
from recipe_cases import SUCCESS, B, Case
from tiny_runs import TOKENIZER

from hsd.hindsight.context import Context, ContextTemplate
from hsd.hindsight.groups import Group, Member, Rollout
from hsd.hindsight.teacher_prompts import RolloutView, TeacherPrompts, parts
from hsd.methods import METHODS
from hsd.methods.draw import Drawn, GroupView, Reply
from hsd.methods.method import REQUIRED, demonstrate
from hsd.methods.state import RunningMoments
from hsd.tasks.task import success_of
from hsd.train.config import HSDConfig

COLUMNS = ("solution", "demonstration", "full_prompt", "translation", "rubric", "hints", "trajectory")
BLANK = dict.fromkeys(COLUMNS)  # a data set has the columns and this row has none of them


def group_of(*rewards, answer="7"):
    """A reward of None is no verdict."""
    rollouts = [Rollout((5, 6 + i), 0.0 if r is None else r, scored=r is not None) for i, r in enumerate(rewards)]
    return Group("1+6=", answer, tuple(rollouts))


def view_of(group, i, method="hsd", row=BLANK, **changes):
    settings = {name: 1.0 if v is REQUIRED else v for name, v in METHODS[method].settings.items()}
    made = METHODS[method].state
    options = {"show_answer": True, "fallback": "answer"} | METHODS[method].defaults
    given = {
        "peer": next(iter(group.success_peers(i)), None),
        "feedback": None,
        "show_answer": options["show_answer"],
        "fallback": options["fallback"],
        "settings": settings | {"max_completion_length": 8},
        "state": made() if made else None,
    }
    return RolloutView(Member(group, i, 0), row, **given | changes)


def drawn(method, group, row=BLANK, reply="", settings=None, state=None, step=0):
    """What the draw of a group leaves and what it asked, where every reply is the same text."""
    view = view_of(group, 0, method)
    texts = [str(r.token_ids[1]) for r in group.rollouts]
    pieces = lambda i: [str(t) for t in group.rollouts[i].token_ids]  # noqa: E731
    state = view.state if state is None else state
    feedback = [None] * len(texts)
    made = GroupView(
        group,
        row,
        texts,
        pieces,
        feedback,
        random.Random(0),
        {**view.settings, **(settings or {})},
        state,
        step=step,
    )
    talk, asked = METHODS[method].draw(made), []
    try:
        asks = next(talk)
        while True:
            asked += asks
            asks = talk.send([Reply(reply, (5,) if reply else (), reward=0.0) for _ in asks])
    except StopIteration as end:
        return end.value or Drawn(), asked


GROUPS = {"one": (0.0,), "one right": (1.0,), "right": (1.0,) * 3, "wrong": (0.0,) * 3, "unscored": (None,) * 3}


@pytest.mark.parametrize("rewards", [*GROUPS.values(), (1.0, None, 0.0)], ids=[*GROUPS, "each"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_every_group_without_columns(method, rewards):
    group, spec = group_of(*rewards), METHODS[method]
    notes = drawn(method, group)[0].notes if spec.draw and method != "dapo" else {}
    for i in range(len(rewards)):
        if spec.contexts is not None:
            assert len(spec.contexts(view_of(group, i, method, note=notes.get(i)))) <= spec.max_contexts


@pytest.mark.parametrize("method", [n for n, m in METHODS.items() if m.draw and n not in ("dapo", "npo", "actguide")])
def test_a_missing_column_is_not_asked_about(method):
    _, asked = drawn(method, group_of(0.0, 0.0), reply="so")
    assert not any("None" in str(ask.prompt) for ask in asked)


@pytest.mark.parametrize("method", ["stable_opd", "plan_reference"])
@pytest.mark.parametrize(("solution", "rows"), [(None, 0), (" ", 0), ("1+6=7", 1)])
def test_a_gold_row_needs_a_gold_solution(method, solution, rows):
    found, _ = drawn(method, group_of(0.0, 0.0), {**BLANK, "solution": solution}, "so")
    assert sum(map(len, found.rows.values())) == rows


@pytest.mark.parametrize(("full", "shown"), [(None, 0), ("", 0), (" ", 0), ("1+6=", 1)])
def test_ccopd_leaves_out_what_has_no_full_prompt(full, shown):
    view = view_of(group_of(0.0, 1.0), 0, "ccopd", {**BLANK, "full_prompt": full})
    assert len(METHODS["ccopd"].contexts(view)) == shown
    messages = view_of(group_of(0.0), 0, "ccopd", {"full_prompt": [{"role": "user", "content": full or ""}]})
    assert len(METHODS["ccopd"].contexts(messages)) == shown


@pytest.mark.parametrize("hints", ["7", ["7", None]])
def test_hints_are_a_list_of_texts(hints):
    with pytest.raises(TypeError, match=r"^hints: expected a list of texts, got "):
        METHODS["sgsd"].contexts(view_of(group_of(0.0), 0, "sgsd", {"hints": hints}))
    shown = METHODS["sgsd"].contexts(view_of(group_of(0.0), 0, "sgsd", {"hints": ["7", " "]}))
    assert shown == [Context(parts(hint="7"))]


# -- fallbacks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("blank", "says"), [("", "1"), (" \n", "1"), ((), (3,)), (None, "1")])
@pytest.mark.parametrize(
    ("fallback", "expected"),
    [("mask", []), ("answer", [parts(answer="7")]), ("solution", [parts(answer="7", demonstration="s")])],
)
def test_a_blank_demonstration_takes_the_fallback(blank, says, fallback, expected):
    view = view_of(group_of(0.0, 1.0), 0, row={"solution": "s"}, fallback=fallback)
    assert [c.parts for c in demonstrate(view, blank)] == expected
    assert [c.parts for c in demonstrate(view, says)] == [parts(answer="7", demonstration=says)]


@pytest.mark.parametrize("fallback", ["mask", "answer", "solution"])
def test_a_blank_peer_is_none(fallback):
    """A success that says nothing but its end token: its context is that of a rollout without a peer."""
    template = ContextTemplate("[{answer}|{demonstration}]", "[{answer}]")

    def made(peer):
        prompts = TeacherPrompts(METHODS["hsd"].contexts, TOKENIZER, lambda q: template, fallback=fallback)
        rollouts = tuple(Rollout(tuple(TOKENIZER(t)["input_ids"]), r) for t, r in (("9", 0.0), (peer, 1.0)))
        ((prompt,),) = prompts.make(
            [Member(Group("1+6=", "7", rollouts), 0, 0)], [{"solution": "1+6"}], [None], generation=0
        )
        return TOKENIZER.decode(prompt.context.prompt_ids), prompt.peer, prompt.tau

    added = {"mask": "", "answer": "[7]", "solution": "[7|1+6]"}[fallback]
    assert made("$") == (f"1+6={added}", None, None)
    assert made("7") == ("1+6=[7|7]", 1, 0)


@pytest.mark.parametrize(("blank", "parts_of_mopd", "count"), [
    (None, {"demonstration", "failure"}, 2),
    (1, {"failure"}, 0),
    (2, {"demonstration"}, 0),
])  # fmt: skip
def test_a_blank_peer_is_left_out_where_a_method_draws_its_own(blank, parts_of_mopd, count):
    """Rollout 1 is the other success, rollout 2 the failure."""
    group = group_of(1.0, 1.0, 0.0)
    kept = lambda ids: () if blank is not None and ids == group.rollouts[blank].token_ids else ids  # noqa: E731
    (mopd,) = METHODS["mopd"].contexts(view_of(group, 0, "mopd", shown=kept, show_answer=False))
    assert {kind for kind, _ in mopd.parts} == parts_of_mopd
    assert len(METHODS["rlcsd"].contexts(view_of(group, 0, "rlcsd", shown=kept))) == count


def test_antisd_shows_a_peer_else_the_solution_else_the_answer():
    def shown(*rewards, row=BLANK, **changes):
        found = METHODS["antisd"].contexts(view_of(group_of(*rewards, **changes), 0, "antisd", row))
        return [dict(c.parts) for c in found]

    row = {"solution": "1+6=7"}
    assert shown(0.0, 1.0, row=row) == [{"demonstration": (5, 7), "verdict": "incorrect"}]
    assert shown(1.0, 0.0, row=row) == [{"demonstration": "1+6=7", "verdict": "correct"}]
    assert shown(1.0, 0.0) == [{"answer": "7", "verdict": "correct"}]
    assert shown(None, 1.0) == [{"demonstration": (5, 7)}]
    assert shown(1.0, 0.0, answer=" ") == []
    asked = view_of(group_of(0.0, 1.0), 0, "antisd", show_answer=True)
    assert dict(METHODS["antisd"].contexts(asked)[0].parts)["answer"] == "7"


# -- no verdict --------------------------------------------------------------------------------------------------------


def test_a_rollout_without_a_verdict_is_neither():
    group = group_of(1.0, None, 0.0)
    assert (group.successes, group.failures, group.success_rate, group.is_mixed) == ([0], [2], 0.5, True)
    none, right = group_of(None, None), group_of(1.0, None)
    assert (none.success_rate, none.is_mixed, right.success_rate, right.is_mixed) == (0.0, False, 1.0, False)


@pytest.mark.parametrize(("reward", "shown"), [(0.0, True), (None, False)])
def test_what_has_no_verdict_is_shown_as_no_failure(reward, shown):
    group = group_of(1.0, 1.0, reward)
    failing = METHODS["mopd"].contexts(view_of(group, 0, "mopd"))
    assert ("failure" in dict(failing[0].parts)) is shown
    assert bool(METHODS["rlcsd"].contexts(view_of(group, 0, "rlcsd"))) is shown
    assert bool(METHODS["ssopd"].contexts(view_of(group, 2, "ssopd"))) is shown
    assert len(drawn("opcod", group, reply="so")[1]) == shown
    kinds = drawn("trace", group, reply="0", settings={"most": 1.0})[0].marks
    assert (sorted(kinds["key"]), sorted(kinds["error"])) == ([0, 1], [2] if shown else [])


def test_egrsd_gives_no_advantage_without_a_verdict():
    whole, some = Case("egrsd"), Case("egrsd", scored=torch.arange(B) < B - 1)
    assert whole.advantages.abs().min() > 0 and whole.state.count == B
    assert some.advantages[-1] == 0 and some.advantages[:-1].abs().min() > 0
    assert some.state.count == B - 1 and not SUCCESS[-1] and some.state.mean > whole.state.mean


def test_moments_of_nothing_stay():
    moments = RunningMoments()
    moments.update(torch.zeros(0))
    assert (moments.count, moments.mean, moments.std) == (0.0, 0.0, 0.0)
    moments.update(torch.tensor([1.0, 3.0]))
    moments.update(torch.zeros(0))
    assert (moments.count, moments.mean, moments.std) == (2.0, 2.0, 1.0)


# -- settings and rewards ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "given", "said"),
    [
        ("rlrt", {"e": "0.5"}, r"e: expected a number, got '0.5'"),
        ("rlrt", {"e": True}, r"e: expected a number, got True"),
        ("npo", {"gate": None}, r"gate: expected a number, got None"),
        ("antisd", {"verdict": 1}, r"verdict: expected True or False, got 1"),
        ("opcod", {"ask": 3}, r"ask: expected a text, got 3"),
        ("opcod", {"ask": "{atempt}"}, r"ask: expected fields among \['attempt'\], got \['atempt'\]"),
        ("opcod", {"ask": "{attempt"}, r"ask: expected a str.format template, got '\{attempt'"),
    ],
)
def test_a_setting_is_of_the_kind_of_its_default(method, given, said, tmp_path):
    with pytest.raises(ValueError, match=rf"^method_args\.{said}"):
        HSDConfig(str(tmp_path), method=method, method_args=given, bf16=False, use_cpu=True)


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("rlrt", {"e": 1}),
        ("npo", {"gate": 0.5}),
        ("antisd", {"verdict": False}),
        ("opcod", {"ask": "Why?"}),
        ("trace", {"separator": "{"}),  # no template
    ],
)
def test_a_setting_of_that_kind_is_taken(method, given, tmp_path):
    config = HSDConfig(str(tmp_path), method=method, method_args=given, bf16=False, use_cpu=True)
    assert given.items() <= config.settings.items()


def test_a_choice_is_one_of_its_words():
    view = view_of(group_of(0.0, 1.0), 0, "mopd", settings={"failure": "never"})
    with pytest.raises(ValueError, match=r"^method_args.failure: expected 'always' or 'fallback', got 'never'"):
        METHODS["mopd"].contexts(view)
    with pytest.raises(ValueError, match=r"^method_args.which: expected 'success' or 'all', got 'each'"):
        drawn("mixed_policy", group_of(1.0), settings={"which": "each"})
    assert drawn("mixed_policy", group_of(1.0, 0.0), reply="so", settings={"which": "all"})[0].rows.keys() == {0, 1}


@pytest.mark.parametrize(("least", "reward", "right"), [(1.0, 0.99999994, 1.0), (1.0, 0.9999, 0.0), (0.9, 0.9, 1.0)])
def test_an_evaluation_counts_successes_as_training_does(least, reward, right):
    successes = success_of([lambda **columns: [reward]], None, least)
    assert successes() == [right] == [float(len(Group("q", "a", (Rollout((1,), reward),), least).successes))]


# -- texts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "most", "span"),
    [
        ("0, 2", 4, {0, 2}),
        ("2 1 0", 3, {2, 0}),  # step 1 would make four tokens
        ("1", 1, set()),
        ("9", 9, set()),  # no such step
        ("1" * 5000 + " 0", 9, {0}),  # more digits than Python makes an integer of
        ("1234567890", 9, set()),
    ],
)
def test_the_steps_that_a_reply_marks(reply, most, span):
    tokens = (1, 9, 1, 1, 9, 1)  # 9 ends a step
    group = Group("1+6=", "7", (Rollout(tokens, 1.0),))
    found, _ = drawn("trace", group, reply=reply, settings={"most": most / 6, "separator": "9"})
    steps = [0, 0, 1, 1, 1, 2]
    assert found.marks["key"] == ({0: [float(s in span) for s in steps]} if span else {})


@pytest.mark.parametrize(("step", "asks"), [(0, 1), (39, 1), (40, 0), (400, 0)])
def test_nothing_is_marked_where_the_marks_have_faded(step, asks):
    found, asked = drawn("trace", group_of(1.0), reply="0", settings={"most": 1.0}, step=step)
    assert len(asked) == asks and bool(found.marks["key"]) is bool(asks)


@pytest.mark.parametrize("method", ["opcod", "resd"])
def test_a_kept_success_is_shown_as_rollouts_are(method):
    """Without its thinking where `strip_thinking` says so, also steps later."""
    group, state = group_of(1.0, 0.0), METHODS[method].state()
    drawn(method, group, state=state)
    later = group_of(0.0, 0.0)
    note = drawn(method, later, reply="so", state=state)[0].notes[0]
    for shown in (lambda ids: ids, lambda ids: ids[1:]):
        found = dict(METHODS[method].contexts(view_of(later, 0, method, note=note, shown=shown))[0].parts)
        assert list(found["demonstration"]) == list(shown(group.rollouts[0].token_ids))
