"""The notebook and the reward of one's own in examples/; `make release-check` runs the notebook."""

import ast
import importlib
import inspect
import json
from pathlib import Path

import pytest
from test_release import check

from hsd.cli.__main__ import main

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def test_there_is_a_notebook():
    assert [path.name for path in NOTEBOOKS] == ["first_steps.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_code_without_outputs(path):
    code = check.notebook_code(path.read_text(encoding="utf-8"))
    names = {node.module for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)}
    assert {"hsd_kernels", "hsd", "hsd.viewer.make"} <= names


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_what_a_notebook_uses_of_us_exists(path):
    tree = ast.parse(check.notebook_code(path.read_text(encoding="utf-8")))
    ours = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hsd"):
            for alias in node.names:
                module = importlib.import_module(node.module)
                found = getattr(module, alias.name, None) or importlib.import_module(f"{node.module}.{alias.name}")
                ours[alias.asname or alias.name] = found
    used = [
        (n.value.id, n.attr) for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)
    ]
    of_modules = [(name, attr) for name, attr in used if inspect.ismodule(ours.get(name))]
    assert of_modules and all(hasattr(ours[name], attr) for name, attr in of_modules)


def notebook(**changes):
    cell = {"cell_type": "code", "execution_count": None, "outputs": [], "source": ["a = 1\n", "b = a"]} | changes
    return json.dumps({"cells": [{"cell_type": "markdown", "source": ["# a"]}, cell, cell]})


def test_cells_run_one_after_the_other():
    assert check.notebook_code(notebook()) == "a = 1\nb = a\n\na = 1\nb = a\n"
    for changes in ({"outputs": [{"output_type": "stream"}]}, {"execution_count": 3}):
        with pytest.raises(ValueError, match="code cell 1: expected no output and no execution count"):
            check.notebook_code(notebook(**changes))


def test_a_reward_of_ones_own(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT)
    from examples.own_reward import equation_alone

    replies = {
        "17 + 8 = 25": 1.0,
        " 17+8=25.\n": 1.0,
        "17 + 8 = 25, so": 0.5,
        "25": 0.5,
        "16 + 8 = 25": 0.5,
        "24": 0.0,
        "": 0.0,
    }
    assert equation_alone([*replies], ["25"] * 7, kind=["math"] * 7) == [*replies.values()]
    assert equation_alone([[{"role": "assistant", "content": "17 + 8 = 25"}]], ["25"]) == [1.0]
    assert main(["train", "examples/own_reward.yaml", "--check", "--output_dir", str(tmp_path)]) == 0
    assert "reward equation_alone" in capsys.readouterr().err
