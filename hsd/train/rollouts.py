"""rollouts.jsonl: some of a run's rollouts to read, a line each.

On resume `hsd.train.callbacks.RunFiles` drops the lines after the checkpoint's step. TRL's ``log_completions`` keeps
all, as Parquet and without what their teachers were shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hsd.hindsight.groups import Member, last_user_text
from hsd.hindsight.teacher_prompts import TeacherPrompt
from hsd.json_files import append_jsonl

Row = dict[str, Any]


def rollout_rows(
    step: int,
    members: Sequence[Member],
    prompts: Sequence[Sequence[TeacherPrompt]] | None,
    unscored: Sequence[bool],
    tokenizer: Any,
    *,
    groups: int,
) -> list[Row]:
    """A row for each of a process's rollouts in the first ``groups`` groups of a generation.

    Args:
        prompts: The teacher's for each of ``members``, of which the first counts; None without a teacher.
        unscored: Which of ``members`` have no verdict: their reward is None.
    """
    found = []
    for i, m in enumerate(members):
        if m.number >= groups:
            continue
        rollout, shown = m.rollout, prompts[i][0] if prompts else None
        found.append(
            {
                "step": step,
                "group": m.number,
                "rollout": m.index,
                "question": last_user_text(m.group.prompt),
                "answer": m.group.answer,
                "reply": tokenizer.decode(list(rollout.token_ids), skip_special_tokens=True),
                "tokens": len(rollout.token_ids),
                "reward": None if unscored[i] else rollout.reward,
                "success": m.success,
                "context": shown.context.kind if shown else None,  # what the teacher was shown
                "peer": shown.peer if shown else None,  # the rollout of the group in it
                "tau": shown.tau if shown else None,  # the first token that differs from it
            }
        )
    return found


def append_rollouts(path: Path, found: Sequence[Row]) -> None:
    """The rows of all processes, each with ``was_peer``: whether a teacher was shown this rollout."""
    peers = {(row["group"], row["peer"]) for row in found}
    append_jsonl(path, (row | {"was_peer": (row["group"], row["rollout"]) in peers} for row in found))
