"""A method's draw: texts, other rollouts and extra rows, through the trainer, and its pure half alone."""

import json
import random

import pytest
import torch
from tiny_runs import ACCUMULATED, QUESTIONS, TOKENIZER, Recorder, make, qwen3

from hsd.hindsight.context import PARTS, ContextTemplate
from hsd.hindsight.groups import Group, Rollout
from hsd.methods import METHODS
from hsd.methods.draw import Ask, Drawn, GroupView, Reply, converse, extended, gives_away
from hsd.methods.trace import step_of_tokens
from hsd.train.alarms import alarms
from hsd.train.callbacks import load_metrics

SHORT = dict.fromkeys(PARTS, "|{text}")
TEMPLATE = ContextTemplate("[{answer}|{demonstration}]", "[{answer}]", "[|{demonstration}]", "[{feedback}]", SHORT, "]")
ROWS = [{**q, "solution": f"{i}+{i}=\n{i}", "rubric": f"{i}", "trajectory": f"{i}#"} for i, q in enumerate(QUESTIONS)]
ROWS = [{**r, "solution": r["solution"].replace("\n", ";")} for r in ROWS]
# The vocabulary of 21 characters has none of the wordings.
GIVEN = {
    "step_critique": {"ask": "[{solution}|{attempt}"},
    "rcsd": {"ask": "[{answer}|{rubric}"},
    "opcod": {"ask": "[{attempt}"},
    "trace": {
        "ask": "[{attempt}",
        "separator": "+",
        "step": ";{n}={step}",
        "tag_key": "1",
        "tag_error": "0",
        "most": 0.9,
        "mu_error": 1.0,
    },
    "stable_opd": {"gold": 0.5},
    "brts": {"trajectories": 2},
    "mixed_policy": {"ask": "[{attempt}", "which": "all"},
    "plan_reference": {"ask": "[{solution}"},
    "pbsd": {"beta": 0.3},
    "npo": {"gate": 0.6},
    "actguide": {"plan": "[{text}"},
    "dapo": {"rounds": 2},
    "atesd_learned": {"window": 1, "horizon": 1, "discount": 0.9, "rate": 0.5},
}
MORE = {"stable_opd": {"reference_coef": 0.1}}


def third(completion_ids, **kwargs):
    """By the tokens alone: about half of the rollouts, so that a redrawn one is judged like any other."""
    return [float(sum(ids) % 3 == 0) for ids in completion_ids]


def hard(completion_ids, prompts, **kwargs):
    """Groups of the first questions are all wrong, but behind their own prompts only texts count."""
    return [float(sum(ids) % 5 == 0 and len(p) % 2 == 0) for ids, p in zip(completion_ids, prompts, strict=True)]


def trainer_of(folder, method, reward=third, **options):
    args = {"method": method, "method_args": GIVEN.get(method), **MORE.get(method, {})}
    if METHODS[method].has_teacher:
        args |= {"teacher": "fixed"} if method != "trace" else {}
    model = qwen3(initializer_range=0.15)
    return make(model, folder, Recorder, reward, ROWS, TEMPLATE, **args | options)


def step_of(trainer):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    loss = next(row["loss"] for row in trainer.state.log_history if "loss" in row)
    return loss, [a - b.detach() for a, b in zip(before, trainer.model.parameters(), strict=True)]


@pytest.mark.parametrize("method", GIVEN)
def test_accumulation_and_the_tree_change_nothing(method, tmp_path):
    reward = hard if method in ("actguide", "plan_reference") else third
    first = trainer_of(tmp_path / "a", method, reward, prefix_sharing="none")
    loss, moved = step_of(first)
    scale = max(g.abs().max() for g in moved).item()
    assert scale > 1e-5
    ways = {"parts": {"prefix_sharing": "none", **ACCUMULATED}}
    budget = {} if METHODS[method].max_rows > 1 else {"tree_token_budget": 40}
    if METHODS[method].has_teacher:
        ways["tree, in chunks"] = {"prefix_sharing": "tree", **budget}
    for name, options in ways.items():
        other_loss, other = step_of(trainer_of(tmp_path / name, method, reward, **options))
        assert other_loss == pytest.approx(loss, rel=1e-3, abs=1e-6), name
        for a, b in zip(moved, other, strict=True):
            torch.testing.assert_close(b, a, rtol=5e-3, atol=5e-5 * scale, msg=name)
