"""What is not supported under sharding is refused by name, before anything is trained. The engines are only named here:
neither FSDP under accelerate nor DeepSpeed runs on a CPU."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.state import AcceleratorState

from hsd.train.config import HSDConfig
from hsd.train.limits import check_launch

PATH = Path(__file__).with_name("job.py")
spec = importlib.util.spec_from_file_location("hsd_refusals_job", PATH)
assert spec is not None and spec.loader is not None
job = importlib.util.module_from_spec(spec)
spec.loader.exec_module(job)


class Sharded(job.Recorder):
    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = True


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"teacher": "live", "reference_coef": 0.001}, "reference_coef"),
        ({"teacher": "fixed", "reference_coef": 0.0}, "teacher"),
        ({"teacher": "ema", "reference_coef": 0.0}, "teacher"),
        ({"teacher": "live", "reference_coef": 0.0, "peer_rule": "lowest_perplexity"}, "peer_rule"),
        ({"teacher": "live", "reference_coef": 0.0, "prefix_sharing": "tree"}, "prefix_sharing"),
    ],
)
def test_fsdp(options, named, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "Recorder", Sharded)
    with pytest.raises(ValueError, match=named):
        job.make(tmp_path, 4, **options)


def test_lora_needs_no_copy_under_fsdp(tmp_path, monkeypatch):
    monkeypatch.setattr(job, "Recorder", Sharded)
    trainer = job.make(tmp_path, 4, lora=True, teacher="fixed", reference_coef=0.001, prefix_sharing="none")
    assert not trainer.frozen.models


def test_the_launcher_is_asked_for_the_stage(tmp_path, monkeypatch):
    args = HSDConfig(str(tmp_path), teacher="live", reference_coef=0.0, bf16=False, use_cpu=True)
    check_launch(args, peft=False)
    args.deepspeed_plugin = SimpleNamespace(zero_stage=2)
    check_launch(args, peft=False)
    args.deepspeed_plugin = SimpleNamespace(zero_stage=3)
    with pytest.raises(ValueError, match="ZeRO stage 0 to 2, got 3"):
        check_launch(args, peft=False)


def test_zero_3(tmp_path, monkeypatch):
    class Stage3(job.Recorder):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.is_deepspeed_enabled = True
            plugin = SimpleNamespace(zero_stage=3)
            monkeypatch.setattr(AcceleratorState, "deepspeed_plugin", plugin, raising=False)

    monkeypatch.setattr(job, "Recorder", Stage3)
    with pytest.raises(ValueError, match="ZeRO stage 0 to 2, got 3"):
        job.make(tmp_path, 4, teacher="live", reference_coef=0.0)
