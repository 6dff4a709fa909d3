"""Every refusal by its reason, and a self-check that can fail."""

import pytest
import torch
import transformers
from peft import LoraConfig, OFTConfig, get_peft_model

import hsd.policy.tree.attention as attention
from hsd.policy.tree.attention import is_enabled
from hsd.policy.tree.check import self_check, use_tree, why_not

TINY = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}


@pytest.mark.parametrize("family", ["qwen3", "mistral", "gemma2", "gpt_oss", "gpt2", "opt", "deepseek_v3", "cohere2"])
def test_a_supported_model_passes(family, build):
    options = {"summary_first_dropout": 0.1} if family == "gpt2" else {}  # of a head that is not there
    model = build(family, **options)
    if family == "gemma2":
        model.set_attn_implementation("eager")
    windows = [m.sliding_window for m in model.modules() if hasattr(m, "sliding_window")]
    assert use_tree(model) is None
    assert is_enabled(model)
    assert [m.sliding_window for m in model.modules() if hasattr(m, "sliding_window")] == windows


def qwen3_next():
    config = transformers.Qwen3NextConfig(
        **TINY, layer_types=["linear_attention", "full_attention"], num_experts=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2,
        linear_num_value_heads=2, moe_intermediate_size=16, shared_expert_intermediate_size=16,
    )  # fmt: skip
    return transformers.Qwen3NextForCausalLM(config)


def bloom():
    config = transformers.BloomConfig(vocab_size=61, hidden_size=32, n_layer=1, n_head=4)
    return transformers.BloomForCausalLM(config)


def lora_dropout(build):
    return get_peft_model(build("llama"), LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj"]))


def without_positions(build):
    model = build("llama")
    model.model.forward = lambda input_ids, attention_mask=None, use_cache=False: None
    return model


def dbrx(attention=0.0, experts=0.0):
    options = {"d_model": 32, "n_heads": 4, "n_layers": 1, "max_seq_len": 64, "vocab_size": 61}
    attn = {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4, "attn_pdrop": attention}
    ffn = {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32, "moe_jitter_eps": experts}
    return transformers.DbrxForCausalLM(transformers.DbrxConfig(**options, attn_config=attn, ffn_config=ffn))


def oft(build):
    options = {"oft_block_size": 4, "module_dropout": 0.3, "target_modules": ["q_proj"]}
    return get_peft_model(build("llama"), OFTConfig(**options))


def _with(model, **options):
    for name, value in options.items():
        setattr(model.config, name, value)
    return model


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64, "factor": 2.0,
        "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}  # fmt: skip
REFUSED = {
    "state space": (lambda b: transformers.MambaForCausalLM(transformers.MambaConfig(**TINY)), "MambaForCausalLM"),
    "linear attention": (lambda b: qwen3_next(), "linear_attention|does not take"),
    "alibi": (lambda b: bloom(), "AttentionInterface"),
    "no positions": (without_positions, "takes no position_ids"),
    "dynamic rope": (lambda b: b("llama", rope_parameters=DYNAMIC), "'dynamic'"),
    "longrope": (lambda b: b("phi3", rope_parameters=LONG), "'longrope'"),
    "attention dropout": (lambda b: b("qwen3", attention_dropout=0.1), "attention_dropout=0.1"),
    "residual dropout": (lambda b: b("gpt2", resid_pdrop=0.2), "resid_pdrop=0.2"),
    "layer drop": (lambda b: b("opt", layerdrop=0.2), "layerdrop=0.2"),
    "LoRA dropout": (lora_dropout, "lora_dropout.*p=0.1"),
    "router loss": (lambda b: b("mixtral", output_router_logits=True), "auxiliary loss"),
    "router jitter": (lambda b: b("mixtral", router_jitter_noise=0.1), "router_jitter_noise"),
    "nested attention dropout": (lambda b: dbrx(attention=0.2), "0.2"),
    "nested jitter": (lambda b: dbrx(experts=0.1), "jitter.*0.1"),
    "dropout of PEFT's own": (oft, "drops with p=0.3"),
    "tuned temperature": (lambda b: _with(b("llama"), attn_temperature_tuning=True), "attn_temperature_tuning"),
    "chunked attention": (
        lambda b: _with_layers(b("llama"), ["chunked_attention", "full_attention"]),
        "chunked_attention",
    ),
    "flash attention": (lambda b: _with_attention(b("llama"), "flash_attention_2"), "attn_implementation.*flash"),
    "bidirectional": (lambda b: b("gemma3", use_bidirectional_attention=True), "left to right"),
}  # fmt: skip


def _with_layers(model, layers):
    model.config.layer_types = layers
    return model


def _with_attention(model, name):
    model.config._attn_implementation_internal = name  # set as if the package were installed
    return model


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_reason(case, build):
    make, reason = REFUSED[case]
    model = make(build)
    assert why_not(model) is not None or case == "flash attention"
    with pytest.warns(UserWarning, match=reason) as caught:
        assert use_tree(model)
    assert len([w for w in caught if "prefix sharing is off" in str(w.message)]) == 1
    assert not is_enabled(model)


def test_the_self_check_finds_a_layer_that_keeps_its_window_to_itself(build, monkeypatch):
    """A window that only the mask knows, as a model may have it, would be lost in a tree."""
    model = build("mistral")
    original = attention._attend

    def windowless(tree, q, k, v, scores):
        return original(tree, q, k, v, scores._replace(window=None))

    monkeypatch.setattr(attention, "_attend", windowless)
    with pytest.warns(UserWarning, match="differ by"):
        assert use_tree(model)
    assert model.config._attn_implementation == "sdpa"
    assert model.config.sliding_window == 5


def test_the_self_check_reports_an_argument_it_does_not_know(build, monkeypatch):
    model = build("llama")
    attend = attention.tree_attention
    monkeypatch.setattr(
        attention, "tree_attention", lambda *args, **kwargs: attend(*args, position_bias=torch.ones(1), **kwargs)
    )
    model.set_attn_implementation("eager")  # registered anew, with the changed function
    monkeypatch.setattr(attention, "PREFIX", "hsd_tree_test_")
    assert "position_bias" in str(use_tree_quietly(model))


def use_tree_quietly(model):
    with pytest.warns(UserWarning):
        return use_tree(model)


def test_the_self_check_notices_a_layer_that_ignores_the_tree(build, monkeypatch):
    model = build("llama")
    attention.enable_tree(model)
    own = type(model.model.layers[1]).forward

    def without_tree(self, *args, **kwargs):
        if self is model.model.layers[1]:
            kwargs.pop("tree", None)
        return own(self, *args, **kwargs)

    monkeypatch.setattr(type(model.model.layers[1]), "forward", without_tree)
    assert "failed" in self_check(model)


def test_a_check_leaves_no_trace(build):
    """Training mode, gradients and attention of a refused model are as before."""
    model = build("llama").train()
    assert use_tree(model) is None
    assert model.training and all(p.grad is None for p in model.parameters())
