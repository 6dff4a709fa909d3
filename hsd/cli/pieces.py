"""From the words of a configuration to a model, questions and reward functions."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hsd.cli.settings import Data, Lora, Model

SMALL_WORLD = "small_world"
SMALL_WORLD_QUESTIONS = 2048
DTYPES = ("float32", "bfloat16", "float16")
VERIFIERS = ("number", "math", "code")


def load_model(model: Model, seed: int, cache: Path) -> tuple[Any, Any]:
    """Model and tokenizer. The small world's is warm-started on first use and kept under ``cache``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if model.dtype not in DTYPES:
        raise ValueError(f"model.dtype: expected one of {DTYPES}, got {model.dtype!r}")
    path, tokenizer = model.path, None
    if path == SMALL_WORLD:
        from hsd.demo import small_world

        path, tokenizer = str(_warm_start(seed, cache)), small_world.build_tokenizer()
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(path)
    kwargs = {} if model.attention is None else {"attn_implementation": model.attention}
    policy = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, model.dtype), **kwargs)
    return policy, tokenizer


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


def load_rows(data: Data, seed: int, chat: bool) -> list[dict[str, Any]]:
    """Rows with ``prompt``, ``answer`` and whatever else they came with (`hsd.data`); all have the same keys.

    ``data.instruction`` replaces the words that `hsd.data` puts below a question. With ``chat`` a text becomes a user's
    message, without it messages become their last text.
    """
    if data.path == SMALL_WORLD:
        from hsd.demo import small_world

        if data.limit is not None and data.limit < 1:
            raise ValueError(f"data.limit: expected a positive number of questions, got {data.limit}")
        rows: list[dict[str, Any]] = list(small_world.make_questions(SMALL_WORLD_QUESTIONS, seed=seed))[: data.limit]
    else:
        from hsd.data import load

        rows = load(data.path, data.split, data.limit)
    columns = dict.fromkeys(key for row in rows for key in row)
    return [{key: row.get(key) for key in columns} | _asked(row, data.instruction, chat) for row in rows]


def _asked(row: dict[str, Any], instruction: str | None, chat: bool) -> dict[str, Any]:
    prompt = row["prompt"]
    if instruction is not None:
        question = row.get("question") or (prompt if isinstance(prompt, str) else None)
        if question is not None:
            prompt = f"{question}\n\n{instruction}" if instruction else question
    if isinstance(prompt, str):
        return {"prompt": [{"role": "user", "content": prompt}] if chat else prompt}
    return {"prompt": prompt if chat else prompt[-1]["content"]}


def load_rewards(names: str | list[str]) -> list[Callable[..., Any]]:
    """TRL reward functions: hsd.verify's by name, others as module:function (the current folder can be imported)."""
    if not names:
        raise ValueError(f"reward: expected at least one function, got {names!r}")
    return [_reward(name) for name in ([names] if isinstance(names, str) else names)]


def _reward(name: str) -> Callable[..., Any]:
    module, colon, function = name.partition(":")
    if colon:
        if "" not in sys.path and str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        try:
            found = getattr(importlib.import_module(module), function, None)
        except ImportError as error:
            raise ValueError(f"reward: expected a module that can be imported, got {name!r} ({error})") from error
    elif name in VERIFIERS:
        found = getattr(importlib.import_module("hsd.verify"), f"{name}_reward", None)
    else:
        raise ValueError(f"reward: expected one of {VERIFIERS} or module:function, got {name!r}")
    if not callable(found):
        raise ValueError(f"reward: expected a function, got {name!r}, which is none")
    return found


def _warm_start(seed: int, cache: Path) -> Path:
    from hsd.demo import small_world

    folder = cache / f"small_world-seed{seed}"
    if not (folder / "config.json").exists():
        print("warm start: teaching a fresh Qwen3 to add, with slips", flush=True)
        model = small_world.build_model(seed)
        small_world.warm_start(model, small_world.build_tokenizer(), seed=seed, progress=_progress)
        part = folder.with_suffix(".part")
        model.save_pretrained(part)
        part.replace(folder)
    return folder


def _progress(step: int, loss: float) -> None:
    if step % 200 == 0:
        print(f"warm start: step {step}, loss {loss:.3f}", flush=True)
