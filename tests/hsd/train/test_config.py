"""What `HSDConfig` declares of its fields is what it enforces."""

import dataclasses

import pytest
from trl.trainer.grpo_config import GRPOConfig

from hsd.methods import METHODS
from hsd.methods.method import REQUIRED
from hsd.train.config import HSDConfig, options, scheduled

INHERITED = {f.name for f in dataclasses.fields(GRPOConfig)}


def make(**given):
    return HSDConfig("unused", bf16=False, use_cpu=True, **given)


def test_every_field_of_its_own_is_declared_once():
    own = [f.name for f in dataclasses.fields(HSDConfig) if f.name not in INHERITED]
    declared = [o.name for o in options()]
    assert sorted(declared) == sorted([*own, "learning_rate", "top_p", "temperature", "max_completion_length"])
    assert all(o.help and not (o.choices and o.interval) for o in options())
    assert {o.name for o in options() if o.by_method} == set(METHODS["hsd"].defaults)


@pytest.mark.parametrize("name", [o.name for o in options() if o.choices])
def test_another_choice_is_refused(name):
    with pytest.raises(ValueError, match=rf"^{name}: expected one of \("):
        make(**{name: "another"})


@pytest.mark.parametrize("declared", [o for o in options() if o.interval], ids=lambda o: o.name)
def test_a_number_outside_its_interval_is_refused(declared):
    low, high = (float(end) for end in declared.interval[1:-1].split(","))
    outside = [float("nan"), "much", low if declared.interval[0] == "(" else low - 1.0]
    outside.append(high if declared.interval[-1] == ")" else high + 1.0)
    for value in outside:
        with pytest.raises(ValueError, match=rf"^{declared.name}: expected a number in "):
            make(**{declared.name: value})


def test_the_ends_of_an_interval_are_inside():
    assert make(jsd_beta=0.0).jsd_beta == 0.0 and make(jsd_beta=1.0).jsd_beta == 1.0
    assert make(trust_region_share=1.0).trust_region_share == 1.0
    assert make(memory_bytes=1).memory_bytes == 1


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_left_to_the_method_afterwards(method):
    required = {name: 1.0 for name, value in METHODS[method].settings.items() if value is REQUIRED}
    unpublished = {name: 1.0 for name, value in METHODS[method].defaults.items() if value is REQUIRED}
    config = make(method=method, method_args=required, **unpublished)
    for declared in options():
        if declared.by_method:
            assert getattr(config, declared.name) is not None, declared.name
    for name, value in METHODS[method].defaults.items():
        assert getattr(config, name) == unpublished.get(name, value), name
    assert config.has_teacher is (METHODS[method].contexts is not None)


@pytest.mark.parametrize("name", ["reference_ema_rate", "num_generations", "teachr"])
def test_a_method_decides_what_is_open_alone(name, tmp_path, monkeypatch):
    """Else its default would be ignored without a word."""
    own = f'replace(METHODS["hsd"], defaults={{"{name}": 0.5}})'
    own = f"from dataclasses import replace\n\nfrom hsd.methods import METHODS\n\nMETHOD = {own}\n"
    (tmp_path / f"decides_{name}.py").write_text(own)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=rf"^method: expected defaults of options that are None .* got '{name}' in "):
        make(method=f"decides_{name}:METHOD")


@pytest.mark.parametrize("bad", [[1.0, 0.0], [1.0, -1.0, 5], [1.0, 0.0, 0], "much"])
def test_a_schedule_is_a_number_or_three(bad):
    with pytest.raises(ValueError, match=r"^divergence_coef: expected a number in \[0, inf\) or \[start, end, steps\]"):
        make(divergence_coef=bad)
    assert [scheduled([1.0, 0.0, 4], step) for step in (0, 2, 4, 9)] == [1.0, 0.5, 0.0, 0.0]
