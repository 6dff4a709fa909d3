"""docs/troubleshooting.md quotes keys that exist and errors in words of the code."""

import ast
import re
from pathlib import Path

import pytest

from hsd.cli.settings import known_keys

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
ROWS = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith(("| `", "| warning"))]
MESSAGES = [re.findall("`(.*)`", row[0])[0] for row in ROWS if row[0].count(" ") > 1]
ALARMS = [row[0].strip("`") for row in ROWS if row[0].count(" ") < 2]
OF_LIBRARIES = ("a valid string", "Your setup doesn't support")  # pydantic's, transformers'
KEYS = {part for key in known_keys() for part in (key, key.rpartition(".")[2])}


OF_A_CASE = re.compile(r"(?<!\w)'[^']*'|\S*\d\S*|DTensor|runs/\S+|\S+\.\w+")


def words(text):
    return set(re.findall(r"[A-Za-z_]{4,}", text))


def said(path):
    """The words of a module's texts, messages among them."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return words(" ".join(n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)))


CODE = [said(path) for room in ("hsd", "hsd_kernels") for path in (ROOT / room).rglob("*.py")]


@pytest.mark.parametrize("message", [m for m in MESSAGES if not any(words in m for words in OF_LIBRARIES)])
def test_a_quoted_message_is_in_the_words_of_one_module(message):
    found = words(OF_A_CASE.sub(" ", message.rpartition(": ")[2]))
    assert any(found <= module for module in CODE)


def test_a_place_that_a_message_names_is_a_key():
    placed = [m.removeprefix("run.yaml: ").split(": ")[0] for m in MESSAGES if m.startswith(("run.yaml: ", "--"))]
    keys = [key.removeprefix("--") for place in placed for key in place.split(", ")]
    assert len(keys) > 15 and {key for key in keys if key not in KEYS} == {"train.learning_rat"}


def test_settings_that_are_recommended_exist():
    quoted = re.findall(r"`([a-z_.]+): [^`]*`", " ".join(" ".join(row[1:]) for row in ROWS))
    assert len(quoted) > 5 and set(quoted) <= {*KEYS, "fsdp_version"}  # accelerate's


def test_every_alarm_is_there():
    source = (ROOT / "hsd" / "train" / "alarms.py").read_text(encoding="utf-8")
    assert len(ALARMS) > 5 and set(ALARMS) <= set(re.findall(r'found\["([^"]+)"\]', source))
