"""verl's own post-processing and loss functions on what the adapter makes, against dense logits by hand."""

import importlib.metadata
import importlib.util
from types import SimpleNamespace

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from hsd.adapters.verl import fused_linear_aux, register
from hsd_kernels import Divergence

D, V = 8, 23
PROMPTS, RESPONSES = (3, 1, 4), (5, 2, 3)
NNZ = sum(PROMPTS) + sum(RESPONSES)


@pytest.fixture
def states():
    g = torch.Generator().manual_seed(0)
    rows = torch.zeros(NNZ, dtype=torch.bool)
    end = 0
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        end += prompt + response
        rows[end - response - 1 : end - 1] = True
    student = torch.randn(NNZ, D, generator=g).requires_grad_()
    weight = torch.randn(V, D, generator=g).requires_grad_()
    return student, torch.randn(sum(RESPONSES), D, generator=g), weight, rows


def by_hand(student, teacher, weight, rows):
    """KL(teacher || student) of each response token."""
    log_q, log_p = ((h @ w.T).log_softmax(-1) for h, w in ((student[rows], weight), (teacher, weight.detach())))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def test_losses_stand_where_tokens_are_predicted(states):
    aux = fused_linear_aux(*states)
    losses = aux.distillation_losses.squeeze(0)
    torch.testing.assert_close(losses[states[3]], by_hand(*states))
    assert not losses[~states[3]].any() and aux.student_mass.shape == aux.teacher_mass.shape == (1, NNZ)


def test_rows_that_are_not_the_teachers_are_refused(states):
    student, teacher, weight, rows = states
    with pytest.raises(ValueError, match=r"^rows: expected \(18,\) with 9 true"):
        fused_linear_aux(student, teacher[:-1], weight, rows)
    with pytest.raises(ValueError, match=r"^rows: "):
        fused_linear_aux(student, teacher, weight, rows[:-1])


@pytest.mark.parametrize("mode", ["hsd", "forward_kl_topk"])
def test_verls_own_functions_give_loss_and_gradients(mode, states):
    """`FSDPEngineWithLMHead.prepare_model_outputs` and `distillation_ppo_loss`, token-mean."""
    engine, config, data, functions = verl(mode)
    output = SimpleNamespace(fused_linear_aux=fused_linear_aux(*states))
    found = engine.prepare_model_outputs(
        output,
        {"input_ids_rmpad_rolled": None, "temperature_rmpad": None, "pad_size": 0},
        data,
        logits_processor_func=None,
    )
    loss, metrics = functions.distillation_ppo_loss(*config, found, data)
    gradients = torch.autograd.grad(loss, (states[0], states[2]))
    expected = by_hand(*states).mean()
    torch.testing.assert_close(loss, expected)
    for got, want in zip(gradients, torch.autograd.grad(expected, (states[0], states[2])), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    largest = metrics["distillation/loss_max"].aggregate()
    assert float(largest) == pytest.approx(by_hand(*states).max().item(), rel=1e-5)


def test_a_negative_clipped_divergence_stays(states):
    """verl's top-k loss cuts it off at 0, with its gradient."""
    aux = fused_linear_aux(*states, divergence=Divergence("forward_kl", clip=0.05))
    assert (aux.distillation_losses < 0).any()
    engine, config, data, functions = verl("hsd")
    args = {"input_ids_rmpad_rolled": None, "temperature_rmpad": None, "pad_size": 0}
    found = engine.prepare_model_outputs(SimpleNamespace(fused_linear_aux=aux), args, data, logits_processor_func=None)
    loss, _ = functions.distillation_ppo_loss(*config, found, data)
    torch.testing.assert_close(loss, aux.distillation_losses.squeeze(0)[states[3]].mean())


def verl(mode):
    """Its engine without a model, its configurations, a micro-batch and its module of losses."""
    if importlib.util.find_spec("verl") is None:
        pytest.skip("verl is not installed: make test-engines has it")
    assert importlib.metadata.version("verl") == "0.9.1"
    import verl.trainer.distillation.losses as functions
    from tensordict import TensorDict
    from verl.utils import tensordict_utils
    from verl.workers.config import DistillationLossConfig
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    register()
    register()  # each worker may import it twice
    engine = object.__new__(FSDPEngineWithLMHead)
    engine.use_ulysses_sp = False
    options = {"loss_mode": mode, "use_task_rewards": False, "use_policy_gradient": False, "loss_max_clamp": None}
    distillation = SimpleNamespace(distillation_loss=DistillationLossConfig(**options))
    actor = SimpleNamespace(loss_agg_mode="token-mean", global_batch_info={}, loss_scale_factor=None)
    ids = [torch.arange(p + r) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    jagged = {"layout": torch.jagged}
    masks = [torch.ones(r, dtype=torch.bool) for r in RESPONSES]
    data = TensorDict(
        {
            "input_ids": torch.nested.nested_tensor(ids, **jagged),
            "prompts": torch.nested.nested_tensor([torch.zeros(p, dtype=torch.long) for p in PROMPTS], **jagged),
            "responses": torch.nested.nested_tensor([torch.zeros(r, dtype=torch.long) for r in RESPONSES], **jagged),
            "response_mask": pad_sequence(masks, batch_first=True),
        },
        batch_size=len(PROMPTS),
    )
    flags = {"use_remove_padding": True, "use_fused_kernels": True, "distillation_use_topk": True}
    flags |= {"distillation_only": True, "dp_size": 1, "batch_num_tokens": sum(RESPONSES), "global_batch_size": 3}
    tensordict_utils.assign_non_tensor(data, **flags)
    return engine, (actor, distillation), data, functions
