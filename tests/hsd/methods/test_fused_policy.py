"""GRPO's variants through the fused surrogate take the steps of TRL's own losses."""

import pytest
import torch
from tiny_runs import ACCUMULATED, STEP, make, qwen3
from transformers import Qwen3ForCausalLM

from hsd.train.config import HSDConfig

METHODS = ("grpo", "dr_grpo", "gspo", "dapo")
# Two updates over the same rollouts: the second one's ratios are off 1, and some are clipped.
TWICE = {"num_iterations": 2, "max_steps": 2, "learning_rate": 0.2}


def trained(folder, model=None, **options):
    trainer = make(model or qwen3(initializer_range=0.15), folder, **options)
    start = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return losses, {n: start[n] - p.detach() for n, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("sharing", ["none", "tree"])
@pytest.mark.parametrize("how", [{}, ACCUMULATED, TWICE, TWICE | {"delta": 1.3}], ids=["one", "parts", "two", "delta"])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_that_of_trl(method, how, sharing, tmp_path):
    if sharing == "tree" and how not in ({}, TWICE):
        pytest.skip("the sharing is the same for the others")
    loss, moved = trained(tmp_path / "fused", method=method, policy_loss="fused", prefix_sharing=sharing, **how)
    expected_loss, expected = trained(tmp_path / "trl", method=method, policy_loss="trl", **how)
    assert loss == pytest.approx(expected_loss, rel=1e-3, abs=1e-6)
    scale = max(g.abs().max() for g in expected.values()).item()
    assert scale > 1e-4
    for name, g in expected.items():
        torch.testing.assert_close(moved[name], g, rtol=5e-3, atol=5e-5 * scale, msg=name)


def test_the_second_of_two_updates_is_off_its_sampler(tmp_path):
    """Else the comparison above would say nothing of ratios and clips."""
    once = trained(tmp_path / "a", method="grpo", **TWICE)[1]
    wide = trained(tmp_path / "b", method="grpo", epsilon=1e-6, **TWICE)[1]
    assert any(not torch.allclose(once[n], wide[n], rtol=1e-2, atol=0) for n in once)


def test_a_reference_beside_grpo_is_trls_beta(tmp_path):
    options = {"max_steps": 2, "learning_rate": 0.2}
    k3 = {"reference_coef": 0.5, "reference_kl": "k3"}
    _, ours = trained(tmp_path / "ours", method="grpo", policy_loss="fused", **k3, **options)
    qwen3(initializer_range=0.15).save_pretrained(tmp_path / "model")  # from where TRL loads its reference
    model = Qwen3ForCausalLM.from_pretrained(tmp_path / "model")
    # By default TRL multiplies k3 by the ratio, whose gradient is then a part of it.
    trl_options = {"beta": 0.5, "use_bias_correction_kl": False}
    _, trl = trained(tmp_path / "trl", model, method="grpo", **trl_options, **options)
    for name in trl:
        torch.testing.assert_close(ours[name], trl[name], rtol=5e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("option", "fused"),
    [
        ({}, True),
        ({"policy_loss": "trl"}, False),
        ({"beta": 0.1}, False),
        ({"loss_type": "bnpo"}, False),
        ({"loss_type": "dapo"}, True),
        ({"top_entropy_quantile": 0.5}, False),
        ({"vllm_importance_sampling_correction": True}, False),
        ({"delta": 2.0}, True),
    ],
)
def test_auto_leaves_to_trl_what_only_trl_has(option, fused, tmp_path):
    args = HSDConfig(str(tmp_path), method="grpo", **STEP | option)
    assert args.own_loss is fused
    if not fused and "policy_loss" not in option:
        with pytest.raises(ValueError, match=r"^policy_loss: expected 'trl' or 'auto' with "):
            HSDConfig(str(tmp_path), method="grpo", policy_loss="fused", **STEP | option)


def test_without_advantages_nothing_moves(tmp_path):
    def never(completion_ids, **kwargs):
        return [0.0] * len(completion_ids)

    trainer = make(qwen3(), tmp_path, reward=never, method="grpo")
    start = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(start, trainer.model.parameters(), strict=True))
