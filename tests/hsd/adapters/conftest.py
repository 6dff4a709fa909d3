"""Tiny models of several families and a batch as TRL's collators pad it."""

import pytest
import torch
import transformers as hf
from tiny_runs import TOKENIZER

SMALL = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": TOKENIZER.eos_token_id,
    "pad_token_id": TOKENIZER.pad_token_id,
}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 128}
FAMILIES = {
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SMALL, head_dim=4, tie_word_embeddings=True)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**SMALL, head_dim=4, final_logit_softcapping=0.5)),
    "cohere": lambda: hf.CohereForCausalLM(hf.CohereConfig(**SMALL, logit_scale=0.125)),
    "granite": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**SMALL, logits_scaling=4.0)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**SMALL, **GPT2)),  # absolute positions
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**SMALL)),  # a bias in the head
}


@pytest.fixture
def build():
    def make(family="qwen3", seed=0, scale=8.0):
        """A model whose distributions differ visibly from uniform: its parameters are scaled up."""
        torch.manual_seed(seed)
        model = FAMILIES[family]().float().eval()
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() > 1:
                    p.mul_(scale)
                else:
                    p.add_(0.1 * torch.randn_like(p))
        return model

    return make


@pytest.fixture
def batch():
    """Prompts padded on the left, completions on the right, the teacher's prompts longer than the student's."""
    g = torch.Generator().manual_seed(1)
    rows, length = 4, 7

    def ids(*shape):
        return torch.randint(2, SMALL["vocab_size"], shape, generator=g)

    def left(lengths, width):
        return (torch.arange(width)[None] >= width - torch.tensor(lengths)[:, None]).long()

    completion_mask = (torch.arange(length)[None] < torch.tensor([7, 3, 5, 1])[:, None]).long()
    prompt_mask, teacher_mask = left([5, 3, 4, 2], 5), left([11, 6, 9, 8], 11)
    completion = ids(rows, length).where(completion_mask.bool(), torch.tensor(0))
    return {
        "prompt_ids": ids(rows, 5) * prompt_mask,
        "prompt_mask": prompt_mask,
        "completion_ids": completion,
        "completion_mask": completion_mask,
        "teacher_input_ids": torch.cat([ids(rows, 11) * teacher_mask, completion], 1),
        "teacher_attention_mask": torch.cat([teacher_mask, completion_mask], 1),
    }


@pytest.fixture
def gradients():
    """Loss and gradients of one call of ``compute_loss``."""

    def run(model, compute_loss):
        model.zero_grad()
        loss = compute_loss()
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    return run


@pytest.fixture
def assert_same():
    """Two results of `gradients`; a gradient's error counts relative to its parameter's largest entry."""

    def check(ours, theirs, rtol=2e-4):
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-6)
        assert ours[1].keys() == theirs[1].keys() and theirs[1]
        top = max(g.abs().max().item() for g in theirs[1].values())
        assert top > 0
        for name, g in theirs[1].items():
            gap = (ours[1][name] - g).abs().max().item()
            assert gap <= rtol * max(g.abs().max().item(), 1e-3 * top), (name, gap)

    return check


@pytest.fixture
def head_calls():
    """How often ``call()`` runs a model's head, which is what makes dense logits."""

    def count(model, call):
        calls = []
        hook = model.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
        try:
            call()
        finally:
            hook.remove()
        return len(calls)

    return count
