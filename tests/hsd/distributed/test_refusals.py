"""What an engine rules out is refused by name before a model is loaded: here from settings and environment alone."""

from types import SimpleNamespace
from typing import Any

import pytest
from tiny_runs import STEP, half

from hsd.train.config import HSDConfig
from hsd.train.limits import Engine, check_engine, check_no_tensor_parallelism, launched
from hsd.train.trainer import HSDTrainer

LIVE = {"teacher": "live", "reference_coef": 0.0}
TWIN = {"teacher": "fixed", "reference_coef": 0.0}
FSDP2 = Engine("fsdp")


def zero(stage, **options):
    return Engine("deepspeed", zero={"stage": stage, **options})


def config(tmp_path, **options):
    return HSDConfig(str(tmp_path), **STEP | options)


@pytest.mark.parametrize(
    ("engine", "options", "named"),
    [
        (Engine("fsdp", fsdp_version=1), LIVE, "^fsdp_version: expected 2, got 1"),
        (FSDP2, LIVE | {"tree_token_budget": 40}, "^tree_token_budget: expected None under FSDP2"),
        (Engine("fsdp", fsdp_offload=True), TWIN, "^fsdp_offload_params: expected False"),
        (zero(3), LIVE | {"tree_token_budget": 40}, "^tree_token_budget: expected None under DeepSpeed ZeRO-3"),
        (zero(3, zero_hpz_partition_size=8), TWIN, "^deepspeed: expected no zero_hpz_partition_size"),
        (zero(3, offload_param={"device": "cpu"}), TWIN, "^deepspeed: expected no offload_param"),
    ],
)
def test_refused(engine, options, named, tmp_path):
    with pytest.raises(ValueError, match=named):
        check_engine(config(tmp_path, **options), engine, peft=False)


@pytest.mark.parametrize(
    ("engine", "options", "peft"),
    [
        (Engine("fsdp", fsdp_version=1), {"method": "grpo"}, False),  # its loss is TRL's
        (Engine("fsdp", fsdp_offload=True), LIVE, False),
        (zero(2), LIVE | {"tree_token_budget": 40}, False),
        (Engine(), LIVE | {"tree_token_budget": 40}, False),
        (zero(3, offload_param={"device": "cpu"}), LIVE, False),
        (zero(3, offload_param={"device": "cpu"}), TWIN, True),  # with LoRA the adapters off: no twin
        (zero(3, offload_param={"device": "none"}, zero_hpz_partition_size=1), TWIN, False),
    ],
)
def test_not_refused(engine, options, peft, tmp_path):
    check_engine(config(tmp_path, **options), engine, peft=peft)


def test_the_launcher_is_asked_for_the_engine(tmp_path, monkeypatch):
    args = config(tmp_path, **LIVE)
    assert launched(args) == Engine()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert launched(args) == Engine("fsdp", fsdp_version=1)  # accelerate's default
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert launched(args) == FSDP2
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    assert launched(args) == Engine("fsdp", fsdp_offload=True)
    args.deepspeed_plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 3}})
    assert launched(args).stage == 3


@pytest.mark.parametrize(
    ("options", "plugin", "named"),
    [
        ({"model_init_kwargs": {"tp_plan": "auto"}}, {}, "model_init_kwargs: expected no .*, got tp_plan='auto'$"),
        ({"parallelism_config": SimpleNamespace(tp_size=4)}, {}, "parallelism_config: expected no .*, got tp_size=4$"),
        ({}, {"tensor_parallel": {"autotp_size": 2}}, "deepspeed: expected no .*, got tp_size=2$"),
    ],
)
def test_tensor_parallelism_is_refused(options, plugin, named, tmp_path):
    args = config(tmp_path, **LIVE)
    for name, value in options.items():
        setattr(args, name, value)
    args.deepspeed_plugin = SimpleNamespace(deepspeed_config=plugin)
    with pytest.raises(ValueError, match=named):
        check_no_tensor_parallelism("a folder", args)


def test_a_trainer_refuses_a_model_that_ranks_share(tmp_path):
    model: Any = SimpleNamespace(tp_size=2)  # as transformers' tp_plan="auto" leaves it
    with pytest.raises(ValueError, match=r"^model: expected no tensor parallelism, .*, got tp_size=2$"):
        HSDTrainer(model, half, config(tmp_path, **LIVE))
