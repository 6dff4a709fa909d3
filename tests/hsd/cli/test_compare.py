"""`hsd compare` on made-up runs: means, best steps, alarms, differences and the picture."""

import json
import math

import pytest
import yaml

from hsd.cli.__main__ import main
from hsd.cli.compare import moving_mean, short_names


@pytest.fixture
def runs(tmp_path):
    def write(name, success, config=None, report=None, **columns):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        rows = [{"step": i + 1, "hsd/success_rate": s} for i, s in enumerate(success)]
        for key, values in columns.items():
            for row, value in zip(rows, values, strict=True):
                row[key] = value
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if config:
            (folder / "config.yaml").write_text(yaml.safe_dump(config))
        if report:
            (folder / "report.json").write_text(json.dumps(report))
        return str(folder)

    return write


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_line_a_run(runs, tmp_path, capsys):
    one = {"model": {"path": "m"}, "train": {"learning_rate": 1e-5, "teacher": "live", "output_dir": "x"}}
    two = {"model": {"path": "m"}, "train": {"learning_rate": 1e-5, "teacher": "fixed", "output_dir": "y"}}
    sizes = {"questions": 4, "samples": 1, "truncated": 0.0, "mean_length": 9.0}
    after = {"after": {"mean": 0.5, "low": 0.4, "high": 0.625} | sizes, "settings": {"steps": 5}}
    a = runs("a", [0.9, 0.1, 0.2, 0.4, 0.6], one, after, step_time=[1.0, 2.0, 2.0, 2.0, 99.0])  # the machine stalls
    b = runs("b", [0.0, 0.5, 0.5, 0.1], two, alarms=[{}, {}, {"success": "fell"}, {}])
    png = tmp_path / "deep" / "curves.png"
    assert main(["compare", a, b, "--window", "2", "--png", str(png)]) == 0
    lines = capsys.readouterr().out.splitlines()
    head, first, second = (cells(line) for line in (lines[0], lines[2], lines[3]))
    row = dict(zip(head, first, strict=True))
    assert row["run"] == "a" and row["steps"] == "5" and row["success, last"] == "0.5"
    assert row["success, best"] == "0.5 at 2"  # the first full window: a single step of 0.9 is no mean of two
    assert row["held out [95 %]"] == "0.500 [0.400, 0.625]" and row["s/step"] == "2" and row["alarms"] == "none"
    row = dict(zip(head, second, strict=True))
    assert row["success, best"] == "0.5 at 3" and row["alarms"] == "success at 3"
    assert row["held out [95 %]"] == "-" and row["KL"] == "-"
    assert "train.teacher: a live, b fixed" in lines
    assert not any("learning_rate" in line or "output_dir" in line or "model.path" in line for line in lines)
    assert png.read_bytes().startswith(b"\x89PNG") and png.stat().st_size > 5000


def test_held_out_success_is_found_wherever_the_run_has_it(runs, tmp_path, capsys):
    def put(folder, file, value):
        (path := tmp_path / folder / file).parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))

    sizes = {"questions": 4, "samples": 1, "truncated": 0.0, "mean_length": 9.0}
    of_demo = {"mean": 0.5, "low": 0.4, "high": 0.625} | sizes
    of_eval = {"pass@1": 0.25, "interval": [0.125, 0.375], "rows": 9, "rows_of_the_subset": 9}
    in_training = [{"step": 2, "eval_loss": 1.0, "eval_hsd/success_rate": 0.75}]
    folders = [
        runs(name, [0.1, 0.2, 0.3]) for name in ("none", "demo", "eval", "part", "training", "all", "older", "own")
    ]
    put("demo", "after-3.json", of_demo)
    put("demo", "after-2.json", of_demo | {"mean": 0.1})
    put("eval", "eval-3/held-out-questions/result.json", of_eval)
    put("eval", "eval-3/gsm8k/result.json", of_eval | {"pass@1": 0.9})
    put("part", "eval-3/held-out-questions/result.json", of_eval | {"rows": 4})  # --limit
    for name in ("training", "all"):
        put(name, "held_out.jsonl", in_training[0])
    put("all", "eval-2/held-out-questions/result.json", of_eval)
    put("all", "after-2.json", of_demo)
    put("older", "report.json", {"after": of_demo, "settings": {"steps": 2}})
    put("own", "after-3.json", of_demo)
    (tmp_path / "own" / "config.yaml").write_text("data: {path: x.jsonl, held_out: 0}")
    assert main(["compare", *folders, "--png", str(tmp_path / "x.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    column = cells(lines[0]).index("held out [95 %]")
    found = {row[0]: row[column] for row in map(cells, lines[2 : 2 + len(folders)])}
    assert found == {
        "none": "-",
        "demo": "0.500 [0.400, 0.625]",
        "eval": "0.250 [0.125, 0.375]",
        "part": "-",
        "training": "0.750 at 2",
        "all": "0.500 [0.400, 0.625] at 2",
        "older": "0.500 [0.400, 0.625] at 2",
        "own": "-",  # measured on the training questions
    }


def test_a_setting_that_a_method_does_not_use_has_no_value(runs, tmp_path, capsys):
    def train(method, **settings):
        return {"train": {"method": method, "teacher": "live", "jsd_beta": 0.5, "epsilon": 0.2} | settings}

    a = runs("a", [0.5], train("hsd", teacher="fixed"))
    b = runs("b", [0.5], train("grpo", epsilon=0.1))
    c = runs("c", [0.5], train("opsd", teacher="fixed"))
    assert main(["compare", a, b, c, "--png", str(tmp_path / "x.png")]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("train.")]
    assert lines == [
        "train.epsilon: a —, b 0.1, c —",
        "train.method: a hsd, b grpo, c opsd",
        "train.teacher: a fixed, b —, c fixed",
    ]
    assert main(["compare", a, b, "--png", str(tmp_path / "a" / "metrics.jsonl" / "x.png")]) == 2
    assert "--png: expected a file in a folder, got" in capsys.readouterr().err


def test_one_run_and_more_runs_than_colours(runs, tmp_path, capsys):
    folders = [runs(f"r{i}", [0.1 * i] * 3) for i in range(12)]
    assert main(["compare", folders[0], "--png", str(tmp_path / "one.png")]) == 0
    assert main(["compare", *folders, "--png", str(tmp_path / "all.png")]) == 0
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("| r")]) == 1 + 12 + 2


def test_what_cannot_be_compared_is_named(runs, tmp_path, capsys):
    empty = runs("empty", [])
    good = runs("good", [0.5])
    evaluated = tmp_path / "eval"
    evaluated.mkdir()
    (evaluated / "results.json").write_text("[]")
    for words, said in (
        ([str(evaluated)], "results.md"),
        ([str(evaluated / "results.json")], "results.md"),
        ([str(tmp_path / "nowhere")], "nowhere"),
        ([empty], "metrics.jsonl"),
        ([good, good], "different folders"),
        ([good, "--window", "0"], "--window"),
    ):
        assert main(["compare", *words, "--png", str(tmp_path / "x.png")]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("config.yaml", "a: [", "expected YAML"),
        ("config.yaml", "[1]", "expected sections task, model, data, reward, train, got [1]"),
        ("report.json", "{", "expected a JSON object"),
        ("after-7.json", '{"mean": 0.5}', "expected a success with its interval, got {'mean': 0.5}"),
        (
            "eval-3/held-out-questions/result.json",
            '{"interval": [0.1, 0.2], "rows": 4, "rows_of_the_subset": 4}',
            "expected pass@1 with its interval",
        ),
        ("report.json", '{"after": [1]}', "after: expected a success with its interval, got [1]"),
        ("report.json", '{"after": {"mean": "x", "low": 0, "high": 1}}', "after: expected a success with its interval"),
        ("metrics.jsonl", '{"step": 1}\n{"st\n{"step": 3}\n', "line 2: expected a JSON object with a step"),
        ("metrics.jsonl", '{"step": 1, "hsd/kl": "x"}\n', "step 1: hsd/kl: expected a number, got 'x'"),
        ("metrics.jsonl", '{"step": 1, "alarms": ["x"]}\n', "step 1: alarms: expected an object, got ['x']"),
    ],
)
def test_a_broken_file_of_a_run_is_named(runs, tmp_path, capsys, file, text, said):
    folder = runs("a", [0.5])
    (tmp_path / "a" / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "a" / file).write_text(text)
    assert main(["compare", folder, "--png", str(tmp_path / "x.png")]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "a" / file) in error and said in error


def test_keys_of_settings_may_be_numbers(runs, tmp_path):
    assert main(["compare", runs("a", [0.5], config={"x": {1: 2}}), "--png", str(tmp_path / "x.svg")]) == 0


def test_a_picture_of_an_unknown_kind_is_refused_before_anything_is_read(tmp_path, capsys):
    for name in ("x.jpgg", "x"):
        assert main(["compare", "nowhere", "--png", str(tmp_path / name)]) == 2
        assert "--png: expected a file that ends in .png, .pdf, .svg, got" in capsys.readouterr().err


def test_names_are_as_short_as_they_can_be(tmp_path):
    assert short_names([tmp_path / "x" / "run", tmp_path / "y" / "run"]) == ["x/run", "y/run"]
    assert short_names([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]


def test_means_pass_over_what_was_not_measured():
    means = moving_mean([{"k": 1.0}, {"k": None}, {}, {"k": math.nan}, {"k": 3.0}], "k", 2)
    assert means[:2] == [1.0, 1.0] and all(map(math.isnan, means[2:4])) and means[4] == 3.0
