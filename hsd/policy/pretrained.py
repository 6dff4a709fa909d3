"""Model and tokenizer of a folder or hub id; an error names it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hsd.hub import asking, no_answer
from hsd.json_files import read_json
from hsd.progress import hide_bars

ADAPTERS = "adapter_config.json"
FLASH = {f"flash_attention_{n}": "flash_attn_interface" if n == 3 else "flash_attn" for n in (2, 3, 4)}  # packages


def load(path: str, dtype: str = "float32", attention: str | None = None) -> tuple[Any, Any]:
    """``dtype`` "auto" is as saved; ``attention`` is transformers' attn_implementation."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kwargs = {} if attention is None else {"attn_implementation": attention}
    weights = "auto" if dtype == "auto" else getattr(torch, dtype)
    hide_bars()
    with _named(path):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=weights, **kwargs)
        return model, AutoTokenizer.from_pretrained(path)


def load_tokenizer(path: str) -> Any:
    from transformers import AutoTokenizer

    with _named(path):
        return AutoTokenizer.from_pretrained(path)


def load_config(path: str) -> Any:
    from transformers import AutoConfig

    with _named(path):
        return AutoConfig.from_pretrained(path)


def check(path: str) -> None:
    """Raise ValueError where no model is. Loads configuration and tokenizer, no weights."""
    if not (Path(path) / ADAPTERS).exists():
        load_config(path)
    load_tokenizer(path)


def without_weights(path: str, attention: str | None = None) -> Any:
    """The causal LM of a folder or hub id on the meta device, for what its structure shows; `load` with an error.

    An attention of a package that is there counts on a machine without a GPU.
    """
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config = load_config(_base(path) or path)
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model_class is None:
        raise ValueError(f"model: expected a causal language model, got {path!r}, a {config.model_type}")
    if model_class.config_class == config.sub_configs.get("text_config"):
        config = config.get_text_config()
    if torch.cuda.is_available() or not (package := FLASH.get(attention or "")) or find_spec(package) is None:
        config._attn_implementation = attention
    try:
        with torch.device("meta"):
            return model_class(config)  # not from_config, which would partition it under ZeRO-3
    except (ValueError, ImportError) as error:
        if attention is None:
            raise
        expected = "model.attention: expected an attn_implementation that this model can have here"
        raise ValueError(f"{expected}, got {attention!r}: {error}") from error


@contextmanager
def _named(path: str) -> Iterator[None]:
    """An error about the model in the block names it. A hub that does not answer is not waited for."""
    expected, base = "model: expected a folder with a model, or a hub id", _base(path)
    with asking():
        if missing := _missing(path if base is None else base):
            got = repr(path) if base is None else f"{base!r}, the base model of {path}"
            raise ValueError(f"{expected}, got {got}, which is {missing}")
        try:
            yield
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"{expected}, got {path!r}: {reason}") from error


def _missing(path: str) -> str | None:
    """What is wrong with the name of a model that is neither a folder nor at hand in the hub or its cache."""
    if Path(path).is_dir():
        return None
    if Path(path).is_absolute() or path.startswith(("./", "../")):
        return "not there"
    try:
        why = no_answer(path)
    except ValueError as error:
        return f"no folder and no hub id: {error}"
    if why is None or _is_cached(path):
        return None
    return f"no folder and not in the hub's cache, and the hub does not answer ({why}); give a folder"


def _base(path: str) -> str | None:
    """The base model of the adapters in a folder; None where there are none."""
    config = Path(path) / ADAPTERS
    return read_json(config).get("base_model_name_or_path") if config.exists() else None


def _is_cached(repo: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return any(isinstance(try_to_load_from_cache(repo, name), str) for name in ("config.json", ADAPTERS))
