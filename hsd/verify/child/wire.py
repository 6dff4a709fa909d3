"""Values between a program and the tests that judge it: JSON with tags, so that what arrives is plain data.

Nothing of the program's crosses but None, bool, numbers, text, bytes and lists, tuples, sets and dicts of these, each
rebuilt as exactly that type: an object whose ``__eq__`` always says yes arrives as a reference, which equals nothing.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

LIMIT = 64 << 20  # bytes of one message


class Gone(BaseException):
    """The other side closed the channel or broke the protocol. Not an Exception: a test's ``except`` lets it pass."""


def send(channel: socket.socket, message: Any) -> None:
    data = json.dumps(message).encode("ascii")
    if len(data) > LIMIT:
        raise ValueError(f"message of {len(data)} bytes")
    channel.sendall(len(data).to_bytes(8, "big") + data)


def receive(channel: socket.socket) -> Any:
    size = int.from_bytes(_exactly(channel, 8), "big")
    if size > LIMIT:
        raise Gone(f"the program sent {size} bytes")
    try:
        return json.loads(_exactly(channel, size))
    except (ValueError, RecursionError, MemoryError) as error:
        raise Gone(f"the program sent what cannot be read: {type(error).__name__}") from None


def _exactly(channel: socket.socket, size: int) -> bytearray:
    data = bytearray()
    while len(data) < size:
        try:
            part = channel.recv(min(size - len(data), 1 << 20))
        except OSError as error:
            raise Gone(str(error)) from None
        if not part:
            raise Gone("the program ended")
        data += part
    return data


_PLAIN = {str, float, bool, type(None)}
_SAFE = 10**15  # JSON as numbers up to here; json refuses integers of over 4,300 digits


def _flat(items: list[Any]) -> bool:
    """Whether JSON has the items as they are: one by one a long list is slow."""
    kinds = set(map(type, items))
    return kinds <= _PLAIN or (kinds == {int} and -_SAFE < min(items) and max(items) < _SAFE)


def encode(value: Any, refer: Callable[[Any], int]) -> list[Any]:
    """A tagged list; ``refer`` gives the number of an object that has no plain form."""
    if value is None or isinstance(value, bool):
        return ["=", value]
    if isinstance(value, int):
        return ["i", hex(value)]
    if isinstance(value, float):
        return ["f", float(value)]
    if isinstance(value, complex):
        return ["c", value.real, value.imag]
    if isinstance(value, str):
        return ["=", str.__str__(value)]
    if isinstance(value, bytes | bytearray):
        return ["b", bytes(value).hex()]
    if isinstance(value, Fraction | Decimal):
        return ["q" if isinstance(value, Fraction) else "d", str(value)]
    if type(value) is list and _flat(value):
        return ["L", value]
    if isinstance(value, list):
        return ["l", *(encode(x, refer) for x in list.__iter__(value))]
    if isinstance(value, tuple):
        return ["t", *(encode(x, refer) for x in tuple.__iter__(value))]
    if isinstance(value, set | frozenset | type({}.keys())):
        return ["z" if isinstance(value, frozenset) else "s", *(encode(x, refer) for x in value)]
    if isinstance(value, dict):
        return ["m", *([encode(k, refer), encode(v, refer)] for k, v in dict.items(value))]
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return encode(value.tolist(), refer)
    return ["r", refer(value)]


def decode(message: Any, dereference: Callable[[int], Any]) -> Any:
    tag, *rest = message
    if tag == "=":
        (value,) = rest
        if value is None or isinstance(value, bool | str):
            return value
    elif tag == "L":
        (items,) = rest
        if type(items) is list and set(map(type, items)) <= _PLAIN | {int}:
            return items
    elif tag == "r":
        return dereference(int(rest[0]))
    elif tag == "m":
        return {decode(k, dereference): decode(v, dereference) for k, v in rest}
    elif tag in _ATOMS:
        return _ATOMS[tag](*rest)
    elif tag in _CONTAINERS:
        return _CONTAINERS[tag](decode(x, dereference) for x in rest)
    raise ValueError(f"unknown value {tag!r}")


_ATOMS: dict[str, Callable[..., Any]] = {
    "i": lambda text: int(text, 16),
    "f": float,
    "c": complex,
    "b": bytes.fromhex,
    "q": Fraction,
    "d": Decimal,
}
_CONTAINERS: dict[str, Callable[..., Any]] = {"l": list, "t": tuple, "s": set, "z": frozenset}
