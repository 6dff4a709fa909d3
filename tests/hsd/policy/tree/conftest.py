"""Tiny models from config, random groups, and an fp64 in which nothing is rounded to fp32 on the way."""

import importlib

import pytest
import torch
import transformers
from torch import nn

VOCABULARY = 61
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DEEPSEEK = {
    "kv_lora_rank": 8, "q_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "first_k_dense_replace": 1, "head_dim": 4, "num_key_value_heads": 4,
}  # fmt: skip
GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "resid_pdrop": 0.0,
    "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OPT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "dropout": 0.0, "word_embed_proj_dim": 32,
}  # fmt: skip
WINDOW = {"sliding_window": 5}
FAMILIES = {  # name: (class, options beyond SMALL, or all options)
    "llama": ("Llama", {"attention_bias": True}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}),
    "qwen3_moe": ("Qwen3Moe", EXPERTS),
    "mistral": ("Mistral", WINDOW),
    "mixtral": ("Mixtral", EXPERTS | WINDOW),
    "gemma2": ("Gemma2", WINDOW | {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3", WINDOW | {"query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]}),
    "gpt_oss": ("GptOss", EXPERTS | WINDOW),
    "phi3": ("Phi3", {}),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}),
    "cohere2": ("Cohere2", WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}),
    "granite": ("Granite", {"attention_multiplier": 0.3}),
    "smollm3": ("SmolLM3", {}),
    "glm4": ("Glm4", {}),
    "deepseek_v3": ("DeepseekV3", DEEPSEEK),
    "gpt2": ("GPT2", GPT2),
    "opt": ("OPT", OPT),
    "gpt_neox": ("GPTNeoX", {"hidden_dropout": 0.0}),
}
CLASS = {"gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"), "gpt2": ("GPT2Config", "GPT2LMHeadModel")}


def build_model(family, **changes):
    base, options = FAMILIES[family]
    if family not in ("gpt2", "opt"):
        options = SMALL | options
    config_name, model_name = CLASS.get(family, (f"{base}Config", f"{base}ForCausalLM"))
    torch.manual_seed(5)
    model = getattr(transformers, model_name)(getattr(transformers, config_name)(**options | changes))
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():  # far from the initial weights, at which attention is nearly uniform and hides mistakes
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.15)
    return model.eval()


@pytest.fixture
def build():
    return build_model


def tokens(generator, n):
    return torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()


def make_group(seed, question=9, rollouts=(7, 4, 11, 1, 7), contexts=(6, 8)):
    """Prompts, rollouts and teacher prompts: two contexts, some rollouts that begin alike, one that repeats another."""
    g = torch.Generator().manual_seed(seed)
    q = tokens(g, question)
    answers = [tokens(g, n) for n in rollouts]
    answers[1][:2] = answers[0][:2]
    answers[4] = list(answers[0])
    shown = [tokens(g, n) for n in contexts]
    teacher = [q + shown[0 if i else 1] for i in range(len(answers))]
    return [q] * len(answers), answers, teacher


@pytest.fixture
def group():
    return make_group


def plain_states(model, prompts, rollouts):
    """Each sequence by itself, in a batch of one without padding."""
    body = model.get_decoder() if hasattr(model, "get_decoder") else model.model
    out = []
    for p, o in zip(prompts, rollouts, strict=True):
        h = body(input_ids=torch.tensor([[*p, *o]]), use_cache=False).last_hidden_state[0]
        out.append(h[len(p) - 1 : len(p) - 1 + len(o)])
    return out


@pytest.fixture
def plain():
    return plain_states


@pytest.fixture
def true_fp64(monkeypatch):
    """RMSNorm and eager softmax compute in fp32 whatever comes: at 1e-13 that would drown everything else."""
    softmax = nn.functional.softmax

    def wide_softmax(x, dim=None, dtype=None, **kwargs):
        return softmax(x, dim=dim, dtype=x.dtype if x.dtype == torch.float64 else dtype, **kwargs)

    monkeypatch.setattr(nn.functional, "softmax", wide_softmax)
    for family in ("llama", "qwen3", "gemma2", "mistral"):
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        norm = next(getattr(module, n) for n in dir(module) if n.endswith("RMSNorm"))
        offset = 1.0 if family == "gemma2" else 0.0

        def forward(self, x, offset=offset):
            eps = self.eps if hasattr(self, "eps") else self.variance_epsilon
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (self.weight + offset)

        monkeypatch.setattr(norm, "forward", forward)
