"""Packs of several groups, checkpointing, adapters, bf16, what is kept, and bad input."""

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from hsd.policy.tree.attention import enable_tree
from hsd.policy.tree.forward import (
    forward_live_teacher,
    forward_nodes,
    forward_student,
    make_tree_batch,
    rows_of,
    tree_hidden_states,
)


def loss_of(student, teacher):
    return sum((s.sin() + (s - t.detach()) ** 2).sum() for s, t in zip(student, teacher, strict=True))


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_close(got, expected, rtol=1e-3, atol=1e-5):
    assert got.keys() == expected.keys()
    scale = max(g.abs().max() for g in expected.values()).item()
    assert scale > 1e-3
    for name, g in expected.items():
        torch.testing.assert_close(got[name], g, rtol=rtol, atol=atol * scale, msg=name)


def test_two_groups_in_one_pack(build, group, plain):
    """Groups share what their token ids share, here the first two tokens, and do not see each other otherwise."""
    model = build("qwen3")
    one, two = group(20), group(21, question=5)
    for side in (two[0], two[2]):
        for p in side:
            p[:2] = one[0][0][:2]
    prompts, rollouts, teacher = (a + b for a, b in zip(one, two, strict=True))
    expected = plain(model, prompts, rollouts), plain(model, teacher, rollouts)
    exact = gradients(model, loss_of(*expected))
    enable_tree(model)
    got = tree_hidden_states(model, prompts, rollouts, teacher)
    for a, b in zip(got, expected, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    assert_close(gradients(model, loss_of(*got)), exact)
    tree = make_tree_batch(prompts, rollouts, teacher)
    assert (tree.trie.pos == 0).sum() == 1


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "gpt_oss"])
def test_gradient_checkpointing(family, reentrant, build, group, plain):
    model = build(family).train()
    model.enable_input_require_grads()
    prompts, rollouts, teacher = group(22)
    exact = gradients(model, loss_of(plain(model, prompts, rollouts), plain(model, teacher, rollouts)))
    enable_tree(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got = tree_hidden_states(model, prompts, rollouts, teacher)
    assert_close(gradients(model, loss_of(*got)), exact, atol=5e-5)


def test_adapters_and_tied_heads(build, group, plain):
    model = build("qwen3")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    prompts, rollouts, teacher = group(23)
    lora = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).train()
    inner = lora.get_base_model()
    exact = gradients(lora, loss_of(plain(inner, prompts, rollouts), plain(inner, teacher, rollouts)))
    enable_tree(lora)
    got = tree_hidden_states(lora, prompts, rollouts, teacher)
    assert_close(gradients(lora, loss_of(*got)), exact)
    with lora.disable_adapter(), torch.no_grad():
        off, _ = tree_hidden_states(lora, prompts, rollouts, teacher)
        torch.testing.assert_close(off[0], plain(inner, prompts, rollouts)[0], rtol=1e-4, atol=1e-4)
    assert (off[0] - got[0][0]).abs().max() > 0.1


def test_bf16_autocast_loses_no_more_than_the_unshared_forward(build, group, plain):
    model = build("llama")
    prompts, rollouts, teacher = group(24)
    exact = gradients(model, loss_of(plain(model, prompts, rollouts), plain(model, teacher, rollouts)))

    def error(states):
        with torch.autocast("cpu", torch.bfloat16):
            got = gradients(model, loss_of(*states()))
        return sum((got[n] - g).norm() ** 2 for n, g in exact.items()) ** 0.5

    unshared = error(lambda: (plain(model, prompts, rollouts), plain(model, teacher, rollouts)))
    enable_tree(model)
    shared = error(lambda: tree_hidden_states(model, prompts, rollouts, teacher))
    assert 0 < shared < 2 * unshared


def test_each_shared_token_is_computed_once(build, group):
    model = build("llama")
    enable_tree(model)
    prompts, rollouts, teacher = group(25)
    seen = []
    model.model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    tree_hidden_states(model, prompts, rollouts, teacher)

    def prefixes(sides):
        full = [[*p, *o[:-1]] for p, o in zip(sides, rollouts, strict=True)]
        return {tuple(s[:n]) for s in full for n in range(1, len(s) + 1)}

    student = prefixes(prompts)
    assert [len(s) for s in seen] == [len(student), len(prefixes(teacher) - student)]


def test_only_what_the_teacher_needs_is_kept(build, group):
    model = build("llama")
    enable_tree(model)
    prompts, rollouts, teacher = group(26)
    tree = make_tree_batch(prompts, rollouts, teacher)
    _, keys = forward_student(model.model, tree)
    assert sorted(tree.trie.pos[keys.nodes]) == list(range(9))  # the question
    assert not any(t.requires_grad for pair in keys.layers.values() for t in pair)


def test_a_forward_without_backward_leaves_nothing_behind(build, group):
    """A checkpointed layer's graph holds the view: a view that held the graph would close a cycle unseen by gc."""
    model = build("llama").train()
    enable_tree(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    first = np.arange(9)
    hidden, keys = forward_nodes(model.model, make_tree_batch(*group(29)).trie, first, keep=first)
    alive = [weakref.ref(t) for pair in keys.layers.values() for t in pair]
    assert hidden.requires_grad and len(alive) == 4
    del hidden, keys
    gc.collect()
    assert [r() for r in alive] == [None] * 4


def test_a_teacher_without_context_reads_nothing_and_equals_the_student(build, group):
    model = build("llama")
    enable_tree(model)
    prompts, rollouts, _ = group(27)
    tree = make_tree_batch(prompts, rollouts, prompts)
    assert len(tree.teacher_only) == 0
    hidden, keys = forward_student(model.model, tree)
    assert keys is None
    student = rows_of(hidden, tree.student_nodes, tree.student)
    for a, b in zip(forward_live_teacher(model.model, tree, hidden, keys), student, strict=True):
        assert torch.equal(a, b) and not a.requires_grad


def test_a_rollout_without_tokens_and_a_prompt_of_one(build, plain):
    """Masked rollouts come as empty lists."""
    model = build("llama")
    enable_tree(model)
    prompts, rollouts, teacher = [[7], [7], [8, 9]], [[3, 4, 5], [], [6]], [[7, 9], [7, 9], [8, 9, 4]]
    student, taught = tree_hidden_states(model, prompts, rollouts, teacher)
    assert [len(s) for s in student] == [len(s) for s in taught] == [3, 0, 1]
    torch.testing.assert_close(student[0], plain(model, prompts[:1], rollouts[:1])[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(taught[2], plain(model, teacher[2:], rollouts[2:])[0], rtol=1e-4, atol=1e-4)


def test_the_example_in_the_documentation_runs():
    page = (Path(__file__).parents[4] / "docs" / "prefix_tree.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(code, names)
    assert names["loss"].item() > 0 and names["model"].model.embed_tokens.weight.grad.abs().max() > 0


def test_bad_input_is_named(build, group):
    model = build("llama")
    enable_tree(model)
    prompts, rollouts, teacher = group(28)
    with pytest.raises(ValueError, match="teacher_prompts"):
        tree_hidden_states(model, prompts, rollouts, teacher[:2])
    with pytest.raises(ValueError, match="prompts: expected at least one token"):
        tree_hidden_states(model, [[]] * 5, rollouts, teacher)
    with pytest.raises(ValueError, match="sharing"):
        tree_hidden_states(model, prompts, rollouts, teacher, sharing="forest")
    with pytest.raises(ValueError, match="backend"):
        tree_hidden_states(model, prompts, rollouts, teacher, backend="fast")
    with pytest.raises(TypeError, match="token ids"):
        make_tree_batch([["a"]], [[1]])
    assert isinstance(make_tree_batch(prompts, rollouts).student[0], np.ndarray)
