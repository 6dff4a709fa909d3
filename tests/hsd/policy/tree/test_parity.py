"""Tree against each sequence by itself: hidden states of both sides, and gradients."""

import pytest

from hsd.policy.tree.attention import enable_tree
from hsd.policy.tree.forward import tree_hidden_states

FP64 = ("qwen3", "llama", "gemma2", "mistral")
FAMILIES = (
    "llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "mixtral", "gemma2", "gemma3", "gpt_oss", "phi3", "olmo2",
    "olmo3", "cohere2", "granite", "smollm3", "glm4", "deepseek_v3", "gpt2", "opt", "gpt_neox",
)  # fmt: skip


def scalar(student, teacher):
    """A loss in which every hidden state of both sides takes part; the teacher is data."""
    return sum(
        (s * (i + 1.0)).sin().sum() + ((s - t.detach()) ** 2).sum()
        for i, (s, t) in enumerate(zip(student, teacher, strict=True))
    )


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def worst(got, expected):
    return max((a - b).abs().max().item() if len(a) else 0.0 for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("backend", ["dense", "gather"])
@pytest.mark.parametrize("sharing", ["tree", "prompt"])
@pytest.mark.parametrize("family", FP64)
def test_fp64(family, sharing, backend, build, group, plain, true_fp64):
    model = build(family).double()
    if family == "gemma2":
        model.set_attn_implementation("eager")  # SDPA would drop the soft cap
    prompts, rollouts, teacher = group(0)
    expected = plain(model, prompts, rollouts), plain(model, teacher, rollouts)
    exact = gradients(model, scalar(*expected))
    enable_tree(model)
    got = tree_hidden_states(model, prompts, rollouts, teacher, sharing=sharing, backend=backend)
    assert not got[1][0].requires_grad
    for a, b in zip(got, expected, strict=True):
        assert worst(a, b) < 1e-13
    grads = gradients(model, scalar(*got))
    assert grads.keys() == exact.keys()
    scale = max(g.abs().max() for g in exact.values())
    for name, g in exact.items():
        assert (grads[name] - g).abs().max() <= 1e-12 * scale, name


@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_families(family, build, group, plain):
    model = build(family)
    if family == "gemma2":
        model.set_attn_implementation("eager")
    prompts, rollouts, teacher = group(1)
    expected = plain(model, prompts, rollouts), plain(model, teacher, rollouts)
    enable_tree(model)
    for backend in ("dense", "gather"):
        got = tree_hidden_states(model, prompts, rollouts, teacher, backend=backend)
        scale = max(h.abs().max().item() for h in expected[1])
        assert worst(got[0], expected[0]) < 1e-4 * scale
        assert worst(got[1], expected[1]) < 1e-4 * scale
