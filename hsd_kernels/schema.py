"""How records cross an operator's schema: text and keyword arguments, both made from the fields of the type.

The tensors of a NamedTuple become positional arguments, the fields of a frozen dataclass keyword-only ones, each under
its own name and as its own type. So a field added to `Divergence` reaches forward, fake and backward by itself, a
number stays symbolic under ``torch.compile(dynamic=True)``, and nothing counts positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ForwardRef

# Annotation -> (type in a schema, conversion of what a caller may pass instead, such as numpy's numbers).
_TYPES: dict[str, tuple[str, Any]] = {
    "bool": ("bool", bool),
    "str": ("str", str),
    "int": ("int", int),
    "float": ("float", float),
    "str | None": ("str?", str),
    "int | None": ("int?", int),
    "float | None": ("float?", float),
}
_TENSORS = {"Tensor": "Tensor", "Tensor | None": "Tensor?"}


def tensor_arguments(record: type[Any]) -> str:
    """ "Tensor student_hidden, Tensor? bias": of a NamedTuple."""
    return ", ".join(f"{_TENSORS[_annotation(kind)]} {name}" for name, kind in record.__annotations__.items())


def option_arguments(*records: type[Any]) -> str:
    """ "str kind, float beta, float? clip": of frozen dataclasses, to stand behind the schema's ``*``."""
    return ", ".join(f"{_TYPES[_annotation(f.type)][0]} {f.name}" for record in records for f in fields(record))


class Packer:
    """One dataclass as keyword arguments. Its field names are read once: Dynamo need not trace `fields`."""

    def __init__(self, record: type[Any]) -> None:
        self.record = record
        self.convert = {f.name: _TYPES[_annotation(f.type)][1] for f in fields(record)}

    def pack(self, value: Any) -> dict[str, Any]:
        given = {name: getattr(value, name) for name in self.convert}
        return {name: None if v is None else self.convert[name](v) for name, v in given.items()}

    def unpack(self, options: Mapping[str, Any]) -> Any:
        """Of all keyword arguments of the operator, the fields of this record."""
        return self.record(**{name: options[name] for name in self.convert})


def _annotation(kind: Any) -> str:
    return kind.__forward_arg__ if isinstance(kind, ForwardRef) else kind
