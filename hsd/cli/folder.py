"""The folder of a run: what is in it, which model is its newest, and which run may write to it.

``train.output_dir`` holds config.yaml, from which `hsd credit` and `hsd compare` load the settings; run.json, all that
makes the run what it is; metrics.jsonl, a line a step; rollouts.jsonl, some of its rollouts to read; held_out.jsonl,
evaluations during training; a checkpoint; at the end training.png and ``model/``. The checkpoint goes at the end,
unless ``save_total_limit`` is given.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import yaml
from trl.trainer.grpo_config import GRPOConfig

from hsd import files
from hsd.cli.prepare import Run, prepare
from hsd.cli.settings import load, parse
from hsd.json_files import read_json
from hsd.methods.state import GATE, STATE
from hsd.progress import counted
from hsd.tasks.files import title
from hsd.tasks.settings import Data
from hsd.tasks.task import Question, Task
from hsd.train.callbacks import last_checkpoint
from hsd.train.teachers import IN_CHECKPOINTS, INITIAL, frozen_file

# What may differ between the parts of one run: none of these changes a step.
FREE = ("output_dir", "max_steps", "save_steps", "save_total_limit", "save_strategy", "logging_steps", "report_to")
FREE += ("record_groups", "run_name", "disable_tqdm", "log_completions", "num_completions_to_print", "use_cpu")
# In a checkpoint beside the model.
OF_THE_NEXT_STEP = ("optimizer*", "scheduler.pt", "scaler.pt", "rng_state*", "pytorch_model_fsdp*", STATE, GATE)
OF_THE_NEXT_STEP += ("global_step*", "latest", "zero_to_fp32.py")  # DeepSpeed's
OF_THE_NEXT_STEP += tuple(frozen_file(Path(), name).name for name in IN_CHECKPOINTS)
CONFIG = "config.yaml"
IDENTITY = "run.json"
BEFORE = "before.json"  # success of the initial policy, where it was measured


def run_and_model(path: Path) -> tuple[Path, Path]:
    """A run's folder and its newest model, or, for the folder of a model in a run, that run and this model."""
    inside = not (path / CONFIG).exists() and (path.parent / CONFIG).exists()
    return (path.parent if inside else path), newest_model(path)


def find_run(written: Path | None, model: str, data: str | None, max_new_tokens: int | None) -> tuple[Run, Task]:
    """The run of a folder and its task, with ``model`` and, where they are given, the questions of ``data``.

    Without a run, ``data`` is asked as it stands and scored by the last number of the answer.
    """
    config = written / CONFIG if written else None
    if config and config.exists():
        settings = load(config)
        if data is not None:
            settings = replace(settings, data=Data(data, instruction=settings.data.instruction))
    elif data is not None:
        asked = {"path": data, "instruction": ""}
        train = {"max_completion_length": 512}
        settings = parse({"model": {"path": model}, "data": asked, "reward": "number", "train": train})
    else:
        raise ValueError("data: expected a file of questions, or a run of hsd train or hsd demo, got none")
    own_model = replace(settings, model=replace(settings.model, path=model, lora=None))
    run = prepare(own_model, "credit", source=str(config or data), check=True)
    task = run.task()
    length = max_new_tokens or task.sampling.max_new_tokens
    sampling = replace(task.sampling, max_new_tokens=length)
    return run, replace(task, title=title(settings, run.base), sampling=sampling)


def newest_model(run: Path) -> Path:
    """``RUN/model`` or the last whole checkpoint, whichever has more steps; else RUN itself where it is a model."""
    if not run.is_dir():
        raise ValueError(f"run: expected a folder, got {run}")
    found = [
        folder
        for folder in (run, last_checkpoint(run), run / "model")
        if folder is not None and any((folder / name).exists() for name in ("config.json", "adapter_config.json"))
    ]
    if not found:
        raise ValueError(f"run: expected a model, a checkpoint or config.json in {run}, got none")
    return max(reversed(found), key=steps_of)


def steps_done(run: Path) -> int:
    """The optimizer steps behind the newest model of a run's folder; 0 where it has none."""
    return max(map(steps_of, filter(None, (last_checkpoint(run), run / "model"))))


def steps_of(folder: Path) -> int:
    """The optimizer steps behind a saved model; 0 where it does not say."""
    path = folder / "trainer_state.json"
    return read_json(path).get("global_step", 0) if path.exists() else 0


def save_model_of(checkpoint: Path, model: Path) -> None:
    """The model of a checkpoint, without what only the next step needs, in place of an earlier one."""
    shutil.rmtree(model, ignore_errors=True)
    with files.replacing(model) as part:
        shutil.copytree(checkpoint, part, ignore=shutil.ignore_patterns(*OF_THE_NEXT_STEP))


def remove_checkpoints(run: Path) -> None:
    """Remove what only the next step of a run needs: three to four times the model's size."""
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    frozen_file(run, INITIAL).unlink(missing_ok=True)


def resolved(run: Run) -> dict[str, Any]:
    """All sections; of HSDConfig what was given, and HSD's own fields with their values."""
    inherited = {f.name: f.default for f in fields(GRPOConfig)}
    # Also those of GRPO's whose default is another one here.
    own = {f.name for f in fields(run.config) if f.name not in inherited or f.default != inherited[f.name]}
    keys = sorted({*run.settings.train, *(run.base.config if run.base else ()), *own, "output_dir", "seed"})
    return asdict(run.settings) | {"train": {key: getattr(run.config, key) for key in keys}}


def as_yaml(run: Run) -> str:
    return yaml.safe_dump(json.loads(json.dumps(resolved(run), default=str)), sort_keys=False)


def claim(run: Run, task: Task) -> None:
    """Write config.yaml and run.json, where `check_folder` lets the run have its folder."""
    asked = check_folder(run, task)
    for name, text in ((CONFIG, as_yaml(run)), (IDENTITY, json.dumps(asked, indent=1))):
        with files.replacing(run.folder / name) as part:
            part.write_text(text, encoding="utf-8")


def check_folder(run: Run, task: Task) -> dict[str, Any]:
    """The run's `identity`. Raises ValueError where the folder holds another run, which would be resumed, or more steps
    than this one has.

    A run that has neither taken a step nor left a result is none yet: it may be corrected.
    """
    out, asked = run.folder, identity(run, task)
    files.check_folder("output_dir", out)
    path, metrics = out / IDENTITY, out / "metrics.jsonl"
    steps = any(out.glob("checkpoint-*")) or (metrics.exists() and metrics.stat().st_size > 0)
    if path.exists() and (steps or (out / "model").exists() or (out / BEFORE).exists()):
        check_same(run, read_json(path), asked)
        check_steps(run)
    elif steps:
        raise ValueError(
            f"output_dir: expected a new folder or a run of `hsd train`, got {out}, which holds another run"
        )
    return asked


def check_same(run: Run, began: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raise ValueError where the run in the folder began with another identity."""
    out, ranks = run.folder, began.get("processes", asked["processes"])
    if ranks != asked["processes"]:
        raise ValueError(
            f"processes: {out} holds a run of {ranks}, got {asked['processes']}; states of optimizer and sampling "
            "belong to their ranks: resume on as many, or choose another --output_dir"
        )
    free = {f"train.{key}" for key in FREE}
    if run.config.lr_scheduler_type not in ("constant", "constant_with_warmup") or 0 < run.config.warmup_steps < 1:
        free.discard("train.max_steps")  # the schedule ends with it, or warms up for a share of it
    for key in sorted((began.keys() & asked.keys()) - free):
        if began[key] != asked[key]:
            raise ValueError(
                f"{key}: {out} holds a run with {began[key]!r}, got {asked[key]!r}; choose another --output_dir"
            )


def check_steps(run: Run) -> None:
    """Raise ValueError for more steps than the run in the folder can still take, and for fewer than it has."""
    out, most = run.folder, run.config.max_steps
    done, saved = steps_done(out), last_checkpoint(out)
    if 0 < done < most and (saved is None or steps_of(saved) < done):
        raise ValueError(
            f"train.max_steps: {out} holds a finished run of {counted(done, 'step')}, without the checkpoint that more "
            f"need (--save_total_limit 1 would have kept it), got {most}; for a new run add --output_dir {out}-{most}"
        )
    if 0 < most < done:  # as of this call, its settings and report would be of fewer steps than its model
        raise ValueError(
            f"train.max_steps: {out} holds a run of {counted(done, 'step')}, got {most}; for a run of "
            f"{counted(most, 'step')} beside it add --output_dir {out}-{most} "
            f"(with make: ARGS='--output_dir {out}-{most}')"
        )


def identity(run: Run, task: Task) -> dict[str, Any]:
    """All that makes a run what it is, by key: also what was left to its default, and the questions themselves."""
    s = run.settings
    found: dict[str, Any] = {"task": s.task, "reward": s.reward, "processes": run.config.world_size}
    for name, part in (("model", s.model), ("data", s.data)):
        found |= {f"{name}.{key}": value for key, value in asdict(part).items()}
    found |= {f"train.{f.name}": getattr(run.config, f.name) for f in fields(run.config)}
    found |= {"data.questions": _fingerprint(task.questions), "data.held_out_questions": _fingerprint(task.held_out)}
    return json.loads(json.dumps(found, default=str))


def _fingerprint(rows: Sequence[Question]) -> str:
    text = json.dumps(list(rows), sort_keys=True, default=str)
    return f"{len(rows)} questions, sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"
