"""Settings of a run, in sections: a registered task, or a model, questions and a reward; `hsd.HSDConfig`'s fields.

model: {path: Qwen/Qwen3-1.7B, dtype: bfloat16, lora: {r: 16}}
data:  {path: train.jsonl}
reward: math
train: {learning_rate: 1e-6}
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

STRICT = {"extra": "forbid"}  # pydantic: an unknown key is an error


def key(help: str, default: Any = None) -> Any:
    """A field with what `hsd init` writes beside it."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Lora:
    """As in `peft.LoraConfig`."""

    __pydantic_config__: ClassVar = STRICT
    r: Annotated[int, Field(ge=1)] = 16
    alpha: int = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: str | list[str] = "all-linear"


@dataclass(frozen=True)
class Model:
    __pydantic_config__: ClassVar = STRICT
    path: str | None = key("hub id or folder of the model")
    dtype: Literal["float32", "bfloat16", "float16"] = key("of the weights; train.bf16 computes in bf16", "float32")
    attention: str | None = key("transformers' attn_implementation")
    lora: Lora | None = key("train adapters instead of all weights; as in peft.LoraConfig")


@dataclass(frozen=True)
class Data:
    __pydantic_config__: ClassVar = STRICT
    path: str | None = key("file of questions (JSONL, CSV, Parquet), or a name that hsd.data.load knows")
    split: str | None = key("of a data set on the hub")
    limit: int | None = key("the first so many questions")
    held_out: int = key("so many of them, the first, are kept out of training", 0)
    instruction: str | None = key("below every question, instead of hsd.data's; '' is none")
    chat: bool | None = key("messages or plain texts; null: messages where the tokenizer has a chat template")


@dataclass(frozen=True)
class Settings:
    """A registered ``task``, of which the other sections replace parts; without one, ``model.path``, ``data.path`` and
    ``reward`` are needed."""

    __pydantic_config__: ClassVar = STRICT
    task: str | None = None
    model: Model = Model()
    data: Data = Data()
    reward: str | list[str] | None = key("number, math, code, reasoning_gym or module:function")
    train: dict[str, Any] = field(default_factory=dict)  # fields of HSDConfig
