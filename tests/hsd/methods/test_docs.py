"""The recipes of docs/extending run as they stand, the table names every method, and `hsd methods` tells of them."""

import math
import re
from pathlib import Path

import pytest
from tiny_runs import half, make, qwen3

from hsd.cli.__main__ import main
from hsd.cli.methods import equation, forwards, needs
from hsd.hindsight.context import PARTS, Context, ContextTemplate
from hsd.hindsight.teacher_prompts import parts
from hsd.methods import METHODS, MODULES
from hsd.methods.draw import Ask, Drawn, Row
from hsd.methods.method import Method
from hsd.methods.reads import Reads, reads
from hsd.train.config import HSDConfig

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "methods.md").read_text()
PAGES = sorted((ROOT / "docs" / "extending").glob("*.md"))
BLOCKS = {p.stem: re.findall(r"```python\n(.*?)```", p.read_text(), re.DOTALL) for p in PAGES}
TEMPLATE = ContextTemplate(
    "[{answer}|{demonstration}]",
    "[{answer}]",
    "[|{demonstration}]",
    "[{feedback}]",
    dict.fromkeys(PARTS, "|{text}"),
    "]",
)


@pytest.mark.parametrize("page", BLOCKS)
def test_a_recipe_of_the_page_trains(page, tmp_path, monkeypatch):
    (block,) = BLOCKS[page]
    assert len(block.splitlines()) < 30
    (tmp_path / f"recipe_of_{page}.py").write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    options = {"feedback_fn": lambda completions, **kw: [None] * len(completions)} if page == "contexts" else {}
    trainer = make(
        qwen3(), tmp_path, reward=half, template=TEMPLATE, method=f"recipe_of_{page}:METHOD", max_steps=2, **options
    )
    start = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert all(math.isfinite(row["loss"]) for row in trainer.state.log_history if "loss" in row)
    assert any((a != b).any() for a, b in zip(start, trainer.model.parameters(), strict=True))


def test_there_is_a_recipe_for_each_extension_point():
    assert sorted(BLOCKS) == ["contexts", "divergence", "draw", "rows", "state", "terms"]


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.METHOD.name)
def test_every_method_is_a_short_file_with_its_equation(module):
    assert equation(module), "no indented block in the docstring"
    assert len(Path(module.__file__).read_text().splitlines()) < 80
    assert "Confidence: " in module.__doc__ or module.METHOD.name == "hsd_unpaired"  # which is ours
    name = Path(module.__file__).name
    assert f"`{module.METHOD.name}`" in PAGE and f"`{name}`" in PAGE


def test_the_command_lists_them(capsys):
    assert main(["methods"]) == 0
    listed = capsys.readouterr().out
    assert all(f"{name}: " in listed for name in METHODS)
    assert "scoring 2" in listed and "method_args.no_confidence" in listed and "teacher 8" in listed


PEERS = {"hsd", "hsd_unpaired", "sdpo", "mopd", "opcod", "ssopd", "rlrt", "rlcsd", "antisd"}
OPTIONAL = {"opsd", "grpo+opsd", "sdpg", "rlsd", "egrsd", "cl_egrsd", "vopd", "antisd"}  # the column "solution"


@pytest.mark.parametrize("name", METHODS)
def test_the_command_says_what_a_teacher_is_shown(name):
    found = reads(METHODS[name])
    assert found.peers is (name in PEERS) and ("peers" in needs(METHODS[name]).split(", ")) is (name in PEERS)
    assert found.columns == (METHODS[name].needs or (("solution",) if name in OPTIONAL else ()))
    assert ("column 'solution' (optional)" in needs(METHODS[name])) is (name in OPTIONAL)


def noting(view):
    yield [Ask("q")]
    return Drawn(notes=dict.fromkeys(range(4), view.texts[2]), rows={1: [Row("x", (Context(parts(plan="p")),))]})


@pytest.mark.parametrize(
    ("contexts", "columns", "peers"),
    [
        (lambda v: [Context(parts(a=v.row["x"], b=v.row.get("y")))], ("x", "y"), False),
        (lambda v: [Context(parts(a=v.rollout(v.i)))], (), False),  # its own
        (lambda v: [Context(parts(a=v.rollout((v.i + 1) % 4)))], (), True),
        (lambda v: [Context(parts(a=v.peer_ids))], (), False),  # none is drawn
        (lambda v: [Context(parts(a=f"as in {v.note}"))], (), True),
        (lambda v: [Context(parts(a=v.row["prompt"], b=v.row["answer"]))], (), False),
        (lambda v: [Context(parts(a=v.rollout(0)))] if v.row["n"] > 1 else [], ("n",), False),  # a text is no number
        (lambda v: [], (), False),
        (None, (), False),
    ],
)
def test_what_a_method_of_ones_own_reads(contexts, columns, peers):
    assert reads(Method("own", contexts, draw=noting)) == Reads(columns, peers)


@pytest.mark.parametrize(
    ("name", "passes"),
    [
        ("grpo", "student 1 (with gradient)"),
        ("dapo", "student 1 (with gradient)"),  # without rounds
        ("actguide", "student 1 (with gradient) + what it draws + reference 1"),
        ("hsd", "student 1 (with gradient) + teacher 1 + reference 1"),
        ("rlcsd", "student 1 (with gradient) + teacher 2"),
        ("egrsd", "student 1 (with gradient) + teacher 1 + scoring 2"),
    ],
)
def test_what_a_method_costs(name, passes):
    assert forwards(METHODS[name]) == passes
    config = HSDConfig("unused", method=name, bf16=False, use_cpu=True)
    assert ("what it draws" in passes) is config.draws
    assert ("reference 1" in passes) is bool(config.reference_coef)


@pytest.mark.parametrize("name", METHODS)
def test_the_command_shows_one(name, capsys):
    assert main(["methods", name]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"method: {name}\n")
    for setting in METHODS[name].settings:
        assert f"    {setting}: " in out


def test_an_unknown_method_is_one_line(capsys):
    assert main(["methods", "hsdd"]) == 2
    assert capsys.readouterr().err.startswith("error: method: expected one of hsd, ")
