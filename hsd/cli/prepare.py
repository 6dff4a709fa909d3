"""What a run is: settings of a YAML file or a task, checked. `hsd train` and `hsd demo` share it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import Trainer

from hsd import files
from hsd.named import nearest
from hsd.policy.body_and_head import body_and_head
from hsd.policy.pretrained import check as check_model
from hsd.policy.pretrained import without_weights
from hsd.progress import counted
from hsd.tasks import registered
from hsd.tasks.files import check_parts, complete
from hsd.tasks.settings import Lora, Settings
from hsd.tasks.task import Policy, Task, load_policy
from hsd.train.config import HSDConfig
from hsd.train.limits import (
    check_columns,
    check_engine,
    check_no_tensor_parallelism,
    check_packages,
    lacking,
    launched,
)
from hsd.train.rules import unused


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
        names_a_key = re.match(r"\w+[:,]", str(error))  # transformers' own do not
        raise ValueError(f"{source}: train{'.' if names_a_key else ': '}{error}") from error


def check(run: Run) -> str:
    """What a run would begin with, in a line, and what its rows lack, in another. Raises ValueError for all that is
    wrong with it and needs no weights."""
    check_engine(run.config, launched(run.config), peft=run.settings.model.lora is not None)
    check_no_tensor_parallelism(None, run.config)
    check_packages(run.config)
    model, data = run.settings.model.path, run.settings.data
    if model is not None:
        check_model(model)
        check_policy(run, model)
    elif data.path is not None and data.chat is None:  # the task would make its model to say
        run = replace(run, settings=replace(run.settings, data=replace(data, chat=False)))
    task = run.task()
    check_questions(run, task)
    files.check_folder("output_dir", run.folder)
    rewards = ", ".join(getattr(reward, "__name__", "?") for reward in task.rewards)
    told = f"{task.title}: {counted(len(task.questions), 'question')}, {len(task.held_out)} held out, reward {rewards}"
    return "\n".join(filter(None, (told, lacking(run.config, task.questions))))


def check_policy(run: Run, path: str) -> None:
    """Raise ValueError where the model at ``path`` rules out an attention, LoRA, loss or optimizer of the run; its
    weights are not loaded, and torch's generator stays as it is."""
    import torch

    with torch.random.fork_rng(devices=[]):
        policy = without_weights(path, run.settings.model.attention)
        if (lora := run.settings.model.lora) is not None:
            policy = with_adapters(policy, lora)
    if run.config.has_teacher:
        body_and_head(policy)
    try:
        Trainer.get_optimizer_cls_and_kwargs(run.config, policy)
    except (ValueError, ImportError, RuntimeError) as error:
        name = getattr(run.config.optim, "value", run.config.optim)
        raise ValueError(f"optim: expected one that can run here, got {name!r}: {_first_line(error)}") from error


def with_adapters(policy: Any, lora: Lora) -> Any:
    """The policy with PEFT's adapters. Raises ValueError where a target is no module of it that LoRA can train."""
    from peft import get_peft_model

    modules = [f".{name}" for name, _ in policy.named_modules()]
    targets = [] if isinstance(lora.target_modules, str) else lora.target_modules
    expected = "model.lora.target_modules: expected modules of the model that LoRA can train"
    # PEFT is content where one of them is there.
    if missing := [name for name in targets if not any(module.endswith(f".{name}") for module in modules)]:
        last = {module.rpartition(".")[2] for module in modules}
        raise ValueError(f"{expected}{nearest(missing[0], last)}, got {missing[0]!r}")
    try:
        return get_peft_model(policy, peft_config(lora))
    except ValueError as error:
        raise ValueError(f"{expected}, got {lora.target_modules!r}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    """PEFT's error prints the whole module, line by line."""
    return str(error).strip().partition("\n")[0]


def peft_config(lora: Lora) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )


def left_out(run: Run) -> str:
    """In a line, the settings that the run's method does not use."""
    return f"method {run.config.method} does not use " + ", ".join(f"{k}={v!r}" for k, v in run.left_out.items())


def check_questions(run: Run, task: Task) -> None:
    """Raise ValueError for questions without a column that the method needs, and for fewer than a step samples."""
    config = run.config
    needed = config.generation_batch_size // config.num_generations  # type: ignore[operator]
    if len(task.questions) < needed:
        out = f" beside {len(task.held_out)} of data.held_out" if task.held_out else ""
        raise ValueError(
            f"data: expected {counted(needed, 'question')} or more, one step's worth, got {len(task.questions)}{out}"
        )
    check_columns("data", task.questions[0], config)
    if evaluates(config) and not task.held_out:
        raise ValueError("data.held_out: expected questions for train.eval_strategy to evaluate on, got none")


def evaluates(config: HSDConfig) -> bool:
    return config.eval_strategy != "no" or config.eval_on_start
