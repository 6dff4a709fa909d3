"""A small model in place of a large one: the same class, kinds of layers and logit form, the same on every rank."""

import torch
from tiny_runs import qwen3, with_lora
from transformers import Gemma2Config, Gemma2ForCausalLM

from hsd.policy.body_and_head import body_and_head, check_body_and_head
from hsd.policy.stand_in import small_model
from hsd.policy.tree.check import try_tree


def test_it_is_small_and_the_same_each_time_and_draws_nothing():
    model = qwen3(num_hidden_layers=5, vocab_size=1000)
    adapted, before = with_lora(qwen3(2, num_hidden_layers=5, vocab_size=1000)), torch.get_rng_state()
    first, second = small_model(model), small_model(adapted)
    assert torch.equal(torch.get_rng_state(), before)
    assert type(first) is type(model) and first.config.hidden_size == model.config.hidden_size
    assert first.lm_head.weight.shape[0] == 128 and len(first.model.layers) == 2
    assert not any("lora" in name for name, _ in second.named_parameters())
    for a, b in zip(first.model.layers.parameters(), second.model.layers.parameters(), strict=True):
        assert torch.equal(a, b)
    check_body_and_head(first, body_and_head(first))
    assert try_tree(first) is None
    assert model.config.num_hidden_layers == 5  # the policy's own configuration is left alone


def test_every_kind_of_layer_and_the_soft_cap_are_there():
    kinds = ["full_attention"] * 3 + ["sliding_attention"] * 3
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Gemma2Config(vocab_size=50, num_hidden_layers=6, layer_types=kinds, head_dim=8, **sizes)
    model = small_model(Gemma2ForCausalLM(config))
    assert model.config.layer_types == kinds[:4] and len(model.model.layers) == 4
    parts = body_and_head(model)
    assert parts.softcap == config.final_logit_softcapping
    check_body_and_head(model, parts)
