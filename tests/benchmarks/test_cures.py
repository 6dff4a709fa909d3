"""Gradients of the cures against autograd in fp64, over the logits of the model's own forward."""

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.small_world.cures import HELD_ROWS, Cure, divergence, logps
from benchmarks.small_world.plan import CURES, FULL, queue
from benchmarks.small_world.probes import LogProbs
from hsd.policy.forward import Prompts, RolloutInputs
from hsd.train.batch import RolloutBatch, TeacherBatch


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=24,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.3,
    )
    return Qwen3ForCausalLM(config).double()


@pytest.fixture(scope="module")
def batch():
    torch.manual_seed(1)
    ids = torch.randint(3, 20, (3, 5))
    mask = torch.ones(3, 5, dtype=torch.long)
    mask[0, 3:] = 0
    prompts = {}
    for who, length in (("student", 4), ("teacher", 7)):
        prompts[who] = Prompts(torch.randint(3, 20, (3, length)), torch.ones(3, length, dtype=torch.long))
    inputs = RolloutInputs(prompts, ids, mask)
    teacher = TeacherBatch(torch.zeros(3, dtype=torch.bool))
    return RolloutBatch(inputs, mask, teacher, torch.zeros(3), None)


def whole_logps(policy, batch, who):
    """By the model's own forward."""
    p, x = batch.inputs.prompts[who], batch.inputs
    ids, mask = torch.cat([p.ids, x.completion_ids], 1), torch.cat([p.mask, x.completion_mask], 1)
    return policy(input_ids=ids, attention_mask=mask).logits[:, p.ids.shape[1] - 1 : -1].log_softmax(-1)


def gradient(loss, policy):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(policy.parameters()))])


def losses(policy, batch):
    """The loss with a constant teacher as HSD has it, and its weights."""
    weights = batch.targets("rollout").divergence_weights.double()
    student, teacher = whole_logps(policy, batch, "student"), whole_logps(policy, batch, "teacher").detach()
    return (weights * (teacher.exp() * (teacher - student)).sum(-1)).sum(), weights


def test_log_probs_are_the_models(policy, batch):
    for who in ("student", "teacher"):
        kept = batch.loss_mask.bool()
        torch.testing.assert_close(
            logps(policy, batch, who)[kept].double(), whole_logps(policy, batch, who)[kept], rtol=0, atol=1e-5
        )


def test_the_whole_residual_gradient_is_that_of_a_divergence_between_two_variables(policy, batch):
    loss, weights = losses(policy, batch)
    found = gradient(Cure("residual", 1.0)(policy, batch, loss, weights, 0), policy)
    both = divergence(whole_logps(policy, batch, "teacher"), whole_logps(policy, batch, "student"), weights)
    torch.testing.assert_close(found, gradient(both, policy), rtol=1e-4, atol=1e-6)
    loss, weights = losses(policy, batch)
    none = gradient(Cure("residual", 0.0)(policy, batch, loss, weights, 0), policy)
    torch.testing.assert_close(none, gradient(losses(policy, batch)[0], policy))


def test_the_uncommon_update_leaves_the_teachers_logits_where_they_are_along_dz(policy, batch):
    loss, weights = losses(policy, batch)
    cured = Cure("uncommon")(policy, batch, loss, weights, 0)
    torch.testing.assert_close(cured, loss)
    found, plain = gradient(cured, policy), gradient(losses(policy, batch)[0], policy)
    # dz of the loss, through the teacher's own logits, by the model's own forward.
    student, teacher = whole_logps(policy, batch, "student"), whole_logps(policy, batch, "teacher")
    dz = (weights.unsqueeze(-1) * (student.exp() - teacher.exp())).detach()
    p, x = batch.inputs.prompts["teacher"], batch.inputs
    ids, mask = torch.cat([p.ids, x.completion_ids], 1), torch.cat([p.mask, x.completion_mask], 1)
    logits = policy(input_ids=ids, attention_mask=mask).logits[:, p.ids.shape[1] - 1 : -1]
    along = gradient((logits * dz).sum(), policy)
    common = plain @ along / along.square().sum()
    expected = plain - common.clamp_min(0) * along
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert common > 0 and abs(found @ along) < 1e-4 * (plain @ along)


def test_held_rows_have_a_gradient_only_after_the_teacher_has_moved(policy, batch):
    held = LogProbs([[5, 6, 7], [8, 9]], [[4, 3], [10, 11, 12]])
    with torch.no_grad():
        first = held(policy)
    assert held.number(torch.tensor([1, 0])).tolist() == [2, 3, 4, 0, 1]
    for rows in (torch.tensor([1]), torch.tensor([1, 0])):
        torch.testing.assert_close(held(policy, rows), first[held.number(rows)])
    cure = Cure("held", 2.0, held, first)
    loss, weights = losses(policy, batch)
    same = cure(policy, batch, loss, weights, step=3)
    torch.testing.assert_close(same, loss)
    torch.testing.assert_close(gradient(same, policy), gradient(losses(policy, batch)[0], policy), rtol=1e-6, atol=1e-9)
    moved = Cure("held", 2.0, held, torch.roll(first, 1, -1))
    loss, weights = losses(policy, batch)
    rows = torch.arange(HELD_ROWS) % 2
    want = loss + 2.0 * (moved.first.exp() * (moved.first - first))[held.number(rows)].sum(-1).mean()
    torch.testing.assert_close(moved(policy, batch, loss, weights, 0), want)


def test_every_cure_is_run_on_three_seeds_with_a_live_teacher():
    runs = [run for run in queue(FULL) if run.part == "long" and run.name in CURES]
    assert {(run.name, run.seed) for run in runs} == {(name, seed) for name in CURES for seed in range(3)}
    assert {run.options["teacher"] for run in runs} == {"live"}
