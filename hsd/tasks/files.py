"""From the words of a configuration to a `Task`: questions from a file or a data set, reward functions by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hsd.evaluate.sampling import Sampling, choice_of
from hsd.hindsight.context import DEFAULT_CHAT_TEMPLATE, DEFAULT_TEXT_TEMPLATE
from hsd.named import is_named, named, nearest
from hsd.policy.pretrained import load_tokenizer
from hsd.tasks import TASKS
from hsd.tasks.settings import Data, Settings
from hsd.tasks.task import Question, Task
from hsd.verify.generators import PREFIX

if TYPE_CHECKING:
    from hsd.train.config import HSDConfig

VERIFIERS = ("number", "math", "code", "reasoning_gym")


def check_parts(settings: Settings) -> None:
    """Raise ValueError where a part of the task is given neither by name nor by ``settings.task``."""
    parts = {"model.path": settings.model.path, "data.path": settings.data.path, "reward": settings.reward}
    if (settings.data.path or "").startswith(PREFIX):
        del parts["reward"]  # the generator's scorer
    for key, value in parts.items():
        if settings.task is None and value is None:
            raise ValueError(f"{key}: expected a value, or a task among {', '.join(TASKS)}, got none")
    if settings.data.path is None and replace(settings.data, limit=None) != Data():
        raise ValueError("data: expected no key but limit without data.path, whose questions the others are about")
    if settings.data.limit is not None and settings.data.limit < 1:
        raise ValueError(f"data.limit: expected a positive number of questions, got {settings.data.limit}")
    if settings.data.held_out < 0:
        raise ValueError(f"data.held_out: expected a number of questions >= 0, got {settings.data.held_out}")


def complete(settings: Settings, base: Task | None, config: HSDConfig) -> Task:
    """The task of a run: ``base``, the registered ``settings.task``, with what ``settings`` and ``config`` say."""
    path, data, changed = settings.model.path, settings.data, {}
    if path is not None:
        changed["model"] = lambda: path
    if settings.reward is not None:
        changed["rewards"] = load_rewards(settings.reward)
    elif (data.path or "").startswith(PREFIX):
        changed["rewards"] = load_rewards("reasoning_gym")
    task = replace(base or Task("", str, (), (), (), DEFAULT_TEXT_TEMPLATE, Sampling(512, batch_size=64)), **changed)
    if data.path is not None:
        chat = _is_chat(task.model()) if data.chat is None else data.chat
        if base is None and chat:
            task = replace(task, template=DEFAULT_CHAT_TEMPLATE)
        # A registered task asks the bare question, whatever file it comes from.
        rows = load_rows(replace(data, instruction="") if base and data.instruction is None else data, chat)
        task = replace(task, held_out=rows[: data.held_out], questions=rows[data.held_out :])
    else:
        task = replace(task, questions=task.questions[: data.limit])
    sampling = replace(
        task.sampling,
        max_new_tokens=config.max_completion_length or task.sampling.max_new_tokens,
        **choice_of(config),
    )
    return replace(
        task,
        title=title(settings, base),
        template=config.context_template(task.template),
        sampling=sampling,
        reward_weights=config.reward_weights,
        success_reward=config.success_reward,
    )


def title(settings: Settings, base: Task | None) -> str:
    if base and settings.model.path is None and settings.data.path is None:
        return base.title
    return " on ".join(Path(part.path or settings.task or "").name for part in (settings.model, settings.data))


def _is_chat(path: str) -> bool:
    return bool(load_tokenizer(path).chat_template)


def load_rows(data: Data, chat: bool) -> list[Question]:
    """Rows with ``prompt``, ``answer`` and whatever else they came with (`hsd.data`); all have the same keys.

    ``data.instruction`` replaces the words that `hsd.data` puts below a question. With ``chat`` a text becomes a user's
    message, without it messages become their last text.
    """
    from hsd.data import load

    assert data.path is not None
    try:
        rows = load(data.path, data.split, data.limit)
    except ValueError as error:
        named = str(error).startswith(("data: ", "split: ", "limit: "))
        raise ValueError(str(error) if named else f"data: {error}") from error  # of a row, with the file's name
    columns = dict.fromkeys(key for row in rows for key in row)
    return [{key: row.get(key) for key in columns} | _asked(row, data.instruction, chat) for row in rows]


def _asked(row: Question, instruction: str | None, chat: bool) -> Question:
    prompt = row["prompt"]
    if instruction is not None:
        question = row.get("question") or (prompt if isinstance(prompt, str) else None)
        if question is not None:
            prompt = f"{question}\n\n{instruction}" if instruction else question
    if isinstance(prompt, str):
        return {"prompt": [{"role": "user", "content": prompt}] if chat else prompt}
    return {"prompt": prompt if chat else prompt[-1]["content"]}


def load_rewards(names: str | list[str] | None) -> list[Callable[..., Any]]:
    """TRL reward functions: hsd.verify's by name, others as module:function (the current folder can be imported)."""
    if not names:
        raise ValueError(f"reward: expected at least one function, got {names!r}")
    return [_reward(name) for name in ([names] if isinstance(names, str) else names)]


def _reward(name: str) -> Callable[..., Any]:
    if is_named(name):
        found = named("reward", name)[1]
    elif name in VERIFIERS:
        found = getattr(importlib.import_module("hsd.verify"), f"{name}_reward", None)
    else:
        raise ValueError(
            f"reward: expected one of {VERIFIERS} or module:function{nearest(name, VERIFIERS)}, got {name!r}"
        )
    if not callable(found):
        raise ValueError(f"reward: expected a function, got {name!r}, which is not callable")
    return found
