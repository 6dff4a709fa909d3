"""What stands for the initial policy: adapters off where that is so, one file beside the checkpoints."""

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from tiny_runs import make, qwen3, start_adapters, with_lora

ROLES = [{"teacher": "fixed", "reference_coef": 0.0}, {"teacher": "live"}]  # as teacher, as reference


@pytest.mark.parametrize("options", ROLES)
def test_a_trained_adapter_is_refused(options, tmp_path):
    trained = with_lora(qwen3())
    start_adapters(trained)
    with pytest.raises(ValueError, match=r"^model: expected a fresh adapter"):
        make(trained, tmp_path, **options)


@pytest.mark.parametrize("start", [False, "pissa", "olora"])
def test_an_adapter_that_does_not_start_at_zero_is_refused(start, tmp_path):
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=start)
    with pytest.raises(ValueError, match=r"^model: expected a fresh adapter"):
        make(qwen3(), tmp_path, peft_config=config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [{}, {"use_dora": True}, {"use_rslora": True}, {"lora_dropout": 0.5}])
def test_a_fresh_one_is_not(kind, dtype, tmp_path):
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **kind)
    trainer = make(qwen3().to(dtype), tmp_path, peft_config=config, learning_rate=0.0)
    trainer.train()
    assert trainer.state.log_history[0]["hsd/reference_kl"] == pytest.approx(0.0, abs=1e-4)


def test_without_frozen_weights_any_adapter_will_do(tmp_path):
    trained = with_lora(qwen3())
    start_adapters(trained)
    make(trained, tmp_path, teacher="live", reference_coef=0.0).train()


def test_a_run_that_goes_on_in_another_folder_takes_its_initial_policy_along(tmp_path):
    options = {"teacher": "fixed", "save_strategy": "steps", "save_steps": 1}
    here, there = tmp_path / "here", tmp_path / "there"
    other = qwen3()
    torch.nn.init.normal_(other.model.embed_tokens.weight)
    make(other, there, **options).train()  # an older run's initial policy is in the way
    make(qwen3(), here, **options).train()
    make(qwen3(), there, max_steps=2, **options).train(resume_from_checkpoint=str(here / "checkpoint-1"))
    first, second = (load_file(folder / "initial_policy.safetensors") for folder in (here, there))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
