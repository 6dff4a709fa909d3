"""Frozen policies: copies, the EMA, and a file that appears whole or not at all."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hsd.policy import sharding
from hsd.policy.frozen import adapter_parameters, add_frozen_adapter, ema_update_, frozen_copy, under_adapter


def build(seed: int, tied: bool = True, hidden: int = 16, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=hidden,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).to(dtype)


def shards(model: nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {name: (p, p.detach()) for name, p in model.named_parameters()}


def save_policy(model: nn.Module, path) -> None:
    sharding.save_policy(sharding.Whole(), shards(model), path)


def load_policy_(model: nn.Module, path) -> None:
    sharding.load_policy_(sharding.Whole(), shards(model), path, type(model).__name__)


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load(tied, tmp_path):
    path = tmp_path / "not" / "there" / "policy.safetensors"
    source, target = build(1, tied), build(2, tied)
    save_policy(source, path)
    assert [p.name for p in path.parent.iterdir()] == ["policy.safetensors"]  # no .part is left
    assert ("lm_head.weight" in load_file(path)) is not tied
    load_policy_(target, path)
    assert_same(values(target), values(source))
    assert (target.lm_head.weight is target.model.embed_tokens.weight) is tied
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(target(ids).logits, source(ids).logits)


def test_a_saved_policy_is_replaced_and_keeps_its_dtype(tmp_path):
    path = tmp_path / "policy.safetensors"
    save_policy(build(1, dtype=torch.bfloat16), path)
    second = build(2, dtype=torch.bfloat16)
    save_policy(second, path)
    assert_same(load_file(path), values(second))
    target = build(3)
    load_policy_(target, path)
    assert target.lm_head.weight.dtype == torch.float32
    assert torch.equal(target.lm_head.weight, second.lm_head.weight.float())


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "policy.safetensors"
    first = build(1)
    save_policy(first, path)

    def crash(tensors, where):
        where.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(sharding, "save_file", crash)
    with pytest.raises(OSError, match="no space"):
        save_policy(build(2), path)
    assert_same(load_file(path), values(first))


@pytest.mark.parametrize("other", [{"tied": False}, {"hidden": 32}, {"hidden": 8}], ids=["more", "wider", "narrower"])
def test_other_parameters_are_refused_and_nothing_is_copied(other, tmp_path):
    path = tmp_path / "policy.safetensors"
    save_policy(build(1), path)
    target = build(2, **other)
    before = values(target)
    with pytest.raises(ValueError, match=r"policy\.safetensors: expected the parameters of LlamaForCausalLM"):
        load_policy_(target, path)
    assert_same(values(target), before)


def test_a_part_is_checked_by_the_whole_tensors_shape(tmp_path):
    """ZeRO-3's parameters look empty outside a forward: a file of empty tensors must not pass."""
    held, p = sharding.Zero3(None, lambda *_: None, None), SimpleNamespace(ds_id=0, ds_shape=torch.Size([4, 3]))
    shards = {"weight": (p, torch.zeros(6))}
    save_file({"weight": torch.empty(0)}, tmp_path / "empty")
    with pytest.raises(ValueError, match=r"differs in \['weight'\]"):
        sharding.load_policy_(held, shards, tmp_path / "empty", "X")


def test_a_parameter_that_would_broadcast_is_refused(tmp_path):
    path = tmp_path / "policy.safetensors"
    save_policy(nn.Linear(1, 4), path)
    with pytest.raises(ValueError, match=r"expected the parameters of Linear, differs in \['weight'\]"):
        load_policy_(nn.Linear(3, 4), path)


@pytest.mark.parametrize("rate", [0.0, 0.25, 1.0])
def test_ema_update(rate):
    teacher, student = build(1), build(2)
    old, new = values(teacher), values(student)
    ema_update_(list(teacher.parameters()), list(student.parameters()), rate)
    for name, p in teacher.named_parameters():
        torch.testing.assert_close(p, (1 - rate) * old[name] + rate * new[name])
    assert_same(values(student), new)


def test_ema_moves_a_tied_weight_once_and_makes_no_gradient():
    teacher, student = frozen_copy(build(1)), build(2)
    old = teacher.lm_head.weight.clone()
    ema_update_(list(teacher.parameters()), list(student.parameters()), 0.5)
    assert teacher.lm_head.weight is teacher.model.embed_tokens.weight
    torch.testing.assert_close(teacher.lm_head.weight, 0.5 * old + 0.5 * student.lm_head.weight.detach())
    assert not any(p.requires_grad for p in teacher.parameters())


def test_ema_of_other_models_is_refused():
    with pytest.raises(RuntimeError, match="same number of tensors"):
        ema_update_(list(build(1).parameters()), list(build(2, tied=False).parameters()), 0.5)
    with pytest.raises(RuntimeError, match="dtype"):
        ema_update_(list(build(1).parameters()), list(build(2, dtype=torch.bfloat16).parameters()), 0.5)


def test_a_frozen_copy_is_independent():
    model = build(1).train()
    twin = frozen_copy(model)
    before = values(model)
    assert_same(values(twin), before)
    assert not twin.training and model.training
    assert not any(p.requires_grad for p in twin.parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    assert_same(values(twin), before)


def test_a_frozen_adapter_is_read_as_itself_and_changes_nothing_else():
    """Beside a model whose only adapter has those weights."""
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(3)
    model, alone = get_peft_model(build(1), config), get_peft_model(build(1), config)
    alone.load_state_dict(model.state_dict())
    add_frozen_adapter(model, "average")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".default." in name for name in trained)
    ids = torch.tensor([[1, 2, 3]])
    before = model(ids).logits
    with torch.no_grad():
        for p in adapter_parameters(model, "default").values():
            p.add_(0.1)
    assert not torch.allclose(model(ids).logits, before)
    with under_adapter(model, "average"):
        torch.testing.assert_close(model(ids).logits, alone(ids).logits, rtol=0, atol=0)
        assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    assert not torch.allclose(model(ids).logits, before)


def test_a_wrapper_that_was_set_on_the_model_does_not_bind_its_copy_to_it():
    """As accelerate's mixed precision does: the copied wrapper would still call the model that is trained."""
    model = build(1)
    own = model.forward
    model.forward = lambda *args, **kwargs: own(*args, **kwargs)
    twin, ids = frozen_copy(model), torch.tensor([[3, 4, 5]])
    before = twin(ids).logits
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    assert torch.equal(twin(ids).logits, before)
    assert not torch.equal(model(ids).logits, before)
