"""What a run leaves behind: metrics.jsonl across a resume, alarms once, the step line, and a clean stop."""

import json
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from tiny_runs import QUIET, SMALLER, TOKENIZER, half, qwen3
from transformers import TrainerCallback, TrainerControl, TrainerState

from hsd.hindsight.context import ContextTemplate
from hsd.tasks import small_world
from hsd.train.callbacks import (
    RunFiles,
    StepLine,
    StopOnSignal,
    last_checkpoint,
    load_metrics,
    meaning_of,
    time_cells,
)
from hsd.train.config import HSDConfig
from hsd.train.trainer import HSDTrainer


def begin(callback: TrainerCallback, step: int = 0) -> None:
    callback.on_train_begin(None, TrainerState(global_step=step, max_steps=50), TrainerControl())


def log(callback: TrainerCallback, step: int, **logs) -> None:
    callback.on_log(None, TrainerState(global_step=step, max_steps=50), TrainerControl(), logs=logs)


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_run_files_appends_the_logs_of_steps(tmp_path):
    files = RunFiles(tmp_path)
    begin(files)
    log(files, 1, loss=0.5, reward=1.0)
    log(files, 1, eval_loss=3.0)
    log(files, 2, loss=0.25)
    files.on_log(None, TrainerState(global_step=2), TrainerControl(), logs=None)
    log(files, 2, train_runtime=1.0)
    assert load_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 0.5, "reward": 1.0},
        {"step": 2, "loss": 0.25},
    ]
    log(files, 1, eval_loss=4.0)  # again, on resume
    assert load_metrics(tmp_path / "held_out.jsonl") == [{"step": 1, "eval_loss": 3.0}]
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.jsonl", "held_out.jsonl"}


def test_run_files_starts_over_with_a_fresh_run(tmp_path):
    for _ in range(2):
        files = RunFiles(tmp_path)
        begin(files)
        assert steps(tmp_path) == []
        log(files, 1, loss=0.5)
    assert steps(tmp_path) == [1]


def test_resume_drops_the_steps_after_the_checkpoint(tmp_path):
    first = RunFiles(tmp_path)
    begin(first)
    for step in range(1, 6):
        log(first, step, loss=1.0)
    second = RunFiles(tmp_path)
    begin(second, step=3)
    assert steps(tmp_path) == [1, 2, 3]
    log(second, 4, loss=2.0)
    assert steps(tmp_path) == [1, 2, 3, 4]
    assert [row["loss"] for row in load_metrics(tmp_path / "metrics.jsonl")] == [1.0, 1.0, 1.0, 2.0]


def test_a_half_written_last_line_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert load_metrics(path) == []
    path.write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": NaN}\n{"step": 3, "lo')
    assert [row["step"] for row in load_metrics(path)] == [1, 2]
    files = RunFiles(tmp_path)
    begin(files, step=2)
    log(files, 3, loss=0.1)
    assert steps(tmp_path) == [1, 2, 3]  # the new line does not continue the broken one


@pytest.mark.parametrize("line", ['{"step": 2, "lo', "", "[2]", '{"loss": 0.5}', '{"step": "2"}', "\xff"])
def test_a_broken_line_before_others_is_named_and_nothing_is_lost(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    text = '{"step": 1, "loss": 0.5}\n' + line + '\n{"step": 3, "loss": 0.5}\n'
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: expected a JSON object with a step, got"):
        begin(RunFiles(tmp_path), step=3)
    assert path.read_text(encoding="latin-1") == text


def collapse(files: RunFiles, first: int, last: int) -> None:
    for step in range(first, last + 1):
        log(files, step, loss=1.0, **{"hsd/success_rate": 0.6 if step <= 8 else 0.0})


def test_an_alarm_is_named_once(tmp_path, capsys):
    files = RunFiles(tmp_path)
    begin(files)
    collapse(files, 1, 20)
    out = capsys.readouterr().out
    assert out.count("ALARM") == 1
    assert "ALARM at step 11: success fell from 0.600" in out  # three of five steps at 0
    rows = load_metrics(tmp_path / "metrics.jsonl")
    assert [(r["step"], list(r["alarms"])) for r in rows if "alarms" in r] == [(11, ["success"])]


def test_an_alarm_is_named_once_across_a_resume(tmp_path, capsys):
    files = RunFiles(tmp_path)
    begin(files)
    collapse(files, 1, 14)
    resumed = RunFiles(tmp_path)
    begin(resumed, step=12)
    collapse(resumed, 13, 16)
    assert capsys.readouterr().out.count("ALARM") == 1
    again = RunFiles(tmp_path)  # from before the alarm: it comes again, at the same step
    begin(again, step=10)
    collapse(again, 11, 16)
    assert "ALARM at step 11" in capsys.readouterr().out
    rows = load_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in rows] == list(range(1, 17))
    assert [r["step"] for r in rows if "alarms" in r] == [11]


@pytest.fixture
def handlers():
    """Handlers of the test's own, put back whatever happens."""

    def mine(number, frame):
        raise AssertionError("the signal reached the handler from before")

    signals = (signal.SIGINT, signal.SIGTERM)
    before = {s: signal.signal(s, mine) for s in signals}
    yield {s: mine for s in signals}
    for s, handler in before.items():
        signal.signal(s, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_stops_after_the_step_and_a_second_ctrl_c_at_once(number, handlers, capsys):
    stop, state, control = StopOnSignal(), TrainerState(), TrainerControl()
    begin(stop)
    stop.on_step_end(None, state, control)
    assert not control.should_save and not control.should_training_stop
    signal.raise_signal(number)
    assert not control.should_training_stop  # the step is still on its way
    stop.on_step_end(None, state, control)
    assert control.should_save and control.should_training_stop
    assert capsys.readouterr().out.count("resume") == 1
    signal.raise_signal(signal.SIGTERM)  # a scheduler's, once more through the launcher
    assert stop.signal == number and capsys.readouterr().out == ""
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    stop.on_train_end(None, state, control)
    assert {s: signal.getsignal(s) for s in handlers} == handlers


def test_a_stop_does_not_outlive_its_run(handlers):
    stop = StopOnSignal()
    begin(stop)
    signal.raise_signal(signal.SIGINT)
    stop.on_train_end(None, TrainerState(), TrainerControl())
    begin(stop)
    control = TrainerControl()
    stop.on_step_end(None, TrainerState(), control)
    assert not control.should_training_stop
    stop.on_train_end(None, TrainerState(), control)
    assert {s: signal.getsignal(s) for s in handlers} == handlers


@pytest.mark.parametrize(
    ("accumulation", "generation", "iterations", "steps"), [(4, 4, 1, 1), (1, 4, 1, 4), (4, 4, 2, 2), (2, 3, 1, 3)]
)
def test_a_stop_waits_for_the_end_of_a_generation(accumulation, generation, iterations, steps, handlers):
    args = SimpleNamespace(
        gradient_accumulation_steps=accumulation, steps_per_generation=generation, num_iterations=iterations
    )
    stop = StopOnSignal()
    begin(stop)
    signal.raise_signal(signal.SIGTERM)
    stopped = []
    for step in range(1, 9):
        control = TrainerControl()
        stop.on_step_end(args, TrainerState(global_step=step), control)
        stopped += [step] if control.should_training_stop else []
    assert stopped == list(range(steps, 9, steps))
    stop.on_train_end(None, TrainerState(), TrainerControl())


def test_step_line_is_one_short_line(capsys):
    line = StepLine()
    log(line, 1, loss=0.5)  # before training there is no bar to write above
    begin(line)
    metrics = {"hsd/kl": 0.123456, "hsd/success_rate": 0.25, "hsd/coverage": None, "step_time": 2.0, "other": 7.0}
    log(line, 3, loss=1.5, **metrics)
    log(line, 3, eval_loss=9.0)
    line.on_train_end(None, TrainerState(), TrainerControl())
    written = [text for text in capsys.readouterr().out.splitlines() if text.strip()]
    assert written == ["step 3/50  loss 1.5  kl 0.123  success 0.25  s 2"]


def test_the_speed_of_a_resumed_run_is_that_of_its_own_steps(capsys, monkeypatch):
    line = StepLine()
    begin(line, step=40)
    bar = line.training_bar
    assert bar is not None
    monkeypatch.setattr(bar, "_time", lambda: bar.start_t + 12.0)
    line.on_step_end(None, TrainerState(global_step=42, max_steps=50), TrainerControl())
    shown = bar.format_meter(**bar.format_dict)
    assert "42/50" in shown and "00:12<00:48" in shown and "6.00s/it" in shown  # two steps in 12 s, eight to go
    line.on_train_end(None, TrainerState(), TrainerControl())


class Interrupt(TrainerCallback):
    """Ctrl-C while step ``at`` is on its way."""

    def __init__(self, at: int):
        self.at = at

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.at - 1:
            signal.raise_signal(signal.SIGINT)


def tiny_trainer(folder: Path, *callbacks: TrainerCallback) -> HSDTrainer:
    config = HSDConfig(
        str(folder),
        max_steps=5,
        save_steps=100,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=6,
        learning_rate=1e-3,
        teacher="fixed",
        **QUIET | {"save_strategy": "steps"},
    )
    return HSDTrainer(
        model=qwen3(**SMALLER, tie_word_embeddings=False),
        reward_funcs=half,
        args=config,
        train_dataset=Dataset.from_list(small_world.make_questions(8, seed=0)),
        processing_class=TOKENIZER,
        context_template=ContextTemplate(small_world.WITH_PEER, small_world.ANSWER_ONLY),
        callbacks=[StopOnSignal(), *callbacks],
    )


def test_an_interrupted_run_leaves_a_checkpoint_and_resumes(tmp_path, handlers):
    cut = tmp_path / "cut"
    first = tiny_trainer(cut, Interrupt(at=2))
    first.train()
    assert first.state.global_step == 2
    assert [p.name for p in cut.glob("checkpoint-*")] == ["checkpoint-2"]
    assert steps(cut) == [1, 2]
    assert {s: signal.getsignal(s) for s in handlers} == handlers

    second = tiny_trainer(cut)
    second.train(resume_from_checkpoint=str(cut / "checkpoint-2"))
    assert second.state.global_step == 5
    assert steps(cut) == [1, 2, 3, 4, 5]

    whole = tiny_trainer(tmp_path / "whole")
    whole.train()
    for key in ("loss", "hsd/success_rate", "hsd/kl"):
        logged = [[r[key] for r in load_metrics(p / "metrics.jsonl")] for p in (cut, tmp_path / "whole")]
        assert logged[0] == logged[1], key
    for a, b in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_last_whole_checkpoint(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step, whole in ((2, True), (10, True), (12, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if whole:
            (folder / "trainer_state.json").write_text("{}")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_the_time_of_a_step_names_its_parts_and_the_speed():
    logs = {"time/sampling_s": 2.5, "time/update_s": 1.0, "time/sampled_tokens_per_s": 104.4, "loss": 1.0}
    assert time_cells(logs) == ["(sampling 2.5 + update 1)", "104 tokens/s"]
    assert time_cells({"time/update_s": 1.0}) == ["(update 1)"]
    assert time_cells({"loss": 1.0}) == []


@pytest.mark.parametrize(
    "own, shown, teacher, said",
    [
        (0.1, 0.4, "fixed", "0.40: about the most"),
        (0.1, 0.4, "copy", "0.40"),
        (0.4, 0.4, "fixed", "nothing to teach"),
        (0.5, 0.4, "live", "nothing to teach"),
        (0.1, None, "fixed", None),
        (None, 0.4, "fixed", None),
        (float("nan"), 0.4, "fixed", None),
    ],
)
def test_what_the_teachers_success_means(own, shown, teacher, said):
    found = meaning_of({"hsd/success_rate": own, "hsd/teacher_success": shown}, teacher)
    assert found is None if said is None else said in str(found)


def test_the_meaning_is_printed_at_the_first_measured_step_alone(tmp_path, capsys):
    files = RunFiles(tmp_path, "fixed")
    begin(files)
    log(files, 1, loss=0.5, **{"hsd/success_rate": 0.1})
    for step in (2, 3):
        log(files, step, loss=0.5, **{"hsd/success_rate": 0.1, "hsd/teacher_success": 0.4})
    again = RunFiles(tmp_path, "fixed")
    begin(again, step=3)
    log(again, 4, loss=0.5, **{"hsd/success_rate": 0.1, "hsd/teacher_success": 0.4})
    said = [line for line in capsys.readouterr().out.splitlines() if "sampled from the teacher" in line]
    assert len(said) == 1 and said[0].startswith("step 2: success of the student 0.10")
