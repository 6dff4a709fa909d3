"""Every recipe through the trainer: what its teachers are shown, and that neither accumulation, nor the tree, nor an
interruption changes a step."""

import pytest
import torch
from tiny_runs import ACCUMULATED, QUESTIONS, TOKENIZER, Recorder, make, qwen3

from hsd.hindsight.context import ContextTemplate
from hsd.methods import METHODS
from hsd.methods.method import REQUIRED
from hsd.train.config import HSDConfig

PARTS = {
    "answer": "[{text}",
    "demonstration": "|{text}",
    "second": "||{text}",
    "failure": ";{text}",
    "hint": "[{text}",
    "translation": "[{text}",
    "head": "[{text}",
}
TEMPLATE = ContextTemplate("[{answer}|{demonstration}]", "[{answer}]", "[|{demonstration}]", "[{feedback}]", PARTS, "]")
ROWS = [
    {**q, "solution": f"{i}+{i}=", "full_prompt": f"{i}+", "hints": [f"{i}", "7", f"{i}+"], "translation": f"{i}="}
    for i, q in enumerate(QUESTIONS)
]
GIVEN = {"msd": {"no_confidence": 4.0}, "antisd": {"verdict": False}, "atesd": {"share": 1.0}}
NEW = ("ccopd", "msd", "ssopd", "sdpg", "egrsd", "cl_egrsd", "rlrt", "rlcsd", "antisd", "vopd", "sgsd")
NEW += ("mopd", "atesd", "hsd_unpaired")


def third(completion_ids, **kwargs):
    """Groups of four with three, two or one success, by a group's place: every kind of peer occurs."""
    return [float(i % 4 != 0 if i < 4 else i % 4 == 1) for i in range(len(completion_ids))]


def trainer_of(folder, method, **options):
    args = {"method": method, "method_args": GIVEN.get(method), "teacher": "fixed", "peer_rule": "uniform"}
    if method in ("sdpg", "ssopd"):
        args["divergence_coef"] = 0.5  # sdpg's schedule begins at 0
    if method == "sdpg":
        args["reference_coef"] = 0.5
    model = qwen3(initializer_range=0.15)
    return make(model, folder, Recorder, third, ROWS, TEMPLATE, **args | options)


def step_of(trainer):
    """(loss, minus the gradient), with the student off its teacher, where they agree and D is 0 else."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    loss = next(row["loss"] for row in trainer.state.log_history if "loss" in row)
    return loss, [a - b.detach() for a, b in zip(before, trainer.model.parameters(), strict=True)]


@pytest.mark.parametrize("method", NEW)
def test_accumulation_and_the_tree_change_nothing(method, tmp_path):
    loss, moved = step_of(trainer_of(tmp_path / "a", method, prefix_sharing="none"))
    scale = max(g.abs().max() for g in moved).item()
    assert scale > 1e-5
    ways = {"parts": {"prefix_sharing": "none", **ACCUMULATED}}
    ways["tree"] = {"prefix_sharing": "tree"}
    ways["tree, in chunks"] = {"prefix_sharing": "tree", "tree_token_budget": 40}
    for name, options in ways.items():
        other_loss, other = step_of(trainer_of(tmp_path / name, method, **options))
        assert other_loss == pytest.approx(loss, rel=1e-3, abs=1e-6), name
        for a, b in zip(moved, other, strict=True):
            torch.testing.assert_close(b, a, rtol=5e-3, atol=5e-5 * scale, msg=name)


def shown(folder, method, **options):
    """(batch, [what each teacher's prompt adds to the question, by rollout and context], the rollouts' texts, rows)."""
    trainer = trainer_of(folder, method, **options)
    trainer.train()
    (batch,) = trainer.batches
    ids = batch["teacher_prompt_ids"]
    ids = ids if ids.ndim == 3 else ids.unsqueeze(1)
    questions = TOKENIZER.batch_decode(batch["prompt_ids"], skip_special_tokens=True)
    texts = [[TOKENIZER.decode(x, skip_special_tokens=True) for x in row] for row in ids]
    rows = [next(r for r in ROWS if r["prompt"] == q) for q in questions]
    added = [[t.removeprefix(q) for t in row] for q, row in zip(questions, texts, strict=True)]
    return batch, added, TOKENIZER.batch_decode(batch["completion_ids"], skip_special_tokens=True), rows


@pytest.mark.parametrize("failure", ["always", "fallback"])
def test_mopd_shows_two_successes_and_a_failure(failure, tmp_path):
    batch, added, texts, _ = shown(tmp_path, "mopd", method_args={"failure": failure})
    failures = 0
    for i, (context,) in enumerate(added):
        group = range(i - i % 4, i - i % 4 + 4)
        right = [j for j in group if batch["success"][j] and j != i][:2]
        wrong = [j for j in group if not batch["success"][j] and j != i]
        marked = "".join(mark + texts[j] for mark, j in zip(("|", "||"), right, strict=False) if texts[j])
        with_failure = {f"{marked};{texts[j]}]" for j in wrong if texts[j] and (failure == "always" or not right)}
        alone = {f"[{marked}]" if len(right) == 1 else f"{marked}]", ""}
        assert context in (with_failure or alone) | (alone if any(not texts[j] for j in wrong) else set())
        failures += context in with_failure
    assert failures >= 3 if failure == "always" else failures <= 2


def test_ssopd_teaches_one_failure_of_each_mixed_group(tmp_path):
    batch, added, texts, _ = shown(tmp_path, "ssopd")
    length = batch["completion_mask"].sum(-1).tolist()
    for g in (range(4), range(4, 8)):
        fails, wins = ([j for j in g if bool(batch["success"][j]) is ok] for ok in (False, True))
        row = max(fails, key=lambda j: (length[j], -j))
        assert [bool(batch["has_context"][j]) for j in g] in ([j == row for j in g], [False] * 4)
        best = min(wins, key=lambda j: (length[j], j))
        assert not texts[best] or texts[best] in added[row][0]


def test_rlcsd_shows_a_right_and_a_wrong_peer_in_the_same_words(tmp_path):
    batch, added, texts, _ = shown(tmp_path, "rlcsd")
    seen = 0
    for i, pair in enumerate(added):
        group = [j for j in range(i - i % 4, i - i % 4 + 4) if j != i]
        for context, ok in zip(pair, (True, False), strict=True):
            allowed = {f"[|{texts[j]}]" for j in group if bool(batch["success"][j]) is ok}
            assert context in allowed | {""}
            seen += context != ""
    assert seen >= 4


def test_the_unpaired_control_shows_another_question(tmp_path):
    batch, added, texts, rows = shown(tmp_path, "hsd_unpaired")
    elsewhere = 0
    for i, (context,) in enumerate(added):
        others = {j for j in range(8) if j // 4 != i // 4 and batch["success"][j]}
        allowed = {f"[{rows[i]['answer']}|{texts[j]}]" for j in others}
        assert context in allowed | {f"[{rows[i]['answer']}]"}
        elsewhere += context in allowed
    assert elsewhere >= 3


def test_the_columns_reach_the_teacher(tmp_path):
    _, added, _, rows = shown(tmp_path / "a", "sgsd")
    assert [row[:3] for row in added] == [[f"[{h}]" for h in r["hints"]] for r in rows]
    assert all(row[3:] == [""] * 5 for row in added)
    _, added, _, rows = shown(tmp_path / "b", "msd")
    assert [x for (x,) in added] == [f"[{r['translation']}]" for r in rows]
    batch, _, _, rows = shown(tmp_path / "c", "ccopd")
    texts = TOKENIZER.batch_decode(batch["teacher_prompt_ids"], skip_special_tokens=True)
    assert texts == [r["full_prompt"] for r in rows] and batch["has_context"].all()


@pytest.mark.parametrize("method", [n for n, m in METHODS.items() if m.needs])
def test_a_missing_column_is_named(method, tmp_path):
    rows = [{k: v for k, v in r.items() if k in ("prompt", "answer")} for r in ROWS]
    with pytest.raises(ValueError, match=r"^train_dataset: expected columns .*" + METHODS[method].needs[0]):
        required = {name: 1.0 for name, value in METHODS[method].settings.items() if value is REQUIRED}
        asked = {name: 1.0 for name, value in METHODS[method].defaults.items() if value is REQUIRED}
        make(qwen3(), tmp_path, questions=rows, method=method, method_args=required, **asked)


def test_an_unpublished_setting_is_asked_for(tmp_path):
    with pytest.raises(ValueError, match=r"^method_args: expected 'no_confidence' for method='msd'"):
        HSDConfig(str(tmp_path), method="msd", bf16=False, use_cpu=True)
    with pytest.raises(ValueError, match=r"^reference_coef: expected a value for method='stable_opd'"):
        HSDConfig(str(tmp_path), method="stable_opd", method_args={"gold": 1.0}, bf16=False, use_cpu=True)
    with pytest.raises(ValueError, match=r"^method_args: expected names among \['e'\], got 'f'"):
        HSDConfig(str(tmp_path), method="rlrt", method_args={"f": 1.0}, bf16=False, use_cpu=True)
