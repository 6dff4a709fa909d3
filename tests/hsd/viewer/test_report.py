"""A run's report on made-up measurements: the numbers it prints are those that were measured."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_runs import TOKENIZER, group
from transformers.trainer_utils import SchedulerType

from hsd.evaluate import Success
from hsd.hindsight.groups import Group
from hsd.tasks import small_world
from hsd.tasks.task import Evaluation
from hsd.train.callbacks import load_metrics
from hsd.viewer import report, summary
from hsd.viewer.measure import TokenCredit

BEFORE = Success(0.258, 0.221, 0.297, 512, 1, 0.0312, 32.51)
AFTER = Success(0.717, 0.678, 0.756, 512, 1, 0.0078, 33.94)
TASK = replace(
    small_world.task(0),
    title="a made-up task",
    questions=[{"prompt": "1+1=", "answer": "2"}],
    held_out=[{"prompt": "2+2=", "answer": "4"}],
)
COMMAND = "hsd demo small --seed 3 --max_steps 3"
SETTINGS = {"learning_rate": 1e-4, "teacher": "ema", "lr_scheduler_type": SchedulerType.LINEAR}
PICTURES = ["credit_profile.png", "credit_mass.png", "credit_silence.png", "coverage.png", "training.png"]


MIXED = group("12+34=", "46", **{"12+34=46;#46$": 1.0, "12+34=56;#56$": 0.0, "12+34": 0.0, "#46$": 1.0})
FAILED = group("7+8=", "15", **{"#14$": 0.0, "#16$": 0.0, "1$": 0.0, "2$": 0.0})


def measured(*taus: int | None) -> list[TokenCredit]:
    """Rollouts 1 and 2 of MIXED, the first group, against its rollout 0; 13 tokens and 5."""
    found = []
    for i, tau in zip((1, 2), taus, strict=True):
        n = len(MIXED.rollouts[i].token_ids)
        credit, answer_only = torch.zeros(n), torch.full((n,), 0.25)
        if i == 1:
            credit[6], credit[9], answer_only[6] = -3.0, 1.0, -0.75
        found.append(TokenCredit(0, i, 0, tau, credit, answer_only, credit.abs(), credit))
    return found


def save(path: Path, of: list[TokenCredit], groups: list[Group], again: list[Group] | None = None) -> None:
    path.write_text(json.dumps(summary.summarise(of, groups, again or groups, TOKENIZER)))


def metrics(folder: Path, **extra) -> None:
    rows = [{"step": i, "loss": 0.5 / i, "hsd/success_rate": 0.3, "hsd/credit_at_tau": None} for i in range(1, 4)]
    rows = [row | {"step_time": t} for row, t in zip(rows, (2.0, 4.0, 6.4), strict=True)]
    rows[-1] |= extra
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def write(folder: Path, task=TASK, *, later: dict | None = None, replies=((), ()), **others: report.End) -> str:
    before, after = (Evaluation(s, list(rows)) for s, rows in zip((BEFORE, AFTER), replies, strict=True))
    ends = {"hsd": report.End(load_metrics(folder / "metrics.jsonl"), after)} | others
    credits = {"before training": json.loads((folder / "credit.json").read_text())} | (later or {})
    text = report.write(folder, task, COMMAND, SETTINGS, before, ends, credits)
    assert (folder / "report.md").read_text() == text
    return text


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr(summary, "write_figures", lambda folder, credits: [])
    monkeypatch.setattr(report, "training_picture", lambda *args: [])


def cells(text: str, label: str) -> list[list[str]]:
    """The cells of every table row that opens with `label`."""
    rows = (re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("| "))
    return [[c.strip() for c in row[1:]] for row in rows if row[0].strip() == label]


def test_save_credit_keeps_coverage_and_credit(tmp_path):
    path = tmp_path / "credit.json"
    save(path, measured(6, None), [MIXED, FAILED])
    kept = json.loads(path.read_text())
    assert (kept["questions"], kept["group_size"], kept["failing_with_peer"]) == (2, 4, 2)
    assert kept["success"] == pytest.approx(0.25)
    assert kept["coverage"] == pytest.approx(2 / 8)  # the two failures of the group that has successes
    assert kept["success"] == 0.25
    assert kept["mixed_groups"] == 0.5
    assert kept["median_tau"] == 6
    assert kept["mean_abs"]["answer_only"] == pytest.approx((0.25 + 0.5 / 13 + 0.25) / 2)
    assert kept["mass"]["with_peer"] == pytest.approx([0.75, 1, 1, 1, 1])
    (example,) = kept["examples"]  # one for each question, and only where a rollout leaves its peer
    assert example == {
        "question": "12+34=",
        "answer": "46",
        "rollout": "12+34=>>56;#56",
        "peer": "12+34=>>46;#46",
        "credit": -3.0,
        "credit_answer_only": -0.75,
    }


@pytest.mark.parametrize("scored", [True, False])
def test_a_rollout_without_a_verdict_is_in_no_share(scored):
    """Of MIXED's four rollouts the third is a failure or has no verdict; FAILED has four failures."""
    rollouts = tuple(replace(r, scored=scored or i != 2) for i, r in enumerate(MIXED.rollouts))
    groups = [replace(MIXED, rollouts=rollouts), FAILED]
    kept = summary.summarise([], groups, groups, TOKENIZER)
    assert kept["success"] == 2 / (8 if scored else 7) and kept["unscored"] == (0 if scored else 1)
    assert kept["coverage"] == (2 / 8 if scored else 1 / 7)
    assert [b["success"] for b in kept["by_difficulty"]] == [0.0, 0.5 if scored else 2 / 3]
    assert ("Without a verdict and in no share: 1 of" in summary.lines(kept)[0]) is not scored


def test_chat_questions_are_shown_by_their_last_message(tmp_path):
    chat = Group([{"role": "user", "content": "12+34=\n?"}], "46", MIXED.rollouts)
    save(tmp_path / "credit.json", measured(6, None), [chat])
    (example,) = json.loads((tmp_path / "credit.json").read_text())["examples"]
    assert example["question"] == "12+34=\\n?"


def test_report_holds_the_numbers(tmp_path):
    save(tmp_path / "credit.json", measured(6, None), [MIXED, FAILED])
    metrics(tmp_path)
    text = write(tmp_path)
    assert text.startswith("# a made-up task\n")
    assert f"`{COMMAND}`" in text and "12 s in training steps" in text
    assert "teacher ema" in text and "learning_rate 0.0001" in text and "teacher fixed" not in text
    assert "512 held-out questions x 1" in text
    assert cells(text, "success [95 % interval]") == [["0.258 [0.221, 0.297]", "0.717 [0.678, 0.756]"]]
    assert cells(text, "truncated") == [["0.031", "0.008"]]
    assert cells(text, "mean length (tokens)") == [["32.5", "33.9"]]
    assert "success 0.250" in text and "2 failing rollouts with a peer" in text
    assert "Median divergence position: 6." in text
    assert cells(text, "mean \\|A\\| (nats) at t - tau") == [[str(o) for o in summary.PROFILE_ROWS]]
    profile, mass = cells(text, "peer + answer")
    at = dict(zip(summary.PROFILE_ROWS, profile, strict=True))
    assert (at[0], at[-1], at[1], at[-8]) == ("3.000", "0.000", "0.000", "-")  # tau is 6: no token 8 before it
    assert mass == ["75%", "100%", "100%", "100%", "100%"]
    profile, _ = cells(text, "answer only")
    assert dict(zip(summary.PROFILE_ROWS, profile, strict=True))[0] == "0.750"
    assert re.search(r"12\+34=>>56;#56 +A -3\.00[,;] answer only -0\.75\n", text)
    assert "No alarm was raised" in text and "lr_scheduler_type linear" in text
    for name in PICTURES:
        assert f"]({name})" in text
        assert (tmp_path / name).stat().st_size > 5000


def test_report_json_holds_the_same(tmp_path, no_pictures):
    save(tmp_path / "credit.json", measured(6, None), [MIXED])
    metrics(tmp_path)
    write(tmp_path)
    facts = json.loads((tmp_path / "report.json").read_text())
    assert facts["before"]["mean"] == 0.258 and facts["after"]["high"] == 0.756
    assert facts["settings"] == {"learning_rate": 1e-4, "teacher": "ema", "lr_scheduler_type": "linear", "steps": 3}
    assert facts["alarms"] == {} and facts["seconds"] == pytest.approx(12.4)
    assert facts["credit"]["before training"]["failing_with_peer"] == 2 and "methods" not in facts


def test_other_methods_stand_beside_the_run(tmp_path):
    save(tmp_path / "credit.json", measured(6, None), [MIXED])
    metrics(tmp_path)
    rows = [{"step": s, "learning_rate": 1e-4, "hsd/success_rate": 0.2, "step_time": 2.0} for s in (1, 2)]
    alarm = {"alarms": {"success": "success fell"}}
    text = write(tmp_path, grpo=report.End([rows[0], rows[1] | alarm], Evaluation(BEFORE, [])))
    assert cells(text, "**hsd**") == [["3", "-", "0.717 [0.678, 0.756]", "12", "none"]]
    assert cells(text, "grpo") == [["2", "0.0001", "0.258 [0.221, 0.297]", "4", "step 2: success fell"]]
    assert "No alarm was raised." in text and "](methods.png)" in text  # of the run itself
    assert (tmp_path / "methods.png").stat().st_size > 5000
    facts = json.loads((tmp_path / "report.json").read_text())
    assert facts["methods"]["grpo"] == {"after": asdict(BEFORE), "seconds": 4.0}


def test_a_row_of_several_steps_counts_as_many():
    rows = [{"step": 2, "step_time": 3.0}, {"step": 4, "step_time": None}, {"step": 5, "step_time": 1.5}]
    end = report.End(rows, Evaluation(AFTER, []))
    assert (end.steps, end.seconds) == (5, 7.5)


def test_replies_before_and_after_stand_side_by_side(tmp_path, no_pictures):
    def rows(*pairs):
        return [
            {"question": f"{n}+1=", "answer": str(n + 1), "reply": t, "reward": r} for n, (t, r) in enumerate(pairs)
        ]

    before = rows(("#1$", 0.7 + 0.2 + 0.1), ("#3", 0.0), ("", None), ("#0|`", 0.0))
    after = rows(("#1", 1.0), ("#2", 1.0), ("x\ny", 0.5), ("w" * 300, 0.0))
    save(tmp_path / "credit.json", [], [FAILED])
    metrics(tmp_path)
    text = write(tmp_path, replies=(before, after))
    counts = "1 wrong before and right after, 0 right before and wrong after, 2 wrong both times, 1 right both times."
    assert f"The first reply to each question: {counts}" in text
    assert cells(text, "`1+1=`") == [["`2`", "`#3`", "wrong", "`#2`", "right"]]
    assert cells(text, "`2+1=`") == [["`3`", "(empty)", "wrong", "`x\\ny`", "wrong"]]
    ((answer, old, _, new, _),) = cells(text, "`3+1=`")
    assert answer == "`4`" and old == "`` #0\\|` ``" and new == f"`{'w' * 100} … {'w' * 60}`"
    assert "The first reply" not in write(tmp_path, replies=(before, ()))  # a run whose start kept none
    several = [row for row in before for _ in range(2)]
    sampled_twice = Evaluation(replace(BEFORE, samples=2), several)
    assert "1 right both times" in "\n".join(report._replies_section(sampled_twice, Evaluation(AFTER, after), TASK))


def test_credit_after_training_stands_beside_that_before(tmp_path):
    save(tmp_path / "credit.json", measured(6, None), [MIXED, FAILED])
    save(tmp_path / "later.json", [], [MIXED])
    metrics(tmp_path)
    text = write(tmp_path, later={"after 3 steps": json.loads((tmp_path / "later.json").read_text())})
    assert "Before training, 2 questions" in text and "After 3 steps, 1 question" in text
    assert text.count("credit mass within") == 1
    with Image.open(tmp_path / "coverage.png") as both, Image.open(tmp_path / "credit_profile.png") as before:
        assert both.width > before.width  # after training there is no failure left whose credit could be drawn


def test_an_alarm_stands_in_the_report(tmp_path, no_pictures):
    save(tmp_path / "credit.json", measured(6, None), [MIXED])
    metrics(tmp_path, alarms={"success": "success fell from 0.500 at best to 0.010"})
    text = write(tmp_path)
    assert "ALARM, step 3: success fell from 0.500 at best to 0.010." in text
    assert "No alarm" not in text


def test_the_same_questions_for_training_and_evaluation_are_owned_up_to(tmp_path, no_pictures):
    save(tmp_path / "credit.json", [], [FAILED])
    metrics(tmp_path)
    text = write(tmp_path, replace(TASK, held_out=[]))
    assert "training questions (none is held out)" in text and "held-out" not in text


def test_no_failing_rollout_with_a_peer_is_said(tmp_path):
    save(tmp_path / "credit.json", [], [FAILED])
    metrics(tmp_path)
    text = write(tmp_path)
    assert "0 failing rollouts with a peer" in text
    assert "No failing rollout has a successful peer: there is no credit profile to show." in text
    assert not cells(text, "peer + answer")
    assert [name for name in PICTURES if (tmp_path / name).exists()] == ["coverage.png", "training.png"]


def test_failures_that_never_leave_their_peer(tmp_path):
    """Truncated rollouts that are prefixes of their peer have credit, but no divergence position to put it at."""
    save(tmp_path / "credit.json", measured(None, None), [MIXED])
    metrics(tmp_path)
    text = write(tmp_path)
    assert "2 failing rollouts with a peer" in text
    assert "No failing rollout leaves its peer: there is no credit profile to show." in text
    assert "nan" not in text
    drawn = ["credit_silence.png", "coverage.png", "training.png"]
    assert [name for name in PICTURES if (tmp_path / name).exists()] == drawn


def test_the_training_picture_has_what_was_measured(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(report, "plot_curves", lambda path, curves, xlabel: drawn.update(curves))
    steps = [{"step": 1, "hsd/success_rate": 0.5, "hsd/kl": None}, {"step": 2}]
    held_out = [{"step": 2, "eval_hsd/success_rate": 0.25}]
    assert report.training_picture(tmp_path, steps, held_out) == [tmp_path / "training.png"]
    assert repr(drawn) == "{'success': {'rollouts': ([1, 2], [0.5, nan]), 'held-out questions': ([2], [0.25])}}"
    drawn.clear()
    report.training_picture(tmp_path, [{"step": 1, "completions/mean_length": 3.0}], held_out)
    assert list(drawn) == ["success", "rollout length (tokens)"]
    assert report.training_picture(tmp_path, [{"step": 1, "loss": 0.0}]) == []


def test_without_metrics_there_is_no_training_picture(tmp_path):
    save(tmp_path / "credit.json", [], [FAILED])
    assert "training.png" not in write(tmp_path)
