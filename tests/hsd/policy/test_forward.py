"""Which positions of a batch predict a rollout, and what comes with another model's states."""

import dataclasses

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

from hsd.policy.body_and_head import BodyAndHead, body_and_head
from hsd.policy.forward import Prompts, RolloutInputs, forward_rollouts, with_own_head

D, V = 6, 11


def qwen3() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 4}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=V, num_attention_heads=4, num_key_value_heads=2, **sizes))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=16, n_layer=2, n_head=4, n_positions=32))


@pytest.mark.parametrize("build", [qwen3, gpt2])
def test_forward_rollouts_gives_the_states_that_predict_the_rollout(build):
    torch.manual_seed(1)
    model = build().float().eval()
    for p in model.parameters():
        nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.3)
    prompts, rollouts = [[2, 3, 4], [5]], [[6, 7, 8, 9], [10, 1]]
    ids = torch.tensor([[2, 3, 4, 6, 7, 8, 9], [0, 0, 5, 10, 1, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0, 0]])
    parts = body_and_head(model)
    with torch.no_grad():
        states = forward_rollouts(parts, ids, mask, 4)
        assert states.shape == (2, 4, 16)
        for prompt, rollout, h in zip(prompts, rollouts, states, strict=True):
            logits = model(input_ids=torch.tensor([prompt + rollout]), use_cache=False).logits[0]
            expected = logits[len(prompt) - 1 : -1]  # the last prompt token predicts the first of the rollout
            torch.testing.assert_close(h[: len(rollout)] @ parts.linear.weight.T, expected, rtol=1e-4, atol=1e-5)


def test_forward_rollouts_hands_back_the_heads_dtype_outside_of_autocast():
    class Wide(nn.Module):
        def forward(self, input_ids, attention_mask, use_cache):
            out = torch.ones(*input_ids.shape, D, dtype=torch.float32)
            return dataclasses.make_dataclass("Out", ["last_hidden_state"])(out)

    parts = BodyAndHead(Wide(), nn.Linear(D, V).bfloat16())
    ids = torch.ones(2, 4, dtype=torch.long)
    assert forward_rollouts(parts, ids, ids, 2).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert forward_rollouts(parts, ids, ids, 2).dtype == torch.float32


def test_another_model_brings_its_own_head_without_gradient():
    own = nn.Linear(D, V)
    states = with_own_head(BodyAndHead(nn.Identity(), own, 0.5, 3.0), torch.zeros(1, 2, D))
    assert states.head is not None and states.head.bias is not None
    assert torch.equal(states.head.weight, own.weight) and not states.head.weight.requires_grad
    assert torch.equal(states.head.bias, own.bias) and not states.head.bias.requires_grad
    assert (states.head.logit_scale, states.head.softcap) == (0.5, 3.0)
    bare = with_own_head(BodyAndHead(nn.Identity(), nn.Linear(D, V, bias=False)), torch.zeros(1, 2, D))
    assert bare.head is not None and bare.head.bias is None


def test_rows_of_rollout_inputs_are_computed_alike():
    torch.manual_seed(1)
    parts = body_and_head(qwen3().float().eval())
    prompts = {
        "student": Prompts(torch.tensor([[2, 3], [0, 5]]), torch.tensor([[1, 1], [0, 1]])),
        "teacher": Prompts(torch.tensor([[2, 3, 4], [5, 6, 7]]), torch.ones(2, 3, dtype=torch.long)),
    }
    inputs = RolloutInputs(prompts, torch.tensor([[6, 7], [8, 0]]), torch.tensor([[1, 1], [1, 0]]))
    with torch.no_grad():
        for who in prompts:
            whole = inputs.forward(parts, who)
            assert whole.shape == (2, inputs.length, 16)
            torch.testing.assert_close(inputs.rows([1]).forward(parts, who)[0, 0], whole[1, 0])
