"""The experiment's queue, plan, report, and one real run of two steps."""

import json
import math
import multiprocessing
import os
import time
from functools import partial
from pathlib import Path

import pytest
from transformers.utils import logging as transformers_logging

from benchmarks.small_world import __main__ as experiment
from benchmarks.small_world import before
from benchmarks.small_world import run as work
from benchmarks.small_world.plan import (
    ABLATIONS,
    BASE_ROW,
    CURES,
    FULL,
    LEAGUE,
    LONG_TEACHERS,
    MAIN,
    ON_ALL_SEEDS,
    QUICK,
    QUICK_CURES,
    Run,
    Scale,
    queue,
)
from benchmarks.small_world.queue import Job, drain
from benchmarks.small_world.results import coverage_bins, interval, paired
from hsd.methods import METHODS
from hsd.tasks import small_world


@pytest.fixture(autouse=True)
def verbosity():
    """The experiment quietens transformers for its whole process: TrainingArguments.disable_tqdm follows that."""
    before = transformers_logging.get_verbosity()
    yield
    transformers_logging.set_verbosity(before)


def note(path, text, result=None, status=None):
    """A job's work: leaves a line, and dies with ``status`` if there is one."""
    with path.open("a") as f:
        f.write(text + "\n")
    if status is not None:
        os._exit(status)
    return result or {}


def test_queue_runs_in_order_once_and_goes_on(tmp_path):
    lines, said = tmp_path / "lines", []
    jobs = [Job(k, {"of": k}, partial(note, lines, k, {"value": i})) for i, k in enumerate("abc")]
    assert drain(tmp_path, jobs[:2], 1, said.append) == []
    (tmp_path / "c.part").write_text('{"asked"')  # a killed run's
    assert drain(tmp_path, jobs, 1, said.append) == []
    assert lines.read_text().split() == ["a", "b", "c"]
    assert json.loads((tmp_path / "c.json").read_text()) == {"asked": {"of": "c"}, "value": 2}
    assert "2 of 3 runs are done" in said


def test_a_failed_job_stops_what_needs_it_and_nothing_else(tmp_path):
    lines, said = tmp_path / "lines", []
    jobs = [
        Job("warm", {}, partial(note, lines, "warm", status=3)),
        Job("needs", {}, partial(note, lines, "needs"), needs="warm"),
        Job("raises", {}, partial(note, tmp_path / "no" / "folder", "raises")),
        Job("free", {}, partial(note, lines, "free")),
    ]
    assert sorted(drain(tmp_path, jobs, 2, said.append)) == ["needs", "raises", "warm"]
    assert sorted(lines.read_text().split()) == ["free", "warm"]
    assert "FAILED needs: it needs warm" in said
    assert "FileNotFoundError" in (tmp_path / "logs" / "raises.log").read_text()
    jobs[0] = Job("warm", {}, partial(note, lines, "again"))
    jobs[2] = Job("raises", {}, partial(note, lines, "not"))
    assert drain(tmp_path, jobs, 2, said.append) == []
    assert lines.read_text().split()[2:].index("again") < lines.read_text().split()[2:].index("needs")


def sleeper(path):
    path.write_text(str(os.getpid()))
    time.sleep(60)


def test_a_killed_queue_takes_its_runs_with_it(tmp_path):
    jobs = [Job("sleeps", {}, partial(sleeper, tmp_path / "pid"))]
    queue = multiprocessing.get_context("fork").Process(target=drain, args=(tmp_path, jobs, 1, str))
    queue.start()
    until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    queue.kill()
    queue.join()
    until(lambda: not running(int((tmp_path / "pid").read_text())))


def until(holds):
    deadline = time.time() + 20
    while not holds():
        assert time.time() < deadline
        time.sleep(0.05)


def running(pid):
    try:
        return "Z" not in (Path("/proc") / str(pid) / "stat").read_text().split()[2]
    except FileNotFoundError:
        return False


def test_another_runs_result_is_refused(tmp_path):
    drain(tmp_path, [Job("a", {"steps": 1}, dict)], 1, str)
    with pytest.raises(ValueError, match=r"expected the result of .*2.*, got that of .*1.*--out"):
        drain(tmp_path, [Job("a", {"steps": 2}, dict)], 1, str)


def test_plan_has_every_method_and_ablation_for_its_seeds():
    runs = queue(FULL)
    assert len({run.key for run in runs}) == len(runs) and FULL.seeds >= 5
    mains = [run for run in runs if run.part == "main"]
    assert {(r.name, r.seed) for r in mains} == {(m, s) for m in MAIN for s in range(FULL.seeds)}
    assert {"grpo", "dr_grpo", "dapo", "opsd", "grpo+opsd", "sdpo", "hsd"} <= set(MAIN)
    assert len({r.options["teacher"] for r in mains if r.name in ("hsd", "opsd", "grpo+opsd")}) == 1
    # They need columns that are not here, or words that are not among the 21 tokens.
    texts = {name for name, method in METHODS.items() if method.needs or "ask" in method.settings}
    assert {*MAIN, *LEAGUE} == METHODS.keys() - texts
    assert {(r.name, r.seed) for r in runs if r.part == "league"} == {(m, s) for m in LEAGUE for s in range(FULL.seeds)}
    for part, names in (("long", LONG_TEACHERS), ("cures", CURES)):
        assert {(r.name, r.seed) for r in runs if r.part == part} == {(n, s) for n in names for s in range(3)}
        assert {r.steps for r in runs if r.part == part} == {300}
    quick = [r for r in queue(QUICK) if r.part == "cures"]
    assert [r.name for r in quick] == list(QUICK_CURES) and {r.seed for r in quick} == {0}
    for part, rows in ABLATIONS.items():
        assert BASE_ROW[part] not in rows
        seeds = FULL.seeds if part in ON_ALL_SEEDS else FULL.ablation_seeds
        assert {r.seed for r in runs if r.part == part} == set(range(seeds)), part
    assert {(r.name, r.seed) for r in runs if r.part == "slow"} <= {(r.name, r.seed) for r in mains}
    order = [("pilot", "main").index(r.part) if r.part in ("pilot", "main") else 2 for r in runs]
    assert order == sorted(order)
    assert {r.group_size for r in runs if r.part == "G"} == {4, 16}
    for run in runs:
        work.config(run, FULL, experiment.HERE)  # HSDConfig takes the options


def test_intervals():
    assert interval([0.5]).half is None
    five = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert five.mean == 3 and five.half == pytest.approx(2.776 * math.sqrt(2.5) / math.sqrt(5))
    assert "±" not in str(interval([0.1, 0.2])) and str(interval([0.1, 0.2, 0.3])) == "0.200 ± 0.248"
    a, b = ({s: {"final": {"mean": v}} for s, v in x.items()} for x in ({0: 0.9, 1: 0.8}, {1: 0.5, 2: 0.1}))
    gap = paired(a, b)
    assert gap is not None and gap.n == 1 and gap.mean == pytest.approx(0.3)
    with pytest.raises(ValueError, match="seeds, got 0"):
        interval([])


def test_coverage_bins_average_what_was_measured():
    steps = {"hsd/success_rate": [0.5, 0.55, 1.0], "hsd/coverage": [0.4, 0.3, 0.0]}
    runs = [{"run": {"group_size": 8}, "steps": steps}, {"run": {"group_size": 4}, "steps": steps}]
    (p, measured, formula, n), last = coverage_bins(runs, 8)
    assert (n, last[2:]) == (2, (0.0, 1)) and p == pytest.approx(0.525) and measured == pytest.approx(0.35)
    assert formula == pytest.approx((0.5 * (1 - 0.5**7) + 0.45 * (1 - 0.45**7)) / 2)


def fake_warm(folder, seed, steps, scale, terms):
    teachers = ("with_peer", "answer_only")
    credit = {
        "success": 0.4,
        "coverage": 0.5,
        "formula": 0.55,
        "failing_with_peer": 100,
        "median_tau": 16.0,
        "windows": [2, 4],
        "mass": {t: [0.7, 0.8] for t in teachers},
        "mean_abs": dict.fromkeys(teachers, 0.3),
        "at_tau": dict.fromkeys(teachers, 7.0),
    }
    share = {"mean": 0.4}
    after = {t: [1.0, 0.9] for t in (*teachers, "alone")}
    told = dict.fromkeys(teachers, 0.8)
    facts = {
        "validation": share,
        "final": share,
        "greedy": 0.9,
        "teacher_success": told,
        "credit": credit,
        "after_tau": after,
    }
    return facts | {"cpu_seconds": 2.0}


def fake_train(run, scale, warm, scratch):
    end = 0.5 + 0.01 * sorted({*MAIN, *LEAGUE}, key=lambda m: (m in LEAGUE, m)).index(run.method) + 0.1 * run.seed
    config = work.config(run, scale, scratch)
    return {
        "curve": [(2, 0.5), (4, end)],
        "final": {"mean": end},
        "steps": {"hsd/success_rate": [0.4, 0.6], "hsd/coverage": [0.5, 0.3], "hsd/kl": [0.1, 0.1]},
        "alarms": {"success": "step 4: success fell"} if run.options.get("teacher") == "live" else {},
        "settings": {name: getattr(config, name) for name in work.SETTINGS} | {"peer_rule": config.peer_rule},
        "train_cpu_seconds": 1.0,
        "cpu_seconds": 1.5,
    }


def test_experiment_from_the_command_line_to_the_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(before, "warm_start", fake_warm)
    monkeypatch.setattr(work, "train", fake_train)
    command = ["--quick", "--out", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    experiment.main(command)
    printed = capsys.readouterr().out
    n = len(queue(QUICK)) + 3  # and the warm starts
    assert f"0 of {n} runs are done" in printed and "FAILED" not in printed
    report = (tmp_path / "results" / "report.md").read_text()
    assert report in printed
    last = sorted(MAIN)[-1]
    assert f"Order here: {last}" in report and "| hsd | 1 | " in report and "sdpo | 1 | 0.570 | -" in report
    assert "| paper, OPSD | 7 | 13 |" in report and "| peer + answer | 70 | 80 | 0.300 | 7.000 |" in report
    assert "## The league" in report and "| vopd | 1 | " in report and "## Teachers over 4 steps" in report
    assert "## Cures of a live teacher over 4 steps" in report and "| subtract | 0 | 0.50 | " in report
    assert "step 4: success fell" in report and "| 0 | " in report and "Not run" not in report
    for picture in ("curves.png", "league.png", "coverage.png", "sweeps.png"):
        assert f"({picture})" in report and (tmp_path / "results" / picture).stat().st_size > 5_000
    facts = json.loads((tmp_path / "results" / "results.json").read_text())
    assert len(facts["runs"]) + len(facts["warm"]) == n and facts["missing"] == []

    (tmp_path / "runs" / "main-hsd-seed0.json").unlink()
    experiment.main([*command, "--report"])  # what is missing is said, and nothing is drawn without data
    assert "Not run, 1: main-hsd-seed0." in capsys.readouterr().out
    experiment.main(command)
    assert f"{n - 1} of {n} runs are done" in capsys.readouterr().out

    whole = ["--report", "--out", str(tmp_path / "none"), "--results", str(tmp_path / "none")]
    experiment.main(whole)
    printed = capsys.readouterr().out
    assert "league-brts-seed4" in printed and "long-" not in printed and "cures-" not in printed
    experiment.main([*whole, "--part", "long"])
    assert "long-live-seed2" in capsys.readouterr().out
    experiment.main([*command, "--report", "--part", "league", "main"])
    printed = capsys.readouterr().out
    assert "--part league main`" in printed and "(league.png)" in printed and "## Teachers over" not in printed
    with pytest.raises(SystemExit, match=r"--part: expected some of .*, got league nosuch"):
        experiment.main([*command, "--part", "league", "nosuch"])


def test_two_real_steps(tmp_path, monkeypatch):
    scale = Scale(1, 1, 2, 1, rollouts=8, eval_every=2, validation=4, final=4, credit_questions=2)
    # Half of all rollouts succeed, so that there are peers: two steps of warm start teach nobody to add.
    monkeypatch.setattr(small_world, "reward", lambda completions, **_: [float(i % 2) for i in range(len(completions))])
    warm = before.warm_start(tmp_path / "warm", 0, 2, scale)
    assert (
        set(warm["after_tau"]) == {"with_peer", "answer_only", "alone"}
        and set(warm["credit"]) >= {"success", "coverage", "formula"}
        and warm["final"]["questions"] == 4
    )
    curve, last = work.questions(0, scale)
    assert len(curve) == 4 and not {q["prompt"] for q in curve} & {q["prompt"] for q in last}
    run = Run("main", "hsd", 0, 2, 2, "hsd", dict(MAIN["hsd"]), group_size=4)
    found = json.loads(json.dumps(work.train(run, scale, tmp_path / "warm", tmp_path / "scratch")))
    assert [step for step, _ in found["curve"]] == [2] and len(found["steps"]["hsd/coverage"]) == 2
    assert found["settings"]["teacher"] == "fixed" and found["cpu_seconds"] > found["train_cpu_seconds"] > 0
    assert found["steps"]["hsd/coverage"] == [0.5, 0.5]
    assert not (tmp_path / "scratch").exists()


@pytest.mark.parametrize(
    ("prefix", "rest", "expected"),
    [
        ("47+38=75", ";75+25=100;100+61=161;#161", (True, True)),
        ("47+38=75", ";75+25=110;110+61=171;#171", (True, False)),  # slips again
        ("47+38=75", ";85+25=110;110+61=171;#171", (False, False)),  # back to the peer's number
        ("47+38=85;85+25=12", "0;120+61=181;#181", (True, True)),
        ("47+38=85;85+25=12", "0;120+61=181;#171", (False, False)),
        ("47+38=85;85+25=12", "0;120+62=182;#182", (False, False)),  # another question
        ("47+38=85;85+25=12", "0;#120", (False, False)),
    ],
)
def test_what_goes_on_from_the_rollouts_number(prefix, rest, expected):
    assert before.follows("47+38+25+61=", prefix, rest) == expected
