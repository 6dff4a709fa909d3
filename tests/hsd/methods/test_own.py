"""A method of the user's own, named as ``module:METHOD``."""

import re

import pytest
import torch
from tiny_runs import half, make, qwen3

from hsd.cli.__main__ import main
from hsd.methods import METHODS, method, module_of, title
from hsd.train.config import HSDConfig
from hsd.train.rules import ignored

OWN = '''"""Failures alone, on paper (nowhere).

    L = hsd's, over the failures
"""
from dataclasses import replace

from hsd.methods import METHODS

METHOD = replace(METHODS["hsd"], name="own")
OTHER = 3
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_of_a_test.py").write_text(OWN)
    (tmp_path / "broken_of_a_test.py").write_text("METHOD = (")
    return "own_of_a_test:METHOD"


def test_is_found_from_the_current_folder(own):
    assert method(own).name == "own" and title(own) == "Failures alone, on paper (nowhere)"
    assert module_of(own).OTHER == 3
    assert all(method(name) is METHODS[name] and module_of(name).METHOD is METHODS[name] for name in METHODS)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("hds", "method: expected one of hsd, .* or module:METHOD, the nearest is hsd, got 'hds'"),
        ("xyzzy", "method: expected one of hsd, .* or module:METHOD, got 'xyzzy'"),
        ("own_of_a_test:", "method: expected one of hsd, .* or module:METHOD, got 'own_of_a_test:'"),
        (":METHOD", "method: expected one of hsd, .* or module:METHOD, got ':METHOD'"),
        (["hsd"], r"method: expected one of hsd, .* or module:METHOD, got \['hsd'\]"),
        ("own_of_a_test:OTHER", "method: expected a hsd.methods.Method, got 'own_of_a_test:OTHER', which is 3"),
        ("own_of_a_test:NONE", "method: expected a hsd.methods.Method, got 'own_of_a_test:NONE', which is None"),
        ("no_such_module:METHOD", r"method: expected a module that can be imported, got .* \(No module named .*\)"),
        ("broken_of_a_test:METHOD", r"method: expected a module that can be imported, got .* \(.*never closed.*\)"),
    ],
)
def test_what_is_none_is_refused(own, name, said):
    with pytest.raises(ValueError, match=f"^{said}$"):
        HSDConfig("unused", bf16=False, use_cpu=True, method=name)
    assert ignored({"method": name}) == {}  # of another run: nothing is known


def test_trains_as_the_method_that_it_is(own, tmp_path):
    def trained(name):
        trainer = make(qwen3(), tmp_path / re.sub(r"\W", "_", name), reward=half, method=name, max_steps=2)
        trainer.train()
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

    assert torch.equal(trained(own), trained("hsd"))


def test_the_command_shows_it(own, capsys):
    assert main(["methods", own]) == 0
    out = capsys.readouterr().out
    assert out.startswith("method: own\n") and "L = hsd's, over the failures" in out
