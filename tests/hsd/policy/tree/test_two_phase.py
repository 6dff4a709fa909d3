"""The two-phase backward gives the gradient of the whole, whatever the budget, and holds no more than a chunk."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hsd.policy.body_and_head import body_and_head
from hsd.policy.tree.attention import enable_tree
from hsd.policy.tree.forward import make_tree_batch
from hsd.policy.tree.two_phase import chunks_of, two_phase_loss


def share(indices, student, teacher):
    """Each rollout's part of a loss in which every hidden state takes part."""
    parts = zip(indices, student, teacher, strict=True)
    return sum((s * (i + 1.0)).sin().sum() + ((s - t) ** 2).sum() for i, s, t in parts)


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def two_groups(group):
    return [a + b for a, b in zip(group(2), group(3, question=4), strict=True)]


@pytest.mark.parametrize("budget", [1, 30, 10_000])
@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_gradient_of_the_whole(family, budget, build, group, plain, true_fp64):
    model = build(family).double()
    prompts, rollouts, teacher = two_groups(group)
    expected = share(
        range(len(rollouts)), plain(model, prompts, rollouts), [t.detach() for t in plain(model, teacher, rollouts)]
    )
    expected.backward()
    exact = gradients(model)
    model.zero_grad()
    enable_tree(model)
    body = body_and_head(model).body
    tree = make_tree_batch(prompts, rollouts, teacher)
    loss = two_phase_loss(model, body, tree, share, budget)
    assert all(p.grad is None for p in model.parameters())  # nothing before backward
    (0.5 * loss).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-13)
    got = gradients(model)
    assert got.keys() == exact.keys()
    scale = max(g.abs().max() for g in exact.values())
    for name, g in exact.items():
        assert (2 * got[name] - g).abs().max() <= 1e-12 * scale, name


@pytest.mark.parametrize("lora", [False, True])
def test_with_checkpointing_and_adapters(lora, build, group, plain):
    model = build("llama").train()
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    prompts, rollouts, teacher = group(4)
    inner = model.get_base_model() if lora else model
    with torch.no_grad():
        seen = plain(inner, teacher, rollouts)
    share(range(len(rollouts)), plain(inner, prompts, rollouts), seen).backward()
    exact = gradients(model)
    model.zero_grad()
    enable_tree(model)
    inner.gradient_checkpointing_enable({"use_reentrant": False})
    tree = make_tree_batch(prompts, rollouts, teacher)
    two_phase_loss(model, body_and_head(model).body, tree, share, 20).backward()
    got = gradients(model)
    assert got.keys() == exact.keys()
    scale = max(g.abs().max() for g in exact.values())
    for name, g in exact.items():
        torch.testing.assert_close(got[name], g, rtol=1e-3, atol=2e-5 * scale.item(), msg=name)


def test_a_detached_prefix_would_lose_gradient(build, group, monkeypatch):
    """What the last step is for: without it the prompt's tokens teach nothing, and the test above would see it."""
    model = build("qwen3")
    enable_tree(model)
    tree = make_tree_batch(*group(5))
    body = body_and_head(model).body

    def norm():
        model.zero_grad()
        two_phase_loss(model, body, tree, share, 20).backward()
        return torch.cat([g.flatten() for g in gradients(model).values()])

    whole = norm()
    monkeypatch.setattr("hsd.policy.tree.two_phase.zip", lambda *a, **k: (), raising=False)  # no root is reached
    assert (norm() - whole).norm() > 0.1 * whole.norm()


def test_chunks_keep_the_budget(build, group):
    tree = make_tree_batch(*two_groups(group))
    visits = tree.trie.visits(range(len(tree.student)))
    chunks = chunks_of(tree, visits, 60)
    assert [i for c in chunks for i in c] == list(range(10))
    assert 1 < len(chunks) < 10
    for c in chunks:
        cost = sum(int((visits[tree.trie.path[i]] < 2).sum()) + len(tree.trie.path[10 + i]) for i in c)
        assert cost <= 60 or len(c) == 1


def test_no_forward_is_larger_than_trunk_or_chunk(build, group):
    model = build("llama")
    enable_tree(model)
    tree = make_tree_batch(*two_groups(group))
    sizes = []
    model.model.register_forward_pre_hook(
        lambda m, args, kwargs: sizes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    two_phase_loss(model, model.model, tree, share, 40)
    visits = tree.trie.visits(range(10))
    assert sizes[0] == (visits > 1).sum()
    assert max(sizes) <= max(sizes[0], 40) and len(sizes) > 4


@pytest.mark.parametrize("rollouts", [[[], [4, 5, 6, 7], []], [[4, 5, 6, 7], [], [8]]])
def test_rollouts_without_tokens_and_nothing_shared(rollouts, build, plain):
    model = build("llama")
    prompts, teacher = [[7], [8], [9]], [[7, 3], [8, 3], [9, 3]]
    alive = [i for i, o in enumerate(rollouts) if o]
    sides = ([s[i] for i in alive] for s in (prompts, teacher, rollouts))
    q, t, o = sides
    expected = share(alive, plain(model, q, o), [h.detach() for h in plain(model, t, o)])
    enable_tree(model)
    tree = make_tree_batch(prompts, rollouts, teacher)
    assert two_phase_loss(model, model.model, tree, share, 1).item() == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(ValueError, match="with tokens"):
        two_phase_loss(model, model.model, make_tree_batch(prompts, [[]] * 3, teacher), share, 1)


def test_refusals_are_named(build, group):
    model = build("llama").train()
    enable_tree(model)
    tree = make_tree_batch(*group(6))
    with pytest.raises(ValueError, match="budget"):
        two_phase_loss(model, model.model, tree, share, 0)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant"):
        two_phase_loss(model, model.model, tree, share, 50)
