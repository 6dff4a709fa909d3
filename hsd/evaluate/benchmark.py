"""One benchmark: sample, judge and write as it goes, so that a killed evaluation goes on where it stood."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hsd.data.rows import Row, completions_of, fingerprint, reward_columns
from hsd.data.sources import Loaded
from hsd.evaluate.engines import Engine
from hsd.evaluate.pass_at_k import summarize
from hsd.evaluate.sampling import Sampling, is_truncated
from hsd.evaluate.success import RewardFn
from hsd.hindsight.context import tokenize_prompt
from hsd.hindsight.groups import last_user_text
from hsd.json_files import read_json, read_jsonl, write_json, write_jsonl
from hsd.progress import Progress

Record = dict[str, Any]

LARGEST_SEED = 2**43  # a batch's seed, about a million times this, fits into the 64 bits that torch takes


@dataclass(frozen=True)
class Request:
    """How the rows of a benchmark are sampled. Raises ValueError for what no engine can do."""

    sampling: Sampling
    samples: int = 1  # of each row
    seed: int = 0
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.samples < 1 or (self.sampling.temperature == 0 and self.samples > 1):
            raise ValueError(f"samples: expected a positive number, and 1 at temperature 0, got {self.samples}")
        if abs(self.seed) > LARGEST_SEED:
            raise ValueError(f"seed: expected a number from -2**43 to 2**43, got {self.seed}")


def evaluate(
    engine: Engine,
    model: str,
    data: Loaded,
    rewards: Mapping[str, RewardFn],
    folder: Path,
    request: Request,
    *,
    judge_again: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Samples every row as ``request`` says, judges, and returns the result, also in ``folder/result.json``.

    ``folder/samples.jsonl`` gets a line per sample after each batch. A later call with the same settings keeps whole
    batches and goes on; a batch's seed depends on its number alone, so the outcome is that of one uninterrupted run.

    Args:
        model: Its name, for the record.
        rewards: A TRL reward function for each ``kind`` of row ("math", "code"). It returns 1, 0, or None where the
            verifier failed, and may report a status through ``log_extra``.
        judge_again: Judge the samples that are there once more, with ``rewards``, and go on; nothing is sampled twice.

    Raises:
        ValueError: The folder holds an evaluation that began with other settings, or a kind has no reward function.
    """
    sampling, samples = request.sampling, request.samples
    if missing := {row.get("kind", "math") for row in data.rows} - rewards.keys():
        raise ValueError(f"rewards: expected a function for the kinds {sorted(missing)}, got {sorted(rewards)}")
    rows = [row | {"prompt": _prompt(engine.tokenizer, row)} for row in data.rows]  # as the model is asked
    settings = {
        "model": model,
        "model_modified": _modified(model),
        "engine": engine.name,
        "subset": data.name,
        "rows": len(data.rows),
        "rows_of_the_subset": data.total,
        "rows_unusable": data.unusable,
        "fingerprint": fingerprint(data.rows),
        "prompt_form": "text" if isinstance(rows[0]["prompt"], str) else "chat",
        **asdict(request),
        "verifiers": {
            kind: getattr(rewards[kind], "__name__", "?") for kind in sorted({r.get("kind", "math") for r in data.rows})
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    if _has_lines(folder / "samples.jsonl"):  # else nothing began, and a mistake in the settings may be corrected
        _same_settings(folder / "settings.json", settings, ("verifiers",) if judge_again else ())
    records = _whole_batches(folder / "samples.jsonl", sampling.batch_size, len(data.rows), samples)
    if judge_again and records:
        judged = judge([rows[r["row"]] for r in records], [r["completion"] for r in records], rewards)
        records = [r | {"reward": x, "status": s} for r, (x, s) in zip(records, judged, strict=True)]
        write_jsonl(folder / "samples.jsonl", records)
    write_json(folder / "settings.json", settings)
    flat = [(i, j) for i in range(len(data.rows)) for j in range(samples)]
    with open(folder / "samples.jsonl", "a", encoding="utf-8") as file:
        for start in range(len(records), len(flat), sampling.batch_size):
            batch = flat[start : start + sampling.batch_size]
            ids = [
                tokenize_prompt(engine.tokenizer, rows[i]["prompt"], chat_template_kwargs=request.chat_template_kwargs)
                for i, _ in batch
            ]
            rollouts = engine.generate(ids, sampling, request.seed * 1_000_003 + start)
            texts = engine.tokenizer.batch_decode(rollouts, skip_special_tokens=True)
            judged = judge([rows[i] for i, _ in batch], texts, rewards, rollouts)
            for (i, j), text, rollout, (reward, status) in zip(batch, texts, rollouts, judged, strict=True):
                record = {
                    "row": i,
                    "sample": j,
                    "id": data.rows[i].get("id"),
                    "answer": data.rows[i]["answer"],
                    "completion": text,
                    "length": len(rollout),
                    "truncated": is_truncated(rollout, engine.end_ids),
                    "reward": reward,
                    "status": status,
                }
                records.append(record)
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            if progress is not None:
                progress(len(records), len(flat))
    result = {**settings, **_totals(records, samples)}
    write_json(folder / "result.json", result)
    return result


def judge(
    rows: Sequence[Row],
    texts: Sequence[str],
    rewards: Mapping[str, RewardFn],
    ids: Sequence[Sequence[int]] | None = None,
) -> list[tuple[float | None, str | None]]:
    """Reward and status of each completion, by the verifier of its row's kind, called as TRL calls it: with texts where
    the prompt is one, else messages; with ``ids``, the completions' tokens, where they are known."""
    verdicts: list[tuple[float | None, str | None]] = [(None, None)] * len(rows)
    for kind in {row.get("kind", "math") for row in rows}:
        mine = [n for n, row in enumerate(rows) if row.get("kind", "math") == kind]
        statuses: list[Any] = [None] * len(mine)

        def log_extra(column: str, values: Sequence[Any], statuses: list[Any] = statuses) -> None:
            if column.endswith("_status"):
                statuses[:] = values

        scores = rewards[kind](
            **reward_columns([{"tests": None} | rows[n] for n in mine]),
            completions=completions_of([rows[n] for n in mine], [texts[n] for n in mine]),
            **({} if ids is None else {"completion_ids": [list(ids[n]) for n in mine]}),
            log_extra=log_extra,
        )
        for what, values in (("scores", scores), ("statuses", statuses)):
            if len(values) != len(mine):
                raise ValueError(f"rewards[{kind!r}]: expected {len(mine)} {what}, got {len(values)}")
        for n, score, status in zip(mine, scores, statuses, strict=True):
            verdicts[n] = (None if score is None or score != score else float(score), status)
    return verdicts


def _totals(records: Sequence[Record], samples: int) -> dict[str, Any]:
    grid = [[r["reward"] for r in records[at : at + samples]] for at in range(0, len(records), samples)]
    statuses = Counter(r["status"] for r in records if r["status"] is not None)
    return summarize(grid) | {
        "statuses": dict(statuses),
        "truncated": sum(r["truncated"] for r in records) / len(records),
        "mean_length": sum(r["length"] for r in records) / len(records),
    }


def _prompt(tokenizer: Any, row: Row) -> Any:
    """Messages where the tokenizer has a chat template, else the text."""
    return row["prompt"] if tokenizer.chat_template else last_user_text(row["prompt"])


def _same_settings(path: Path, settings: dict[str, Any], but: Sequence[str]) -> None:
    """Raises ValueError unless the evaluation in the folder of ``path`` has these settings, ``but`` for some keys."""
    if not path.exists():
        raise ValueError(f"out: {path.parent} holds samples without the {path.name} they were made with")
    old, new = read_json(path), json.loads(json.dumps(settings))
    if changed := [key for key in sorted(old.keys() | new.keys()) if key not in but and old.get(key) != new.get(key)]:
        differences = "; ".join(f"{key}: {old.get(key)!r} there, {new.get(key)!r} now" for key in changed)
        raise ValueError(f"out: {path.parent} holds an evaluation with other settings ({differences})")


def _has_lines(path: Path) -> bool:
    return path.exists() and b"\n" in path.read_bytes()


def _whole_batches(path: Path, batch_size: int, rows: int, samples: int) -> list[Record]:
    """The records of whole batches in a file that may end in the middle of one; the rest is cut off the file."""
    if not path.exists():
        return []
    with open(path, "rb+") as file:
        data = file.read()
        file.truncate(data.rfind(b"\n") + 1)
    records = list(read_jsonl(path))
    cut = len(records) < rows * samples
    if cut:
        records = records[: len(records) // batch_size * batch_size]
    for n, record in enumerate(records):
        row, sample = divmod(n, samples)
        if not _is_record(record) or (record["row"], record["sample"]) != (row, sample) or row >= rows:
            raise ValueError(f"{path}: expected sample {sample} of row {row} as number {n + 1}, got {record!r:.200}")
    if cut:
        write_jsonl(path, records)
    return records


def _is_record(record: Record) -> bool:
    """Whether the columns that a resumed evaluation needs are there, each of its type."""
    types = {"row": int, "sample": int, "completion": str, "length": int, "truncated": bool}
    if any(type(record.get(column)) is not kind for column, kind in types.items()):
        return False
    reward = record.get("reward", "")
    return (reward is None or type(reward) in (int, float)) and not isinstance(record.get("status", []), list | dict)


def _modified(model: str) -> float | None:
    """When the weights of a local model were last written: the same path may hold another model tomorrow."""
    weights = [p for pattern in ("*.safetensors", "*.bin") for p in Path(model).glob(pattern)]
    return max((p.stat().st_mtime for p in weights), default=None)
