"""Every shipped configuration: read, validated, an HSDConfig, the paper's settings, and a launch line that exists."""

from pathlib import Path

import pytest
import yaml

from hsd.cli.folder import as_yaml
from hsd.cli.prepare import prepare
from hsd.cli.settings import load

ROOT = Path(__file__).parents[3]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
PAPER = {  # arXiv 2606.15576
    "num_generations": 8,
    "temperature": 1.0,
    "top_p": 0.95,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-8,
    "weight_decay": 0.0,
    "lr_scheduler_type": "constant",
    "bf16": True,
    "method": "hsd",
    "teacher": "live",
    "divergence": "forward_kl",
}


def run_of(path, *overrides):
    return prepare(load(path, overrides), path.stem, source=str(path), check=True)


def processes(path):
    """Of the accelerate configuration in a file's launch line, which must exist; 1 without one."""
    words = path.read_text().splitlines()[0].removeprefix("# ").split()
    assert str(path.relative_to(ROOT)) in words
    if words[0] == "hsd":
        return 1
    assert words[:3] == ["accelerate", "launch", "--config_file"] and "hsd.cli" in words
    return yaml.safe_load((ROOT / words[3]).read_text())["num_processes"]


def test_there_are_configurations():
    names = {path.name for path in CONFIGS}
    assert names >= {"cpu_demo.yaml", "qwen3_1.7b_lora_1gpu.yaml"}
    assert names >= {"qwen3_8b_8gpu_fsdp2.yaml", "qwen3_32b_32gpu_zero3_vllm.yaml"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_configuration_becomes_an_hsd_config_and_reads_back(path, tmp_path):
    run = run_of(path)
    config = run.config
    assert config.output_dir == f"runs/{path.stem}"
    assert config.generation_batch_size % config.num_generations == 0
    assert processes(path) >= 1
    again = tmp_path / "again.yaml"
    again.write_text(as_yaml(run))
    assert yaml.safe_load(as_yaml(run_of(again))) == yaml.safe_load(again.read_text())


@pytest.mark.parametrize("path", [p for p in CONFIGS if p.stem.startswith("qwen3")], ids=lambda p: p.stem)
def test_the_papers_settings(path):
    config = run_of(path).config
    assert {name: getattr(config, name) for name in PAPER} == PAPER
    if "lora" not in path.stem:
        rollouts = config.per_device_train_batch_size * config.gradient_accumulation_steps * processes(path)
        assert rollouts == 128 * 8
        assert config.learning_rate == 1e-6 and config.max_steps == 1500 and config.max_completion_length == 4096


def test_reference_coefficients_are_the_papers():
    assert {run_of(path).config.reference_coef for path in CONFIGS if path.stem.startswith("qwen3")} == {0.001}


def test_what_the_config_refuses_is_named_with_its_file():
    path = ROOT / "configs" / "cpu_demo.yaml"
    with pytest.raises(ValueError, match=r"cpu_demo\.yaml: train\.kl_temperature: expected a number in \(0, inf\)"):
        run_of(path, "--kl_temperature", "0")
    with pytest.raises(ValueError, match=r"cpu_demo\.yaml: train\.beta: expected 0"):
        run_of(path, "--beta", "0.1")
    with pytest.raises(ValueError, match=r"cpu_demo\.yaml: train\.save_strategy: expected one of no, .*'sometimes'"):
        run_of(path, "--save_strategy", "sometimes")
    no_key = r"cpu_demo\.yaml: train: --load_best_model_at_end requires"  # transformers' own error
    with pytest.raises(ValueError, match=no_key):
        run_of(path, "--load_best_model_at_end", "true")
