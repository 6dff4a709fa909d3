"""One training run: its settings, its folder, and what happens in it. `hsd train` and `hsd demo` share all of it.

The folder (``train.output_dir``) holds config.yaml, from which `hsd credit` and `hsd compare` load the settings;
run.json, all that makes the run what it is; metrics.jsonl, a line a step; rollouts.jsonl, some of its rollouts to read;
held_out.jsonl, evaluations during training; a checkpoint; at the end training.png and ``model/``. The checkpoint goes
at the end, unless ``save_total_limit`` is given.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset
from transformers.trainer_callback import ProgressCallback
from trl.trainer.grpo_config import GRPOConfig

from hsd import files
from hsd.cli.settings import load, parse
from hsd.data.rows import read_json
from hsd.policy.pretrained import check as check_model
from hsd.progress import say
from hsd.tasks import registered
from hsd.tasks.files import check_parts, complete, title
from hsd.tasks.settings import Data, Lora, Settings
from hsd.tasks.task import Policy, Question, Task, load_policy
from hsd.train.builds import check_builds
from hsd.train.callbacks import HELD_OUT, StepLine, StopOnSignal, last_checkpoint, load_metrics
from hsd.train.config import HSDConfig, unused
from hsd.train.limits import check_columns, check_engine, check_no_tensor_parallelism, launched
from hsd.train.teachers import INITIAL, frozen_file
from hsd.train.trainer import HSDTrainer

# What may differ between the parts of one run: none of these changes a step.
FREE = ("output_dir", "max_steps", "save_steps", "save_total_limit", "save_strategy", "logging_steps", "report_to")
FREE += ("record_groups", "run_name", "disable_tqdm", "log_completions", "num_completions_to_print", "use_cpu")
CONFIG = "config.yaml"
IDENTITY = "run.json"
BEFORE = "before.json"  # success of the initial policy, where it was measured


@dataclass(frozen=True)
class Run:
    settings: Settings
    config: HSDConfig
    base: Task | None  # the registered task of ``settings.task``
    left_out: Mapping[str, Any] = field(default_factory=dict)  # settings that the method does not use

    @property
    def folder(self) -> Path:
        return Path(str(self.config.output_dir))

    @property
    def keeps_checkpoints(self) -> bool:
        """Whether a finished run can go on: where ``save_total_limit`` is given, also as null, which keeps all."""
        return "save_total_limit" in {*self.settings.train, *(self.base.config if self.base else ())}

    def task(self) -> Task:
        """Loads the questions, and for those of a file the tokenizer."""
        return complete(self.settings, self.base, self.config)

    def initial_policy(self, task: Task) -> Policy:
        return load_policy(task.model(), self.settings.model.dtype, self.settings.model.attention)


def prepare(settings: Settings, name: str, *, source: str = "settings", check: bool = False) -> Run:
    """The run that ``settings`` ask for, by default in the folder runs/NAME. ``source`` names them in errors.

    With ``check`` a machine without a GPU does for a configuration that needs one.
    """
    import torch

    check_parts(settings)
    base = registered(settings.task, settings.train.get("seed", HSDConfig.seed)) if settings.task else None
    if base is not None and base.threads is not None and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(base.threads)
    given: dict[str, Any] = {"output_dir": str(Path("runs") / name), "save_total_limit": 1}
    given |= (base.config if base else {}) | settings.train
    if check and not torch.cuda.is_available():
        given["use_cpu"] = True
    try:
        left_out = {name: given.pop(name) for name in unused(given)}
        return Run(settings, HSDConfig(**given), base, left_out)
    except ValueError as error:
        raise ValueError(f"{source}: train.{error}") from error


def check(run: Run) -> str:
    """What a run would begin with, in a line. Raises ValueError for all that is wrong with it and needs no weights."""
    check_engine(run.config, launched(run.config), peft=run.settings.model.lora is not None)
    check_no_tensor_parallelism(None, run.config)
    model, data = run.settings.model.path, run.settings.data
    if model is not None:
        check_model(model)
    elif data.path is not None and data.chat is None:  # the task would make its model to say
        run = replace(run, settings=replace(run.settings, data=replace(data, chat=False)))
    task = run.task()
    check_questions(run, task)
    files.check_folder("output_dir", run.folder)
    rewards = ", ".join(getattr(reward, "__name__", "?") for reward in task.rewards)
    return f"{task.title}: {len(task.questions)} questions, {len(task.held_out)} held out, reward {rewards}"


def left_out(run: Run) -> str:
    """In a line, the settings that the run's method does not use."""
    return f"method {run.config.method} does not use " + ", ".join(f"{k}={v!r}" for k, v in run.left_out.items())


def check_questions(run: Run, task: Task) -> None:
    """Raise ValueError for questions without a column that the method needs, and for fewer than a step samples."""
    config = run.config
    needed = config.generation_batch_size // config.num_generations  # type: ignore[operator]
    if len(task.questions) < needed:
        raise ValueError(f"data: expected at least {needed} questions, one step's worth, got {len(task.questions)}")
    check_columns("data", task.questions[0], config)
    if evaluates(config) and not task.held_out:
        raise ValueError("data.held_out: expected questions for train.eval_strategy to evaluate on, got none")


def train(run: Run) -> int:
    """Train, or go on with the run in the folder; the exit code."""
    config, out = run.config, run.folder
    engine = launched(config)
    check_engine(config, engine, peft=run.settings.model.lora is not None)
    check_no_tensor_parallelism(None, config)
    if engine.name == "deepspeed":
        check_builds()
    with config.main_process_first(desc="the questions and the model's files"):
        task = run.task()
        check_questions(run, task)
        check_folder(run, task)  # a task may take minutes to make its model
        task.model()
    # On all ranks at once: under ZeRO-3 they share the weights out as they read them.
    model, tokenizer = run.initial_policy(task)
    with config.main_process_first(desc="the run's folder"):
        claim(run, task)
    stop = StopOnSignal()
    trainer = HSDTrainer(
        model=model,
        reward_funcs=list(task.rewards),
        args=config,
        train_dataset=Dataset.from_list(list(task.questions)),
        eval_dataset=Dataset.from_list(list(task.held_out)) if evaluates(config) else None,
        processing_class=tokenizer,
        peft_config=peft_config(run.settings.model.lora),
        context_template=task.template,
        callbacks=[stop],
    )
    if not config.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(StepLine())
    checkpoint, done = last_checkpoint(out), steps_done(out)
    if 0 < config.max_steps <= done or (config.max_steps <= 0 and 0 < done == steps_of(out / "model")):
        # Trainer would take one step more on a run that has them all.
        say(f"{out}: this run already has {done} steps" + ("; --max_steps asks for more" if checkpoint else ""))
        return 0
    # An accelerate launch with --cpu starts one process, whatever number it is given.
    say(f"{out}: {config.world_size} process{'es' * (config.world_size > 1)} on {config.device.type}, {engine}")
    if run.left_out:
        say(f"{out}: {left_out(run)}")
    say(f"{out}: {len(task.questions)} questions, " + (f"resuming after step {done}" if done else "from the start"))
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except (ValueError, TypeError, OSError) as error:
        if trainer.state.global_step == 0:  # as a rule bad input
            if not config.disable_tqdm:
                print(file=sys.stderr)  # the bar's line has no end yet
            raise
        # Hours into a run, where it happened is worth a traceback.
        raise RuntimeError(f"training stopped at step {trainer.state.global_step}") from error
    if stop.signal is not None:
        draw(trainer)
        say(f"{out}: stopped at step {trainer.state.global_step}; the same command resumes")
        return 128 + stop.signal
    trainer.save_model(str(out / "model"))
    if trainer.is_world_process_zero():
        trainer.state.save_to_json(str(out / "model" / "trainer_state.json"))
        if not run.keeps_checkpoints:
            remove_checkpoints(out)
    draw(trainer)
    say(f"{out}: {trainer.state.global_step} steps; the model is in {out / 'model'}")
    return 0


def remove_checkpoints(run: Path) -> None:
    """Remove what only the next step of a run needs: three to four times the model's size."""
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    frozen_file(run, INITIAL).unlink(missing_ok=True)


def evaluates(config: HSDConfig) -> bool:
    return config.eval_strategy != "no" or config.eval_on_start


def draw(trainer: HSDTrainer) -> None:
    """Write training.png of what the run has logged."""
    from hsd.viewer.report import training_picture

    out = Path(str(trainer.args.output_dir))
    if trainer.is_world_process_zero():
        training_picture(out, load_metrics(out / "metrics.jsonl"), load_metrics(out / HELD_OUT))


def peft_config(lora: Lora | None) -> Any:
    if lora is None:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )


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
    if run.config.lr_scheduler_type not in ("constant", "constant_with_warmup"):
        free.discard("train.max_steps")  # the schedule ends with it
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
            f"train.max_steps: {out} holds a finished run of {done} steps, without the checkpoint that more need "
            f"(--save_total_limit 1 would have kept it), got {most}; for a new run add --output_dir {out}-{most}"
        )
    if 0 < most < done:  # as of this call, its settings and report would be of fewer steps than its model
        raise ValueError(
            f"train.max_steps: {out} holds a run of {done} steps, got {most}; for a run of {most} steps beside it "
            f"add --output_dir {out}-{most} (with make: ARGS='--output_dir {out}-{most}')"
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
