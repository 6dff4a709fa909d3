"""Splitting a causal LM into body and head, against the model's own logits, for several model families."""

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny_runs import start_adapters
from torch import nn

from hsd.policy.body_and_head import BodyAndHead, body_and_head, check_body_and_head, hidden_states

VOCAB, PAD = 40, 0
IDS = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": PAD}
ROPE = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    **IDS,
}
OPT = {"ffn_dim": 24, "max_position_embeddings": 32, "word_embed_proj_dim": 8}
OWN_HEADS = {"num_key_value_heads": 4}
MAMBA = {"mamba_d_ssm": 16, "mamba_n_heads": 4, "mamba_d_head": 4, "mamba_d_state": 4, "mamba_chunk_size": 8}
MLA = {
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4, "head_dim": 4,
}  # fmt: skip
INKLING = {
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 4, "head_dim": 4, "d_rel": 4,
    "rel_extent": 16, "mlp_layer_types": ["dense", "dense"],
}  # fmt: skip
SEEN = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}

MODELS = {
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**ROPE, head_dim=4, tie_word_embeddings=True)),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**ROPE)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**ROPE, head_dim=4, final_logit_softcapping=1.5)),
    "cohere": lambda: hf.CohereForCausalLM(hf.CohereConfig(**ROPE, logit_scale=0.125)),
    "granite": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**ROPE, logits_scaling=4.0)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=4, n_positions=32, **IDS)
    ),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**(ROPE | OWN_HEADS))),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(**{k: v for k, v in ROPE.items() if k != "intermediate_size"}, **OPT)
    ),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**ROPE)),  # its head has a bias
    "falcon_h1": lambda: hf.FalconH1ForCausalLM(hf.FalconH1Config(**ROPE, **MAMBA, lm_head_multiplier=0.25)),
    "hyperclovax": lambda: hf.HyperCLOVAXForCausalLM(hf.HyperCLOVAXConfig(**ROPE, logits_scaling=0.25)),
    "minicpm3": lambda: hf.MiniCPM3ForCausalLM(hf.MiniCPM3Config(**(ROPE | OWN_HEADS), **MLA, dim_model_base=4)),
    "inkling": lambda: hf.InklingForCausalLM(hf.InklingTextConfig(**ROPE, **INKLING, logits_mup_width_multiplier=4.0)),
    "muse_glimmer": lambda: hf.MuseGlimmerForConditionalGeneration(
        hf.MuseGlimmerConfig(
            text_config={**ROPE, "head_dim": 4, "output_multiplier": 0.25, "final_logit_softcapping": 1.5},
            vision_config=SEEN,
        )
    ),
    "recurrent_gemma": lambda: hf.RecurrentGemmaForCausalLM(
        hf.RecurrentGemmaConfig(**(ROPE | {"num_hidden_layers": 3}), lru_width=16, logits_soft_cap=1.5)
    ),
    "xlstm": lambda: hf.xLSTMForCausalLM(
        hf.xLSTMConfig(**(SEEN | IDS), vocab_size=VOCAB, num_heads=4, chunk_size=8, output_logit_soft_cap=1.5)
    ),
}
FORM = {
    "gemma2": (1.0, 1.5), "cohere": (0.125, None), "granite": (0.25, None), "falcon_h1": (0.25, None),
    "hyperclovax": (0.25, None), "minicpm3": (0.25, None), "inkling": (0.25, None), "muse_glimmer": (0.25, 1.5),
    "recurrent_gemma": (1.0, 1.5), "xlstm": (1.0, 1.5),
}  # fmt: skip


def build(name: str) -> nn.Module:
    torch.manual_seed(1)
    return loud(MODELS[name]().float().eval())


def loud(model: nn.Module) -> nn.Module:
    """Weights large enough that positions, caps and scales all show in the logits."""
    for p in model.parameters():
        nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.3)
    return model


def remade(parts: BodyAndHead, hidden: torch.Tensor) -> torch.Tensor:
    """Logits by the formula in `BodyAndHead`'s docstring."""
    head = parts.head
    z = head.logit_scale * (hidden @ head.weight.T + (0.0 if head.bias is None else head.bias))
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


@pytest.mark.parametrize("name", MODELS)
def test_head_over_body_gives_the_models_logits(name):
    model = build(name)
    parts = body_and_head(model)
    assert (parts.logit_scale, parts.softcap) == FORM.get(name, (1.0, None))
    assert (parts.head.bias is not None) == (name == "phi")
    check_body_and_head(model, parts)
    ids = torch.randint(1, VOCAB, (2, 7), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        got = remade(parts, hidden_states(parts.body, ids, torch.ones_like(ids)))
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FORM)
@pytest.mark.parametrize("size", [1.0, 0.05], ids=["loud", "quiet"])
def test_a_forgotten_scale_or_cap_is_noticed(name, size):
    """At any magnitude of the logits: tiny ones must not hide in an absolute tolerance."""
    model = build(name)
    parts = body_and_head(model)
    if parts.softcap is None:
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(size)
            parts.linear.weight.mul_(size)
    with pytest.raises(ValueError, match=type(model).__name__):
        check_body_and_head(model, BodyAndHead(parts.body, parts.linear))


class Louder(hf.LlamaForCausalLM):
    """Does something to its logits that no config entry tells."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 1.5
        return out


@pytest.mark.parametrize("training", [True, False])
def test_an_unknown_transform_after_the_head_is_refused_by_name(training):
    torch.manual_seed(1)
    model = Louder(hf.LlamaConfig(**ROPE)).train(training)  # as transformers initialises it: logits of about 0.1
    with pytest.raises(ValueError, match="Louder changes its logits after the head"):
        check_body_and_head(model, body_and_head(model))
    assert model.training is training


def test_a_nan_model_is_refused():
    model = build("llama")
    nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(ValueError, match="LlamaForCausalLM"):
        check_body_and_head(model, body_and_head(model))


def test_dropout_does_not_disturb_the_check():
    torch.manual_seed(1)
    model = loud(hf.LlamaForCausalLM(hf.LlamaConfig(**ROPE, attention_dropout=0.9))).train()
    check_body_and_head(model, body_and_head(model))
    assert model.training


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_left_padding_changes_no_real_position(name):
    body = body_and_head(build(name)).body
    rows = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14]]
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    with torch.no_grad():
        padded = hidden_states(body, ids, mask)
        assert padded.shape == (3, width, 16)
        for row, h in zip(rows, padded, strict=True):
            alone = body(input_ids=torch.tensor([row]), use_cache=False).last_hidden_state[0]
            torch.testing.assert_close(h[-len(row) :], alone, rtol=1e-4, atol=1e-5)
        if name == "gpt2":  # where positions are absolute, counting them from the padding would show
            counted = body(input_ids=ids, attention_mask=mask, position_ids=torch.arange(width)[None])
            assert (counted.last_hidden_state[1, -3:] - padded[1, -3:]).abs().max() > 0.1


def test_the_body_of_a_peft_model_keeps_its_adapters():
    config = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(build("qwen3"), config).eval()
    start_adapters(model, std=0.3)
    parts = body_and_head(model)
    check_body_and_head(model, parts)
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        on = remade(parts, hidden_states(parts.body, ids, torch.ones_like(ids)))
        torch.testing.assert_close(on, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
        with model.disable_adapter():
            off = remade(parts, hidden_states(parts.body, ids, torch.ones_like(ids)))
    assert (on - off).abs().max() > 0.1


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"),
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
    ],
    ids=["lora", "modules_to_save"],
)
def test_a_head_with_an_adapter_is_refused(config):
    with pytest.raises(ValueError, match=r"LlamaForCausalLM\.get_output_embeddings\(\).*lm_head"):
        body_and_head(get_peft_model(build("llama"), config))


def test_a_prompt_that_lives_outside_the_body_is_refused():
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(build("llama"), config)
    with pytest.raises(ValueError, match="PeftModelForCausalLM"):
        check_body_and_head(model, body_and_head(model))


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (
            lambda: hf.ModernBertDecoderForCausalLM(hf.ModernBertDecoderConfig(**(IDS | SEEN), vocab_size=VOCAB)),
            "ModernBertDecoderForCausalLM to have no weights but .* some in lm_head",
        ),
        (
            lambda: hf.InklingForCausalLM(hf.InklingTextConfig(**ROPE, **INKLING, unpadded_vocab_size=VOCAB - 2)),
            "InklingForCausalLM to return a logit for each .* unpadded_vocab_size=38",
        ),
    ],
    ids=["a layer before the head", "rows without a logit"],
)
def test_what_no_split_describes_is_refused_without_running_the_model(model, named):
    """Sharded weights cannot be run for `check_body_and_head`."""
    with pytest.raises(ValueError, match=named):
        body_and_head(model())


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match="LlamaModel"):
        body_and_head(build("llama").model)
