"""The real model's plan and report, on made-up runs; the model itself is too large for a test."""

import json

import pytest

from benchmarks.real_model import report
from benchmarks.real_model.__main__ import jobs, parse
from benchmarks.real_model.credit import kind_of, table
from benchmarks.real_model.plan import BEST, ROWS, key
from benchmarks.real_model.run import config
from hsd.tasks import registered


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_every_row_is_a_configuration_and_says_what_was_expected(row, tmp_path):
    args = config(row, registered("additions", 1), 1, 3, tmp_path)
    assert (args.seed, args.max_steps, args.max_completion_length, args.temperature) == (1, 3, 12, 0.6)
    assert row.expected
    if row.method == "grpo":
        assert args.own_loss and args.policy_coef == 1.0
    else:
        assert args.policy_coef == row.options.get("policy_coef", 0.0)
        assert args.divergence_coef == row.options.get("divergence_coef", 1.0)
        assert args.teacher == row.options.get("teacher", "fixed")


def test_the_task_begins_with_the_best_row(tmp_path):
    assert BEST.items() <= dict(registered("additions", 0).config).items()


def test_keys_are_file_names_unlike_each_other():
    keys = [key(row.name, 0) for row in ROWS]
    assert len(set(keys)) == len(keys) and not any("," in k or " " in k or "/" in k for k in keys)


def test_jobs_are_the_chosen_rows_of_each_seed():
    found = [job.key for job in jobs(parse(["--rows", "start", "grpo", "--seeds", "1", "2"]))]
    assert found == ["start-seed1", "grpo-seed1", "start-seed2", "grpo-seed2"]


@pytest.mark.parametrize(
    "reply, form",
    [
        ("14 + 6 = 20.", 0),
        (" 14+6 is 9", 0),
        ("20 + 2 equals 22", 0),
        ("20", 1),
        ("20.", 1),
        ("The answer is 20", 2),
        ("14 + 6", 2),
        ("20 apples", 2),
        ("", 2),
    ],
)
def test_the_form_of_a_reply(reply, form):
    assert report.form_of(reply) == report.FORMS[form]


def reply(text, reward, tokens=5, ended=True):
    return {"question": "What is 1 + 2?", "reply": text, "tokens": tokens, "ended": ended, "reward": reward}


def test_forms_and_short_replies_are_counted():
    replies = [
        reply("1 + 2 = 3", 1.0),
        reply("1 + 2 = 4", 0.0),
        reply("3", 1.0, tokens=12),
        reply("3", 1.0, ended=False),
    ]
    assert report.forms(replies) == {
        report.FORMS[0]: (0.5, 0.5),
        report.FORMS[1]: (0.5, 1.0),
        report.FORMS[2]: (0.0, None),
    }
    assert report.among_short(replies) == (0.5, 2)
    assert report.among_short(replies[2:]) == (None, 0)


def test_the_report_has_a_line_a_run_and_names_what_was_not_run(tmp_path):
    held_out = {"mean": 0.5, "low": 0.1, "high": 0.9, "samples": 2, "questions": 1, "mean_length": 5.0}
    replies = [reply("1 + 2 = 3", 1.0), reply("4", 0.0)]
    steps = {"hsd/success_rate": [0.0, 0.5, 0.5, 1.0, 1.0], "hsd/teacher_success": [0.25, None, None, None, None]}
    for name, seed in (("start", 0), ("grpo", 0), ("hsd fixed", 0), ("hsd fixed", 1)):
        run = {"asked": {"name": name, "seed": seed}, "held_out": held_out, "replies": replies}
        if name != "start":
            run |= {"steps": steps, "cpu_seconds": [1.0, 2.0, 9.0, 2.0, 2.0], "alarms": {}}
        (tmp_path / f"{key(name, seed)}.json").write_text(json.dumps(run))
    report.write(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| hsd fixed | 1 | 0.60 | 0.25 |  | 2.0 |" in text
    assert "| grpo | 50 %, 1.00 | 50 %, 0.00 | 0 % |" in text
    missing = text.splitlines()[-1]
    assert "hsd copy 4" in missing and "grpo" not in missing
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_the_class_of_a_token_and_its_share_of_the_loss():
    kinds = [kind_of(*args, [9]) for args in ((0, 1, "The"), (0, 2, "14"), (3, 2, " 4"), (3, 3, " is"), (3, 9, "</s>"))]
    assert kinds == ["first token", "digit", "digit", "other words", "end"]
    rows = [
        {"kind": "digit", "context": "peer", "kl": 3.0, "share": 0.1},
        {"kind": "digit", "context": "peer", "kl": 1.0, "share": 0.1},
        {"kind": "end", "context": "answer_only", "kl": 4.0, "share": 0.1},
    ]
    found = table(rows)
    assert [(r["context"], r["kind"], r["tokens"], r["kl"]) for r in found] == [
        ("peer", "digit", 2, 2.0),
        ("answer_only", "end", 1, 4.0),
    ]
    assert [r["share_of_loss"] for r in found] == pytest.approx([0.5, 0.5])


def test_means_of_spans_take_every_step_once():
    assert report.by_span([1.0, 0.0]) == [0.5]
    assert report.by_span([1.0] * 4 + [0.0] * 4) == [1.0, 0.0]
    assert report.by_span([1.0] * 4 + [0.0] * 4 + [1.0]) == [1.0, 0.2]
    assert report.by_span([float(k) for k in range(60)])[0] == 2.5  # a tenth of 60


def test_a_gpus_seconds_are_wall_seconds():
    assert report.seconds({"cpu_seconds": [1.0]}) == [1.0] and report.seconds({"wall_seconds": [2.0]}) == [2.0]


def test_rows_of_a_task_are_its_own(capsys):
    assert {job.asked["task"] for job in jobs(parse(["--task", "chain_sum"]))} == {"chain_sum"}
    with pytest.raises(SystemExit):
        parse(["--task", "chain_sum", "--rows", "hsd live"])
    assert "--rows: expected rows among start, grpo, hsd fixed" in capsys.readouterr().err


def test_rows_are_compared_with_grpo_on_the_seeds_that_both_have():
    def run(mean, rates):
        return {"held_out": {"mean": mean}, "steps": {"hsd/success_rate": rates}}

    runs = {
        "grpo": {0: run(0.5, [0.0, 1.0]), 1: run(0.7, [1.0, 1.0]), 2: run(0.0, [0.0, 0.0])},
        "hsd fixed": {0: run(0.6, [0.0, 0.0]), 1: run(0.9, [0.5, 1.0]), 2: run(0.2, [0.0, 0.0]), 3: run(1, [1.0])},
        "opsd": {0: run(0.1, [0.0, 0.0])},  # one seed has no interval
    }
    lines = report.paired_table(runs, ["grpo", "hsd fixed", "opsd"]).splitlines()[2:]
    assert len(lines) == 1 and lines[0].startswith("| hsd fixed | 3 | 0.167 ± 0.143 | -0.250 ± 0.621 |")
    assert report.paired_table({"opsd": runs["opsd"]}, ["opsd"]) == ""
