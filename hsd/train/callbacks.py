"""Callbacks of a run: a line per step, metrics.jsonl, alarms, and a clean stop on Ctrl-C."""

from __future__ import annotations

import json
import signal
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ProgressCallback, TrainerState

from hsd.json_files import append_jsonl, write_jsonl
from hsd.train.alarms import alarms
from hsd.train.generations import questions_of, steps_of_a_generation

STEP_COLUMNS = {
    "loss": "loss",
    "kl": "hsd/kl",
    "success": "hsd/success_rate",
    "teacher's": "hsd/teacher_success",
    "coverage": "hsd/coverage",
    "|A| at tau": "hsd/credit_at_tau",
    "mass(8)": "hsd/credit_mass_8",
    "entropy": "hsd/student_entropy",
    "length": "completions/mean_length",
    "s": "step_time",
}


def time_cells(logs: Mapping[str, Any]) -> list[str]:
    """The seconds of a step by part, and the sampled tokens a second; none where they were not measured."""
    parts = {
        key.removeprefix("time/").removesuffix("_s").replace("_", " "): seconds
        for key, seconds in logs.items()
        if key.startswith("time/") and not key.endswith("per_s")
    }
    if not parts:
        return []
    speed = logs.get("time/sampled_tokens_per_s")
    told = " + ".join(f"{name} {seconds:.2g}" for name, seconds in parts.items())
    return [f"({told})"] + ([f"{speed:.3g} tokens/s"] if speed is not None else [])


def meaning_of(logs: Mapping[str, Any], teacher: str) -> str | None:
    """What the success of the first measured step says about the steps to come; None where it was not measured."""
    own, shown = logs.get("hsd/success_rate"), logs.get("hsd/teacher_success")
    if own is None or shown is None or own != own:
        return None
    told = f"success of the student {own:.2f}, of replies sampled from the teacher's contexts {shown:.2f}"
    if shown <= own:
        return f"{told}: this teacher has nothing to teach; other words of the context, or another one, may"
    if teacher == "fixed":
        return f"{told}: about the most that the divergence from a fixed teacher can give, and no forecast"
    return told


class StepLine(ProgressCallback):
    """A progress bar with one short line per logged step, instead of the whole dictionary.

    Its speed and the time that is left are of the steps of this process: a resumed run has done the others elsewhere.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.training_bar = tqdm(total=state.max_steps, initial=state.global_step, smoothing=0, dynamic_ncols=True)
        self.current_step = state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None or not logs:
            return
        if (success := logs.get("eval_hsd/success_rate")) is not None:
            self.training_bar.write(
                f"step {state.global_step}/{state.max_steps}  success on held-out questions {success:.3g}"
            )
        if "loss" not in logs:
            return
        cells = [f"{name} {logs[key]:.3g}" for name, key in STEP_COLUMNS.items() if logs.get(key) is not None]
        cells += time_cells(logs)
        self.training_bar.write(f"step {state.global_step}/{state.max_steps}  " + "  ".join(cells))


TEXTS = "texts.jsonl"  # what the model wrote for a method's draw
ROLLOUTS = "rollouts.jsonl"
HELD_OUT = "held_out.jsonl"  # evaluations during training


class RunFiles(TrainerCallback):
    """Appends every logged step to ``metrics.jsonl`` and names a collapse when the metrics show one.

    On resume, lines after the checkpoint's step are dropped, so the file reads like that of an uninterrupted run.
    """

    def __init__(self, folder: Path, teacher: str = ""):
        self.path, self.held_out = folder / "metrics.jsonl", folder / HELD_OUT
        self.others = (folder / TEXTS, folder / ROLLOUTS, self.held_out)
        self.teacher = teacher
        self.raised: dict[str, str] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        self.history = _cut(self.path, state.global_step)
        self.raised = {name: text for row in self.history for name, text in row.get("alarms", {}).items()}
        for path in self.others:
            if path.exists():
                _cut(path, state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "eval_loss" in logs and state.is_world_process_zero:
            self._evaluated({"step": state.global_step, **logs})
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        row = {"step": state.global_step, **logs}
        if not any("hsd/teacher_success" in earlier for earlier in self.history) and (
            said := meaning_of(logs, self.teacher)
        ):
            print(f"step {state.global_step}: {said}", flush=True)
        self.history.append(row)
        new = {k: v for k, v in alarms(self.history, questions_of(args)).items() if k not in self.raised}
        if new:
            row["alarms"] = new
            for sentence in new.values():
                print(f"ALARM at step {state.global_step}: {sentence}", flush=True)
        self.raised |= new
        append_jsonl(self.path, [row])

    def _evaluated(self, row: dict[str, Any]) -> None:
        # A resumed run with eval_on_start evaluates its checkpoint once more.
        if row["step"] not in (earlier["step"] for earlier in load_metrics(self.held_out)):
            append_jsonl(self.held_out, [row])


def _cut(path: Path, step: int) -> list[dict[str, Any]]:
    """Leave out of a file the rows after ``step``; those that are left."""
    rows = [row for row in load_metrics(path) if row["step"] <= step]
    write_jsonl(path, rows)
    return rows


class StopOnSignal(TrainerCallback):
    """The first Ctrl-C or SIGTERM ends the run after the current step, with a checkpoint; a second Ctrl-C at once.

    A second SIGTERM changes nothing: a scheduler's reaches a rank twice, once by itself and once through the launcher.
    All ranks stop after the same step, also where the signal reached one alone: a rank that went on would wait for
    the others for ever. Where a generation serves several steps, the run stops after the last of them: its rollouts are
    not in a checkpoint. ``signal`` is the number that stopped this run, or None.
    """

    def __init__(self):
        self.signal: int | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.signal = None
        self.before = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)}

    def on_train_end(self, args, state, control, **kwargs):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def on_step_end(self, args, state, control, **kwargs):
        self.signal = _largest(self.signal, args)
        if self.signal is not None and state.global_step % steps_of_a_generation(args) == 0:
            control.should_save = control.should_training_stop = True

    def _stop(self, number, frame):
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is None:
            print("\nStopping after this step; run the same command again to resume.", flush=True)
            self.signal = number


def warn_of_lost_rollouts(checkpoint: Path, args) -> None:
    """Warn where a run that resumes from ``checkpoint`` differs from an uninterrupted one."""
    period = steps_of_a_generation(args)
    step = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).global_step
    if step % period:
        warnings.warn(
            f"resume_from_checkpoint: one generation serves {period} steps and step {step} is not its last; its "
            "rollouts are lost, and the run goes on with new ones, other than an uninterrupted one would",
            stacklevel=3,
        )


def _largest(number: int | None, args) -> int | None:
    """The largest of all ranks' signal numbers; None where no rank has one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return number
    shared = torch.tensor(number or 0, device=args.device)
    torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
    return int(shared) or None


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end: trainer_state.json is its last file."""
    whole = [p.parent for p in folder.glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=lambda p: int(p.name.removeprefix("checkpoint-")), default=None)


def load_metrics(path: Path) -> list[dict]:
    """Rows of a metrics file; a half-written last line, from a killed run, is left out.

    Raises ValueError with the line's number for any other line that is not an object with a ``step``.
    """
    if not path.exists():
        return []
    rows, lines = [], path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            if number == len(lines):
                break
            row = None
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            shown = line[:80].decode(errors="replace")
            raise ValueError(f"{path}, line {number}: expected a JSON object with a step, got {shown!r}")
        rows.append(row)
    return rows
