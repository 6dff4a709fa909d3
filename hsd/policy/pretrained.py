"""Model and tokenizer of a folder or hub id; an error names it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def load(path: str, dtype: str = "float32", attention: str | None = None) -> tuple[Any, Any]:
    """``dtype`` "auto" is as saved; ``attention`` is transformers' attn_implementation."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kwargs = {} if attention is None else {"attn_implementation": attention}
    weights = "auto" if dtype == "auto" else getattr(torch, dtype)
    with _named(path):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=weights, **kwargs)
        return model, AutoTokenizer.from_pretrained(path)


def load_tokenizer(path: str) -> Any:
    from transformers import AutoTokenizer

    with _named(path):
        return AutoTokenizer.from_pretrained(path)


def check(path: str) -> None:
    """Raise ValueError where no model is. Loads configuration and tokenizer, no weights."""
    from transformers import AutoConfig

    with _named(path):
        if not (Path(path) / "adapter_config.json").exists():
            AutoConfig.from_pretrained(path)
    load_tokenizer(path)


@contextmanager
def _named(path: str) -> Iterator[None]:
    if Path(path).is_absolute() or path.startswith(("./", "../")):
        if not Path(path).is_dir():
            raise ValueError(f"model: expected a folder with a model, or a hub id, got {path!r}, which is not there")
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"model: expected a folder with a model, or a hub id, got {path!r}: {reason}") from error
