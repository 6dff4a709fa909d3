"""What goes silently wrong with prefix sharing: each mistake is made once, measured, and not made by the tree."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import AttentionInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import hsd.policy.tree.attention as attention
from hsd.policy.tree.attention import disable_tree, enable_tree, gather_attention, visible
from hsd.policy.tree.check import why_not
from hsd.policy.tree.forward import forward_student, make_tree_batch, make_view, rows_of, tree_hidden_states
from hsd.policy.tree.view import Scores

BAD = 0.1  # of hidden states whose entries are about 1; rounding is at 1e-5


def gap(got, expected):
    return max((a - b).abs().max().item() for a, b in zip(got, expected, strict=True))


def maskless():
    """SDPA under a name for which no mask function is registered."""
    AttentionInterface.register("hsd_test_maskless", sdpa_attention_forward)
    return "hsd_test_maskless"


def student_tree(group, seed=10):
    prompts, rollouts, _ = group(seed)
    return prompts, rollouts, make_tree_batch(prompts, rollouts)


def by_hand(model, tree, **changes):
    """The tree through the model's own attention with a hand-made 4D mask; ``changes`` make the mistake."""
    view = make_view(tree.trie, tree.student_nodes, None, None, "cpu")
    kwargs = {
        "input_ids": torch.from_numpy(tree.trie.ids)[None],
        "position_ids": view.pos[None],
        "attention_mask": visible(view, None)[None, None],
    } | changes
    hidden = model.model(**{k: v for k, v in kwargs.items() if v is not None}, use_cache=False).last_hidden_state[0]
    return rows_of(hidden, tree.student_nodes, tree.student)


def tree_is_right(model, tree, expected):
    enable_tree(model)
    for backend in ("dense", "gather"):
        hidden, _ = forward_student(model.model, tree, backend=backend)
        assert gap(rows_of(hidden, tree.student_nodes, tree.student), expected) < 1e-4


@torch.no_grad()
def test_default_positions_and_a_missing_mask(build, group, plain):
    """Positions count along the tree, or packed sequences are detected where a position does not follow the last."""
    model = build("qwen3")
    prompts, rollouts, tree = student_tree(group)
    expected = plain(model, prompts, rollouts)
    assert gap(by_hand(model, tree), expected) < 1e-4
    assert gap(by_hand(model, tree, position_ids=None), expected) > BAD
    assert gap(by_hand(model, tree, attention_mask=None), expected) > BAD
    ones = torch.ones(1, len(tree.trie), dtype=torch.long)
    assert gap(by_hand(model, tree, attention_mask=ones), expected) > BAD
    tree_is_right(model, tree, expected)


@torch.no_grad()
def test_one_mask_for_all_layers_and_a_window_on_the_packed_index(build, group, plain):
    model = build("mistral")
    prompts, rollouts, tree = student_tree(group)
    expected = plain(model, prompts, rollouts)
    view = make_view(tree.trie, tree.student_nodes, None, None, "cpu")
    assert gap(by_hand(model, tree), expected) > BAD  # a 4D mask is taken as it is: no window
    packed = visible(view, None) & (view.node[:, None] - view.key_node < model.config.sliding_window)
    assert gap(by_hand(model, tree, attention_mask=packed[None, None]), expected) > BAD
    by_depth = visible(view, model.config.sliding_window)
    assert gap(by_hand(model, tree, attention_mask=by_depth[None, None]), expected) < 1e-4
    tree_is_right(model, tree, expected)


@torch.no_grad()
def test_a_cache_that_is_reused_and_a_cache_that_is_dropped(build, group, plain):
    model = build("llama")
    prompts, rollouts, tree = student_tree(group)
    expected = plain(model, prompts, rollouts)
    q = prompts[0]

    def suffix(rollout, cache):
        at = torch.arange(len(q), len(q) + len(rollout))[None]
        ids = torch.tensor([rollout])
        return model.model(input_ids=ids, position_ids=at, past_key_values=cache, use_cache=True).last_hidden_state[0]

    cache = DynamicCache(config=model.config)
    model.model(input_ids=torch.tensor([q]), past_key_values=cache, use_cache=True)
    after = [h[1:] for h in expected]  # the first state belongs to the prompt
    alone = [suffix(o, copy.deepcopy(cache))[:-1] for o in rollouts]
    assert gap([a for a in alone if len(a)], [a for a in after if len(a)]) < 1e-4
    reused = [suffix(o, cache)[:-1] for o in rollouts]  # each suffix also sees those before it
    assert gap([a for a in reused if len(a)], [a for a in after if len(a)]) > BAD

    model.gradient_checkpointing_enable({"use_reentrant": False})
    cache = DynamicCache(config=model.config)
    model.model(input_ids=torch.tensor([q]), past_key_values=cache, use_cache=True)
    model.train()  # a checkpointed layer drops the cache while training, also under no_grad
    with pytest.raises(RuntimeError, match="size of tensor"):  # the mask still counts the cache
        suffix(rollouts[0], cache)
    model.set_attn_implementation(maskless())  # an attention without masks, as flash-attn is, does not notice
    assert gap([suffix(rollouts[0], cache)[:-1]], [after[0]]) > BAD
    model.set_attn_implementation("sdpa")
    tree_is_right(model, tree, expected)  # still training, still checkpointed


def test_merged_softmax_with_a_detached_log_sum_exp(group):
    """Merging prefix and suffix by their log-sum-exp needs its gradient; ours never merges."""
    tree = make_tree_batch(*group(12)[:2])
    view = make_view(tree.trie, tree.student_nodes, None, None, "cpu")
    n = len(tree.trie)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, n, 8, generator=g, dtype=torch.float64).requires_grad_() for _ in range(3))
    mask = visible(view, None)
    prompt = torch.arange(n) < 9

    def part(columns, detached):
        scores = (q @ k.mT).masked_fill(~(mask & columns), -1e30)
        lse = scores.logsumexp(-1, keepdim=True)
        return scores.softmax(-1) @ v, lse.detach() if detached else lse

    def merged(detached):
        (a, la), (b, lb) = part(prompt, detached), part(~prompt, detached)
        w = torch.sigmoid(la - lb)
        return w * a + (1 - w) * b

    def key_gradient(out):
        return torch.autograd.grad(out.sin().sum(), k)[0]

    exact = key_gradient(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0))
    torch.testing.assert_close(key_gradient(merged(False)), exact)
    torch.testing.assert_close(merged(True), merged(False))  # the forward looks right
    assert (key_gradient(merged(True)) - exact).norm() > 0.3 * exact.norm()
    torch.testing.assert_close(key_gradient(gather_attention(view, q, k, v, Scores(1.0))), exact)


def test_without_its_mask_function_a_registered_attention_loses_padding(build):
    model = build("qwen2")
    ids = torch.tensor([[0, 0, 0, 7, 8, 9], [3, 4, 5, 6, 7, 8]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6])
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}

    def read():
        with torch.no_grad():
            return model.model(**batch, use_cache=False).last_hidden_state[mask.bool()]

    expected = read()
    model.set_attn_implementation(maskless())
    assert gap([read()], [expected]) > BAD
    model.set_attn_implementation("sdpa")
    enable_tree(model)
    assert torch.equal(read(), expected)


@pytest.mark.parametrize("base", ["sdpa", "eager"])
def test_ordinary_batches_and_generation_are_bitwise_as_before(base, build):
    model = build("mistral")
    model.set_attn_implementation(base)
    ids = torch.tensor([[0, 0, 0, 7, 8, 9, 10, 11], [3, 4, 5, 6, 7, 8, 9, 10]])
    mask = (torch.arange(8) >= torch.tensor([[3], [0]])).long()

    def outputs():
        made = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
        return model(input_ids=ids, attention_mask=mask).logits, made

    expected = outputs()
    enable_tree(model)
    assert model.config._attn_implementation == f"hsd_tree_{base}"
    assert all(torch.equal(a, b) for a, b in zip(outputs(), expected, strict=True))
    disable_tree(model)
    assert model.config._attn_implementation == base


def test_the_shared_prefix_ends_at_the_first_differing_token(build, group, plain):
    """A chat template closes the user's turn after the context, so q' is not q: reading on from q's keys is wrong."""
    model = build("llama")
    enable_tree(model)
    prompts, rollouts, teacher = group(13)
    teacher = [[*p[:6], 60, *p[7:], *t[9:]] for p, t in zip(prompts, teacher, strict=True)]
    with torch.no_grad():
        expected = plain(model, teacher, rollouts)
        wrong = plain(model, [[*p, *t[9:]] for p, t in zip(prompts, teacher, strict=True)], rollouts)
        _, got = tree_hidden_states(model, prompts, rollouts, teacher)
    assert gap(wrong, expected) > BAD
    assert gap(got, expected) < 1e-4
    tree = make_tree_batch(prompts, rollouts, teacher)
    assert (tree.trie.pos[tree.teacher_only] >= 6).all()
    assert 6 in tree.trie.pos[tree.teacher_only]


@torch.no_grad()
def test_a_teacher_with_other_weights_must_not_take_the_students_keys(build, group, plain):
    from hsd.policy.tree.forward import forward_frozen, forward_live_teacher

    student, other = build("qwen3"), build("qwen3")
    for p in other.parameters():
        p.mul_(1.3)
    prompts, rollouts, teacher = group(14)
    expected = plain(other, teacher, rollouts)
    tree = make_tree_batch(prompts, rollouts, teacher)
    for m in (student, other):
        enable_tree(m)
    hidden, keys = forward_student(student.model, tree)
    assert gap(forward_live_teacher(other.model, tree, hidden, keys), expected) > BAD
    reference, got = forward_frozen(other.model, tree, student=True, teacher=True)
    assert gap(got, expected) < 1e-4
    assert gap(reference, plain(other, prompts, rollouts)) < 1e-4


def test_checkpointed_layers_read_the_attention_again_in_backward(build, group, plain):
    """Switching the tree on for the forward only gives wrong gradients, or none: it has to stay on."""
    model = build("llama").train()
    prompts, rollouts, tree = student_tree(group)
    model.gradient_checkpointing_enable({"use_reentrant": False})

    def gradient(states, between=lambda: None):
        model.zero_grad()
        loss = sum(s.sin().sum() for s in states)
        between()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.model.parameters()])

    exact = gradient(plain(model, prompts, rollouts))
    enable_tree(model)

    def states():
        return rows_of(forward_student(model.model, tree)[0], tree.student_nodes, tree.student)

    torch.testing.assert_close(gradient(states()), exact, rtol=1e-3, atol=1e-4)
    try:
        wrong = gradient(states(), between=lambda: disable_tree(model))
    except RuntimeError:  # torch notices other shapes among what it recomputes, as it may
        return
    assert (wrong - exact).norm() > 0.1 * exact.norm()


def test_without_the_patch_fp64_is_fp32(build, group, plain):
    """RMSNorm rounds to fp32 whatever comes in, so a parity of 1e-13 has to take that out first."""
    model = build("qwen3").double()
    prompts, rollouts, _ = group(15)
    with torch.no_grad():
        batched = model.model(input_ids=torch.tensor([[*prompts[0], *rollouts[0]]] * 2)).last_hidden_state[0]
        norm = model.model.norm
        x = torch.randn(4, 32, dtype=torch.float64)
        exact = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon) * norm.weight
    assert batched.dtype == torch.float64
    assert (norm(x) - exact).abs().max() > 1e-9


@torch.no_grad()
def test_dynamic_rotary_embeddings_depend_on_the_longest_sequence(build, group, plain):
    """One long rollout in the tree changes all the others: refused, and this is why."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    prompts, rollouts, teacher = group(16, rollouts=(7, 4, 90, 1, 7))
    model = build("llama", rope_parameters=rope, max_position_embeddings=32)
    short = [0, 1, 3, 4]
    expected = plain(model, [prompts[i] for i in short], [rollouts[i] for i in short])
    assert "dynamic" in str(why_not(model))
    enable_tree(model)
    got, _ = tree_hidden_states(model, prompts, rollouts, teacher)
    assert gap([got[i] for i in short], expected) > BAD


def test_a_tree_given_to_plain_attention_is_refused(build, group):
    """It would swallow the argument and read the tree as one sequence."""
    model = build("llama")
    with pytest.raises(ValueError, match="enable_tree"):
        tree_hidden_states(model, *group(17))
    assert attention.is_enabled(model) is False
