"""The demo from end to end on a tiny world: report, resume, and going on with more steps."""

import json
from dataclasses import replace

import pytest
from tiny_runs import SMALLER, TOKENIZER, qwen3
from transformers import AutoModelForCausalLM

from hsd.cli import demo
from hsd.cli.__main__ import main
from hsd.evaluate import Sampling
from hsd.json_files import read_json, read_jsonl
from hsd.tasks import small_world
from hsd.train.callbacks import load_metrics
from hsd.viewer.page import read_page


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The small world with a tiny model, eight questions and a verifier that it passes about half the time."""
    qwen3(0, **SMALLER).save_pretrained(tmp_path / "initial")
    TOKENIZER.save_pretrained(tmp_path / "initial")
    of_the_package = small_world.task

    def task(seed):
        whole = of_the_package(seed)
        settings = {"max_steps": 2, "save_steps": 1, "learning_rate": 1e-3, "per_device_train_batch_size": 8}
        return replace(
            whole,
            title="tiny world",
            model=lambda: str(tmp_path / "initial"),
            questions=whole.questions[:8],
            held_out=whole.held_out[:4],
            rewards=[lambda completion_ids, **kwargs: [float(ids[0] % 2) for ids in completion_ids]],
            sampling=Sampling(max_new_tokens=6),
            train=dict(whole.train) | settings | {"teacher": "ema", "reference_coef": 0.1, "use_cpu": True},
            eval_samples=2,
        )

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(small_world, "task", task)
    return tmp_path / "runs" / "small-seed0"


def test_runs_reports_and_goes_on(tiny, capsys):
    assert main(["demo", "small", "--against", "grpo", "hsd"]) == 0  # itself is no other method
    printed = capsys.readouterr().out
    assert printed.startswith("--against: hsd is the run's own method, and is trained once\ntiny world\n")
    assert "# tiny world" in printed and "| success [95 % interval] |" in printed and "step 2/2" in printed
    for word in ("report  runs/small-seed0/report.md", "model   runs/small-seed0/model", "hsd eval runs/small-seed0"):
        assert word in printed.split("# tiny world")[1]
    files = {"report.md", "report.json", "metrics.jsonl", "credit.json", "training.png", "config.yaml", "run.json"}
    files |= {"credit-after-2.json", "methods.png", "grpo", "before.jsonl", "after-2.jsonl"}
    assert files <= {p.name for p in tiny.iterdir()} and not (tiny / "hsd").exists()
    AutoModelForCausalLM.from_pretrained(tiny / "model")
    assert "The first reply to each question: " in printed and "Loading weights" not in "".join(capsys.readouterr())
    rows = list(read_jsonl(tiny / "after-2.jsonl"))
    assert len(rows) == 8 and sum(row["reward"] for row in rows) / 8 == read_json(tiny / "after-2.json")["mean"]
    assert json.loads((tiny / "report.json").read_text())["methods"].keys() == {"hsd", "grpo"}
    assert read_json(tiny / "grpo" / "run.json")["train.method"] == "grpo"
    page = read_page(tiny / "credit.html")
    assert list(page) == ["before training", "after 2 steps"]
    assert page["before training"]["groups"] == page["after 2 steps"]["groups"]

    before = (tiny / "before.json").read_text()
    assert main(["demo", "small", "--against", "--max-steps", "4"]) == 0  # goes on from step 2, alone
    assert [row["step"] for row in load_metrics(tiny / "metrics.jsonl")] == [1, 2, 3, 4]
    assert (tiny / "before.json").read_text() == before and (tiny / "after-4.json").exists()
    assert list(read_page(tiny / "credit.html")) == ["before training", "after 2 steps", "after 4 steps"]
    facts = json.loads((tiny / "report.json").read_text())
    assert facts["settings"]["steps"] == 4 and "methods" not in facts and facts["settings"]["teacher"] == "ema"
    files = {p: p.read_bytes() for p in tiny.rglob("*") if p.is_file()}
    capsys.readouterr()
    assert main(["demo", "small", "--max_steps", "3"]) == 2
    said = "max_steps: runs/small-seed0 holds a run of 4 steps, got 3; for a run of 3 steps beside it add --output_dir"
    assert said in capsys.readouterr().err
    assert files == {p: p.read_bytes() for p in tiny.rglob("*") if p.is_file()}
    assert main(["credit", str(tiny), "--questions", "2", "--rollouts", "4"]) == 0
    assert "tiny world" in capsys.readouterr().out


def test_a_finished_run_is_only_reported_again_and_another_run_is_refused(tiny, capsys, monkeypatch):
    monkeypatch.setattr(demo, "AGAINST", {})
    assert main(["demo", "small", "--max_steps", "1"]) == 0
    assert main(["demo", "small", "--max_steps", "1"]) == 0
    printed = capsys.readouterr().out
    assert "already has 1 step" in printed and "--against" not in printed
    assert [row["step"] for row in load_metrics(tiny / "metrics.jsonl")] == [1]
    assert main(["demo", "small", "--max_steps", "1", "--teacher", "live"]) == 2
    assert "--teacher: runs/small-seed0 holds a run with 'ema', got 'live'" in capsys.readouterr().err


def test_what_is_not_a_demo_is_named(capsys):
    assert main(["demo", "large"]) == 2
    assert "'small', 'additions', 'smollm2'" in capsys.readouterr().err
