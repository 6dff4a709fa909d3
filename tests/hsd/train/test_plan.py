"""The count of `hsd plan` against tiny models that are built, and by hand."""

from pathlib import Path

import pytest
import torch
from tiny_runs import LORA, STEP, TOKENIZER, qwen3, with_lora
from torch.overrides import TorchFunctionMode
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

from hsd.cli.__main__ import main
from hsd.train.config import HSDConfig
from hsd.train.limits import Engine
from hsd.train.plan import GB, Shape, engine_named, plan, shape_of

CONFIGS = Path(__file__).parents[3] / "configs"
SHAPE = Shape(1000, 1000, layer=100, hidden=10, vocabulary=20, layers=4, per_token=50)
HEAD = 10 * 20


@pytest.mark.parametrize("tied", [True, False])
def test_sizes_are_those_of_the_model(tied):
    model = qwen3(tie_word_embeddings=tied)
    shape = shape_of(model.config)
    assert shape.parameters == shape.trained == sum(p.numel() for p in model.parameters())
    assert shape.layer == sum(p.numel() for p in model.model.layers[0].parameters())
    assert (shape.vocabulary, shape.hidden) == tuple(model.lm_head.weight.shape)
    assert shape_of(model.config, LORA.r).trained == with_lora(model).get_nb_trainable_parameters()[0]


def items(engine, gpus=8, shape=SHAPE, **options):
    args = HSDConfig("out", **STEP | {"teacher": "live", "reference_coef": 0.0} | options)
    found = plan(args, shape, engine_named(engine), gpus, room=1000.0, weight_bytes=4, prompt=6)
    return {i.what: i.bytes for i in found.memory}, {i.what: i.bytes for i in found.traffic}, found


@pytest.mark.parametrize(
    ("engine", "weights", "gradients", "optimizer"),
    [("ddp", 4000, 4000, 8000), ("zero2", 4000, 500, 1000), ("zero3", 500, 500, 1000), ("fsdp2", 500, 500, 1000)],
)
def test_what_is_split(engine, weights, gradients, optimizer):
    memory, _, _ = items(engine, optim="adamw_torch")
    assert memory["weights"] == weights and memory["gradients"] == gradients
    assert memory["optimizer (two moments in fp32)"] == optimizer


def test_deepspeed_in_bf16_keeps_masters_and_averages():
    memory, _, _ = items("zero3", bf16=True, teacher="ema")
    assert memory["weights"] == memory["frozen policy: ema_teacher"] == 1000 * 2 / 8
    assert memory["fp32 masters of bf16 weights"] == memory["fp32 average of ema_teacher"] == 1000 * 4 / 8
    memory, _, _ = items("fsdp2", bf16=True, teacher="ema")
    assert memory["weights"] == memory["frozen policy: ema_teacher"] == 1000 * 4 / 8
    assert not any("average" in what for what in memory)


def test_lora_keeps_adapters_for_an_average_and_nothing_for_the_initial_policy():
    lora = Shape(1000, 40, layer=100, hidden=10, vocabulary=20, layers=4, per_token=50)
    assert items("fsdp2", shape=lora, teacher="ema")[0]["frozen policy: ema_teacher"] == 40 * 4 / 8
    assert not any("frozen" in what for what in items("fsdp2", shape=lora, teacher="fixed")[0])


def test_a_policy_gradient_has_a_fused_loss_too_unless_it_is_trls():
    of_loss = [{w for w in items("ddp", method="grpo", policy_loss=p)[0] if "loss: " in w} for p in ("auto", "trl")]
    assert of_loss[0] == {"fused loss: chunks", "fused loss: dW in fp32"}
    assert of_loss[1] == {"TRL's loss: tile of logits", "TRL's loss: dW in fp32"}


class Buffers(TorchFunctionMode):
    """The bytes of each matrix that `torch.empty` makes inside."""

    def __init__(self):
        super().__init__()
        self.bytes = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        made = func(*args, **kwargs or {})
        if func is torch.empty and made.dim() == 2:
            self.bytes.append(made.nbytes)
        return made


@pytest.mark.parametrize("batch", [8, 2048])  # of 9 tokens: fewer rows than TRL's tile has, and more
@pytest.mark.parametrize("bf16", [False, True])
def test_trls_own_loss_holds_the_tile_that_is_counted(batch, bf16):
    options = {"method": "grpo", "policy_loss": "trl", "bf16": bf16, "per_device_train_batch_size": batch}
    counted = items("ddp", **options)[0]
    assert counted["TRL's loss: dW in fp32"] == HEAD * 4
    hidden = torch.randn(batch * 9, 10, dtype=torch.bfloat16 if bf16 else torch.float32)
    weight, targets = torch.randn(20, 10).to(hidden), torch.zeros(batch * 9, dtype=torch.long)
    with Buffers() as buffers:
        ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE)
    assert buffers.bytes == [counted["TRL's loss: tile of logits"]]
    wide = items("ddp", cast_lm_head_to_fp32=True, **options)[0]
    assert wide["TRL's loss: tile of logits"] == counted["TRL's loss: tile of logits"] * (2 if bf16 else 1)


def test_trls_beta_keeps_a_reference_unless_adapters_off_are_one():
    lora = Shape(1000, 40, layer=100, hidden=10, vocabulary=20, layers=4, per_token=50)
    for beta, shape, kept in ((0.1, SHAPE, [500.0]), (0.0, SHAPE, []), (0.1, lora, [])):
        memory, traffic, _ = items("zero3", method="grpo", policy_loss="trl", beta=beta, shape=shape)
        assert [size for what, size in memory.items() if what.startswith("frozen policy")] == kept
        assert sum("TRL's reference" in what for what in traffic) == len(kept)


def test_traffic_grows_with_the_forward_passes():
    """Of 1,000 fp32 weights on 8 GPUs an all-gather sends 7/8."""
    once = 1000 * 4 * 7 / 8
    _, live, _ = items("zero3", gradient_accumulation_steps=3, per_device_train_batch_size=4)
    assert sum(live.values()) == once * 3 * (2 + 1 + 1)
    _, fixed, _ = items("zero3", teacher="fixed", reference_coef=0.1)
    assert sum(fixed.values()) == once * (2 + 1 + 1)  # teacher and reference are one policy
    assert items("zero3", gpus=1)[1] == {}


def test_deepspeed_without_zero_sends_what_ddp_does():
    args = HSDConfig("out", **STEP | {"teacher": "live", "reference_coef": 0.0})
    found = [
        plan(args, SHAPE, engine, 8, room=1000.0, weight_bytes=4, prompt=6).traffic
        for engine in (Engine(), Engine("deepspeed", zero={"stage": 0}))
    ]
    assert found[0] == found[1] and len(found[0]) == 1


def test_the_first_that_does_not_fit_is_named():
    _, _, found = items("fsdp2", optim="adamw_torch")
    assert found.first_too_much(found.total("update")) is None
    assert found.first_too_much(found.total("update") - 1).what.startswith("activations")
    assert found.first_too_much(1999).what.startswith("optimizer")
    assert found.first_too_much(2000).what.startswith("gathered layers")


@pytest.mark.parametrize(
    ("name", "engine"),
    [("qwen3_1.7b_lora_1gpu", "ddp"), ("qwen3_8b_8gpu_fsdp2", "fsdp2"), ("qwen3_32b_32gpu_zero3_vllm", "zero3")],
)
def test_the_shipped_configurations_are_counted(name, engine, tmp_path, capsys):
    qwen3().config.save_pretrained(tmp_path)
    words = ["plan", str(CONFIGS / f"{name}.yaml"), "--model.path", str(tmp_path), "--engine", engine, "--gpus", "8"]
    assert main([*words, "--memory", "80"]) == 0
    assert "fits in 80 GB" in capsys.readouterr().out
    assert main([*words, "--memory", str(100 / GB)]) == 1
    assert "the first that does not: weights" in capsys.readouterr().out


def test_bad_input_is_one_line(tmp_path, capsys):
    qwen3().config.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    config = str(CONFIGS / "qwen3_8b_8gpu_fsdp2.yaml")
    assert main(["plan", config, "--model.path", str(tmp_path), "--engine", "zero4"]) == 2
    assert "engine: expected one of ddp, zero1, zero2, zero3, fsdp2, got 'zero4'" in capsys.readouterr().err
    assert main(["plan", config, "--model.path", str(tmp_path), "--gpus", "0"]) == 2


def test_a_model_that_is_nowhere_is_named_as_it_was_given(monkeypatch, capsys):
    monkeypatch.setattr("hsd.policy.pretrained.no_answer", lambda repo: "ConnectError")
    config = str(CONFIGS / "qwen3_8b_8gpu_fsdp2.yaml")
    for words, key in (([], f"{config}: model.path"), (["--model", "Qwen/none"], "--model")):
        assert main(["plan", config, "--gpus", "8", *words]) == 2
        assert capsys.readouterr().err.startswith(f"error: {key}: expected a folder with a model, or a hub id, got ")
