"""Diagnostics on demand against their formulas, and the gap that is printed before the first step."""

import math
import zlib
from dataclasses import replace

import pytest
import torch
from tiny_runs import half, make, qwen3

from hsd.policy.forward import FrozenStates
from hsd.train.batch import unpack
from hsd.train.diagnostics import of_stats, of_texts, overlap
from hsd.train.metrics import loss_metrics
from hsd_kernels import Head, fused_hsd_kl


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_overlap_and_its_advantage():
    B, T, D, V = 2, 3, 5, 40
    student, teacher, weight = draw(1, B, T, D), draw(2, B, T, D), draw(3, V, D)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    found = overlap(student, FrozenStates(teacher), Head(weight), mask, 1.3)
    shares, gains = [], []
    for b, t in mask.nonzero().tolist():
        p, q = ((weight @ x[b, t] / 1.3).softmax(-1) for x in (student, teacher))
        both = sorted({*p.topk(16).indices.tolist()} & {*q.topk(16).indices.tolist()})
        shares.append(len(both) / 16)
        p, q = p[both] / p[both].sum(), q[both] / q[both].sum()
        gains.append((p * (q.log() - p.log())).sum().item())
    assert found["top_overlap"].item() == pytest.approx(sum(shares) / 3, rel=1e-5)
    assert found["overlap_advantage"].item() == pytest.approx(sum(gains) / 3, rel=1e-4)
    same = overlap(student, FrozenStates(student), Head(weight), mask, 1.0)
    assert same["top_overlap"] == 1.0 and abs(same["overlap_advantage"]) < 1e-6


def test_sharpening_is_the_temperature_of_a_teacher_that_is_a_sharper_student():
    h, weight = draw(1, 1, 50, 4), draw(2, 9, 4)
    ids = torch.randint(9, (1, 50), generator=torch.Generator().manual_seed(3))
    stats = fused_hsd_kl(h, h, weight, target_ids=ids, return_stats=True, impl="torch").stats
    found = of_stats(stats, torch.ones(1, 50))
    assert found["teacher_sharpening"].item() == pytest.approx(1.0) and found["entropy_gap"] == 0
    squared = stats._replace(teacher_logps=2.0 * stats.student_logps)
    assert of_stats(squared, torch.ones(1, 50))["teacher_sharpening"].item() == pytest.approx(2.0)


def test_texts():
    found = of_texts(["Wait, maybe. Waiting is not a word of it.", "ab" * 20_000])
    plain, tail = b"Wait, maybe. Waiting is not a word of it.", b"ab" * 5000
    expected = (len(plain) / len(zlib.compress(plain)) + 10_000 / len(zlib.compress(tail))) / 2
    assert found == {"compression": pytest.approx(expected), "epistemic_words": 1.0}
    assert math.isnan(of_texts([])["compression"]) and math.isnan(of_texts([""])["compression"])


def test_a_run_logs_them_on_demand_alone_and_says_the_first_gap(tmp_path, capsys):
    names = {"top_overlap", "overlap_advantage", "teacher_sharpening", "entropy_gap", "compression", "epistemic_words"}
    for asked in (True, False):
        trainer = make(qwen3(initializer_range=0.15), tmp_path, reward=half, diagnostics=asked, max_steps=2)
        trainer.train()
        log = next(row for row in trainer.state.log_history if "loss" in row)
        assert {name.removeprefix("hsd/") for name in log} & names == (names if asked else set())
        said = [line for line in capsys.readouterr().out.splitlines() if "before step 1" in line]
        assert len(said) == 1 and f"{log['hsd/kl']:.3g} nats" in said[0]


@pytest.mark.parametrize(("gap", "said"), [(math.inf, ["infinitely far apart"]), (math.nan, [])])
def test_a_gap_that_is_no_number_is_no_number_in_a_runs_words(gap, said, tmp_path, capsys, monkeypatch):
    measured = lambda *args, **kwargs: {"kl": torch.tensor(gap)}  # noqa: E731
    monkeypatch.setattr("hsd.train.trainer.loss_metrics", measured)
    make(qwen3(), tmp_path).train()
    lines = [line for line in capsys.readouterr().out.splitlines() if "before step 1" in line]
    assert len(lines) == len(said) and all(words in line for words, line in zip(said, lines, strict=True))


def test_a_batch_without_a_token_has_the_names_of_one_that_has(tmp_path):
    """Ranks gather them by their place."""
    trainer = make(qwen3(), tmp_path, diagnostics=True, learning_rate=0.0)
    trainer.train()
    batch = unpack(trainer.batches[0])
    policy, objective = trainer.accelerator.unwrap_model(trainer.model), trainer.args.objective(0)
    found = []
    for one in (batch, replace(batch, loss_mask=batch.loss_mask * 0)):
        out = trainer.micro_batch_loss(policy, one, objective)
        found.append(loss_metrics(out, one, diagnostics=True))
    assert found[0].keys() == found[1].keys() and math.isfinite(found[0]["top_overlap"])
    assert found[1]["top_overlap"].isnan() and found[1]["kl"].isnan()
