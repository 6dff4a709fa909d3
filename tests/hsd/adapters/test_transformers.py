"""hsd_loss_from_ids against full logits of each sequence by itself, and the example loop."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_runs import TOKENIZER

from hsd.adapters.transformers import hsd_loss_from_ids
from hsd.train.update import Objective
from hsd_kernels import Divergence

VOCAB = len(TOKENIZER)
ROOT = Path(__file__).resolve().parents[3]
LENGTHS = (5, 1, 3)


@pytest.fixture
def ids():
    g = torch.Generator().manual_seed(0)

    def draw(n):
        return torch.randint(2, VOCAB, (n,), generator=g).tolist()

    rollouts = [draw(n) for n in LENGTHS]
    return [draw(p) + o for p, o in zip((4, 2, 6), rollouts, strict=True)], [
        draw(p) + o for p, o in zip((9, 12, 7), rollouts, strict=True)
    ]


def eager(student, teacher, ids, objective):
    """Each rollout by itself, dense logits."""
    losses = []
    for s, t, n in zip(*ids, LENGTHS, strict=True):
        ls = (student(torch.tensor([s])).logits[0, -n - 1 : -1] / objective.divergence.temperature).log_softmax(-1)
        with torch.no_grad():
            lt = (teacher(torch.tensor([t])).logits[0, -n - 1 : -1] / objective.divergence.temperature).log_softmax(-1)
        p, q, a, b = (lt.exp(), ls.exp(), lt, ls)
        losses.append((p * (a - b) if objective.divergence.kind == "forward_kl" else q * (b - a)).sum(-1).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "cohere", "granite", "gpt2", "phi"])
@pytest.mark.parametrize("own_teacher", [False, True])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_loss_and_gradient(family, own_teacher, divergence, build, ids, gradients, assert_same):
    model = build(family)
    teacher = build(family, seed=4) if own_teacher else None
    objective = Objective(Divergence(divergence, temperature=0.7))
    ours = gradients(model, lambda: hsd_loss_from_ids(model, *ids, LENGTHS, teacher=teacher, objective=objective).loss)
    assert_same(ours, gradients(model, lambda: eager(model, teacher or model, ids, objective)))


def test_lora(build, ids, gradients, assert_same):
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(build(), config).eval()
    ours = gradients(model, lambda: hsd_loss_from_ids(model, *ids, LENGTHS).loss)
    assert all("lora" in n for n in ours[1])
    assert_same(ours, gradients(model, lambda: eager(model, model, ids, Objective())))


def test_dropout_is_off_for_the_teacher_only(build, ids):
    model = build("gpt2").train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    torch.manual_seed(0)
    first = hsd_loss_from_ids(model, *ids, LENGTHS)
    second = hsd_loss_from_ids(model, *ids, LENGTHS)
    assert all(m.training for m in model.modules())
    torch.testing.assert_close(first.stats.teacher_entropy, second.stats.teacher_entropy)
    assert not torch.equal(first.stats.student_entropy, second.stats.student_entropy)


def test_statistics_are_packed(build, ids):
    model = build()
    out = hsd_loss_from_ids(model, *ids, LENGTHS)
    for i, (start, n) in enumerate(zip((0, 5, 6), LENGTHS, strict=True)):
        logits = model(torch.tensor([ids[0][i]])).logits[0, -n - 1 : -1].log_softmax(-1)
        expected = logits.gather(-1, torch.tensor(ids[0][i][-n:])[:, None])[:, 0]
        torch.testing.assert_close(out.stats.student_logps[start : start + n], expected.detach(), rtol=1e-4, atol=1e-5)


def test_no_dense_logits(build, ids, head_calls):
    model = build()
    hsd_loss_from_ids(model, *ids, LENGTHS)
    assert head_calls(model, lambda: hsd_loss_from_ids(model, *ids, LENGTHS)) == 0


def test_both_forms_of_the_clip(build, ids):
    model = build(scale=2.0)
    losses = [
        hsd_loss_from_ids(model, *ids, LENGTHS, objective=Objective(Divergence(clip=0.02, clip_form=form))).loss.item()
        for form in ("opsd", "nonnegative")
    ]
    assert losses[0] < losses[1]


def test_what_it_refuses(build, ids):
    model, (student, teacher) = build("gemma2"), ids
    with pytest.raises(ValueError, match=r"^teacher_ids: expected to end with the rollout's tokens"):
        hsd_loss_from_ids(model, student, [[*x[:-1], 1] for x in teacher], LENGTHS)
    with pytest.raises(ValueError, match=r"^teacher_ids: expected one list for each of 3 lengths, got 2"):
        hsd_loss_from_ids(model, student, teacher[:2], LENGTHS)
    with pytest.raises(ValueError, match=r"^lengths: expected at least one token in every rollout, got 0 at 1"):
        hsd_loss_from_ids(model, student, teacher, (5, 0, 3))
    with pytest.raises(ValueError, match=r"^student_ids: expected a prompt before the 9 tokens of rollout 0"):
        hsd_loss_from_ids(model, student, teacher, (9, 1, 3))
    for name, value in {
        "reference_coef": 0.1,
        "divergence_coef": 0.5,
        "importance_cap": 2.0,
        "policy_coef": 1.0,
    }.items():
        with pytest.raises(ValueError, match=rf"^objective: expected {name}=.*, got {value}"):
            hsd_loss_from_ids(model, student, teacher, LENGTHS, objective=Objective(**{name: value}))
    other = build("gemma2")
    other.config.final_logit_softcapping = 7.0
    with pytest.raises(ValueError, match=r"^teacher: expected logit scale 1.0 and softcap 0.5"):
        hsd_loss_from_ids(model, student, teacher, LENGTHS, teacher=other)


def test_the_example_runs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["accelerate_loop.py", "--steps", "2"])
    runpy.run_path(str(ROOT / "examples" / "accelerate_loop.py"), run_name="__main__")
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("[")]  # DeepSpeed's log
    assert [line.partition(":")[0] for line in lines] == ["step 1", "step 2"]
