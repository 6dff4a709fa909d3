"""rollouts.jsonl: what a row says, which groups it is about, and that no step stands twice."""

import json
from types import SimpleNamespace

import pytest
from tiny_runs import TOKENIZER, group, make, qwen3

from hsd.hindsight.context import PrivilegedContext
from hsd.hindsight.groups import Member
from hsd.hindsight.teacher_prompts import TeacherPrompt
from hsd.train.callbacks import RunFiles, load_metrics
from hsd.train.rollouts import append_rollouts, rollout_rows

TEXTS = {"3;#7": 1.0, "3;#8": 0.0, "4;#1": 0.0}
GROUP = group("3+4=", "7", **TEXTS)
SHOWN = [("answer_only", None, None), ("peer", 3, 0), ("nothing", None, None)]


def prompts():
    return [[TeacherPrompt(PrivilegedContext((1,), kind, False), tau, peer)] for kind, tau, peer in SHOWN]


def test_a_row_says_what_was_sampled_and_what_the_teacher_was_shown(tmp_path):
    members = [Member(GROUP, i, 0) for i in range(3)] + [Member(GROUP, 0, 1)]
    found = rollout_rows(5, members, [*prompts(), *prompts()[:1]], [False, False, True, False], TOKENIZER, groups=1)
    assert [row["reply"] for row in found] == list(TEXTS)  # the second group is left out
    assert found[1] == {
        "step": 5,
        "group": 0,
        "rollout": 1,
        "question": "3+4=",
        "answer": "7",
        "reply": "3;#8",
        "tokens": 4,
        "reward": 0.0,
        "success": False,
        "context": "peer",
        "peer": 0,
        "tau": 3,
    }
    assert [row["reward"] for row in found] == [1.0, 0.0, None]  # no verdict
    append_rollouts(tmp_path / "r.jsonl", found)
    append_rollouts(tmp_path / "r.jsonl", [row | {"step": 6} for row in found])
    written = load_metrics(tmp_path / "r.jsonl")
    assert [row["was_peer"] for row in written] == [True, False, False] * 2
    assert [row["step"] for row in written] == [5] * 3 + [6] * 3


def test_without_a_teacher_nothing_is_shown():
    (row,) = rollout_rows(1, [Member(GROUP, 0, 0)], None, [False], TOKENIZER, groups=1)
    assert row["success"] and (row["context"], row["peer"], row["tau"]) == (None, None, None)


def place(row):
    return row["step"], row["group"], row["rollout"]


@pytest.mark.parametrize(("method", "groups"), [("hsd", 0), ("hsd", 1), ("hsd", 2), ("hsd_unpaired", 2)])
def test_a_run_writes_the_first_groups_of_each_step(method, groups, tmp_path):
    trainer = make(qwen3(), tmp_path, method=method, max_steps=2, record_groups=groups)
    trainer.train()
    found = load_metrics(tmp_path / "rollouts.jsonl")
    assert list(map(place, found)) == [(step, n, i) for step in (1, 2) for n in range(groups) for i in range(4)]
    for row in found:
        batch, at = trainer.batches[row["step"] - 1], 4 * row["group"] + row["rollout"]
        ids = batch["completion_ids"][at][batch["completion_mask"][at].bool()]
        assert row["reply"] == TOKENIZER.decode(ids, skip_special_tokens=True) and row["tokens"] == len(ids)
        assert row["success"] == batch["success"][at] and row["reward"] == float(row["success"])
        assert (-1 if row["tau"] is None else row["tau"]) == batch["divergence_position"][at]
        context = TOKENIZER.decode(batch["teacher_prompt_ids"][at], skip_special_tokens=True)
        if row["peer"] is not None:
            (peer,) = (r for r in found if place(r) == (*place(row)[:2], row["peer"]))
            assert peer["was_peer"] and peer["success"]
            assert context == f"{row['question']}[{row['answer']}|{peer['reply']}]"
    if groups == 2:
        assert any(row["tau"] is not None for row in found)
        shown = [row["peer"] is not None for row in found if row["context"] == "peer"]
        assert shown and all(shown) is (method == "hsd")  # the control's are of another group


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path):
    path, row = tmp_path / "rollouts.jsonl", {"reply": "漢"}
    lines = [json.dumps({"step": step} | row, ensure_ascii=False) for step in (1, 1, 2, 3)]
    path.write_text("\n".join(lines) + '\n{"step": 3, "rep', encoding="utf-8")
    state = SimpleNamespace(global_step=2, is_world_process_zero=True)
    RunFiles(tmp_path).on_train_begin(None, state, None)
    assert path.read_text(encoding="utf-8") == "\n".join(lines[:3]) + "\n"
