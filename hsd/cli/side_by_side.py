"""The layout of `hsd sample`: the replies of models to one prompt, in columns where a terminal has room for them."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hsd.progress import counted

if TYPE_CHECKING:
    from hsd.hindsight.groups import Prompt

COLUMN, GAP = 32, 3  # characters: the narrowest column, the space between two


@dataclass(frozen=True)
class Reply:
    text: str
    tokens: int
    truncated: bool

    def __str__(self) -> str:
        return f"{counted(self.tokens, 'token')}" + (", cut off" if self.truncated else "")


def shown(asked: Prompt, names: Sequence[str], replies: Sequence[Sequence[Reply]], width: int | None) -> list[str]:
    """Lines for one prompt, whose ``replies`` are by model: columns where the terminal's ``width`` allows them, else
    one below the other. ``width`` is None where there is no terminal."""
    from hsd.hindsight.groups import last_user_text

    column = ((width or 0) - GAP * (len(names) - 1)) // len(names)
    beside = len(names) > 1 and column >= COLUMN
    clean: Callable[[str], str] = str if width is None else printable
    lines = [f"prompt: {clean(last_user_text(asked))}", ""]
    rows = [list(row) for row in zip(*replies, strict=True)]
    for number, row in enumerate(rows, 1):
        count = f" ({number} of {len(rows)})" if len(rows) > 1 else ""
        cells = [(f"{name}{count}: {reply}", clean(reply.text)) for name, reply in zip(names, row, strict=True)]
        if beside:
            lines += columns([f"{title}\n\n{text}" for title, text in cells], column)
            lines.append("")
        else:
            for title, text in cells:
                lines += [title, text, ""]
    return lines


def columns(texts: Sequence[str], width: int) -> list[str]:
    """The texts beside each other, each wrapped to ``width``."""
    cells = [[part for line in text.split("\n") for part in wrapped(line, width)] for text in texts]
    height = max(map(len, cells))
    rows = zip(*([*cell, *[""] * (height - len(cell))] for cell in cells), strict=True)
    return [(" " * GAP).join(part + " " * (width - on_screen(part)) for part in row).rstrip() for row in rows]


def wrapped(line: str, width: int) -> list[str]:
    """Lines of at most ``width`` on the screen, broken at spaces where there are any."""
    lines = []
    while (end := _fitting(line, width)) < len(line):
        space = line.rfind(" ", 1, end + 1)
        cut = space if line[: max(space, 0)].strip() else end
        lines.append(line[:cut])
        line = line[cut:].removeprefix(" ")
    return [*lines, line]


def _fitting(text: str, width: int) -> int:
    """The number of characters that fit into ``width`` on the screen, at least one."""
    taken = 0
    for at, character in enumerate(text):
        taken += on_screen(character)
        if taken > width:
            return max(1, at)
    return len(text)


def on_screen(text: str) -> int:
    """The columns that a text takes: two for a wide character, as Chinese ones are, none for a combining one."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def printable(text: str) -> str:
    """Without what a terminal would obey: a reply may hold any character."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text.expandtabs(4))
