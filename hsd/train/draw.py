"""A method's draw in a run: the asks of all groups, sampled and judged in shares, and what becomes of the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hsd.data.rows import append_jsonl
from hsd.hindsight.context import Context
from hsd.hindsight.groups import Group, Prompt
from hsd.hindsight.peers import peer_rng
from hsd.hindsight.teacher_prompts import TeacherPrompts
from hsd.methods.draw import Ask, Drawn, GroupView, Outcome, Reply, Row, converse, gives_away
from hsd.methods.method import Method
from hsd.train.batch import PackedRows, padded_ids

Tokens = tuple[tuple[int, ...], tuple[int, ...] | None]  # of a reply, and of the prompt that it was sampled behind


@dataclass(frozen=True)
class Writer:
    """How replies come about. The functions are called on all ranks alike, each with its share, of equal size.

    Args:
        sample: (asks, who, seed) -> tokens of each reply.
        judge: (rows, texts, tokens) of this rank -> (raw, weighted) rewards of all ranks, in order.
        gather: A list of this rank's -> the list of all ranks'.
        write: ``writer_fn`` of the trainer.
    """

    tokenizer: Any
    sample: Callable[[Sequence[Ask], str, int], Sequence[Tokens]]
    judge: Callable[[Sequence[Mapping[str, Any]], Sequence[str], Sequence[Sequence[int]]], tuple[Tensor, list[float]]]
    gather: Callable[[list[Any]], list[Any]]
    rank: int = 0
    ranks: int = 1
    write: Callable[[list[Prompt]], Sequence[str]] | None = None

    def __call__(self, asked: Sequence[tuple[int, Ask]], groups: Sequence[GroupView], seed: int) -> list[Reply]:
        asks = [ask for _, ask in asked]
        tokens: dict[int, Tokens] = {}
        for i, ask in enumerate(asks):
            if ask.given is not None:
                tokens[i] = self.encoded(ask.given), None
        for who in ("policy", "teacher"):
            wanted = [i for i, a in enumerate(asks) if a.given is None and a.who == who]
            others = [i for i in wanted if self.write is not None and not asks[i].scored]
            if others:
                assert self.write is not None
                texts = self.write([asks[i].prompt for i in others])
                if len(texts) != len(others):
                    raise ValueError(f"writer_fn: expected {len(others)} texts, one a prompt, got {len(texts)}")
                tokens |= {i: (self.encoded(text), None) for i, text in zip(others, texts, strict=True)}
            mine = [i for i in wanted if i not in tokens]
            tokens |= dict(zip(mine, self._shared(mine, lambda s, w=who: self._sampled(asks, s, w, seed)), strict=True))
        texts = self.tokenizer.batch_decode([list(tokens[i][0]) for i in range(len(asks))], skip_special_tokens=True)
        judged = self._judged(asked, groups, texts, tokens)
        replies = []
        for i, (n, ask) in enumerate(asked):
            leaks = ask.secret and gives_away(texts[i], groups[n].group.answer)
            replies.append(Reply(texts[i], *tokens[i], *judged.get(i, ((), 0.0)), leaks=leaks))
        return replies

    def encoded(self, text: str) -> tuple[int, ...]:
        """With the end token."""
        ids = self.tokenizer(text=text, add_special_tokens=False)["input_ids"]
        end = self.tokenizer.eos_token_id
        return tuple(ids) if end is None or (ids and ids[-1] == end) else (*ids, end)

    def _shared(self, indices: list[int], work: Callable[[list[int]], Sequence[Any]]) -> list[Any]:
        """``work`` on this rank's share; results for all ``indices``."""
        if not indices:
            return []
        return self.gather(list(work(self._share(indices))))[: len(indices)]

    def _share(self, indices: list[int]) -> list[int]:
        size = -(-len(indices) // self.ranks)
        padded = [*indices, *[indices[-1]] * (size * self.ranks - len(indices))]
        return padded[self.rank * size : (self.rank + 1) * size]

    def _sampled(self, asks: Sequence[Ask], share: list[int], who: str, seed: int) -> Sequence[Tokens]:
        return self.sample([asks[i] for i in share], who, seed + self.rank)

    def _judged(
        self,
        asked: Sequence[tuple[int, Ask]],
        groups: Sequence[GroupView],
        texts: Sequence[str],
        tokens: Mapping[int, Tokens],
    ) -> dict[int, tuple[tuple[float, ...], float]]:
        found: dict[int, tuple[tuple[float, ...], float]] = {}
        scored = [i for i, (_, ask) in enumerate(asked) if ask.scored]
        if not scored:
            return found
        share = self._share(scored)
        rows = [asked[i][1].row or groups[asked[i][0]].row for i in share]
        raw, weighted = self.judge(rows, [texts[i] for i in share], [tokens[i][0] for i in share])
        return {i: (tuple(raw[k].tolist()), weighted[k]) for k, i in enumerate(scored)}


def run(
    method: Method,
    writer: Writer,
    groups: Sequence[Group],
    rows: Sequence[Mapping[str, Any]],
    texts: Sequence[str],
    feedback: Sequence[str | None],
    *,
    settings: Mapping[str, Any],
    state: Any,
    spare: Sequence[Mapping[str, Any]],
    seed: int,
    step: int,
    cap: int,
) -> Outcome:
    """The draws of all groups of a step; ``rows``, ``texts`` and ``feedback`` are of their rollouts, in order.

    ``spare`` is the data set. Seed and step alone decide what chance does, and the sampler's seed.
    """
    assert method.draw is not None
    views, at = [], 0
    for n, group in enumerate(groups):
        size = len(group.rollouts)
        rng = peer_rng(seed, step, -(1 << 40) - n)  # apart from the peers' and the contexts'
        anything = lambda rng=rng: spare[rng.randrange(len(spare))]  # noqa: E731
        pieces = lambda i, g=group: writer.tokenizer.batch_decode([[t] for t in g.rollouts[i].token_ids])  # noqa: E731
        said = texts[at : at + size], pieces, feedback[at : at + size]
        views.append(GroupView(group, rows[at], *said, rng, settings, state, anything))
        at += size

    def answer(asked: list[tuple[int, Ask]], number: int) -> Sequence[Reply]:
        return writer(asked, views, peer_rng(seed, step, -(1 << 41) - number).getrandbits(31))

    return converse([method.draw(view) for view in views], answer, cap)


def pack_rows(
    of_rollouts: Sequence[Sequence[Row]],
    questions: Sequence[Prompt],
    method: Method,
    writer: Writer,
    prompts: TeacherPrompts | None,
    pad_id: int,
    device: Any,
    mean_over_ranks: Callable[[Tensor], Tensor],
) -> PackedRows | None:
    """The extra rows of this rank's rollouts as tensors; None where no rank has any. ``rows_per_micro_batch`` is still
    that of the whole generation."""
    count = mean_over_ranks(torch.tensor(float(sum(map(len, of_rollouts))), device=device))
    if count == 0:
        return None
    most = method.max_rows
    for rows in of_rollouts:
        if len(rows) > most or any(len(row.contexts) > method.max_contexts for row in rows):
            raise ValueError(
                f"rows: expected {most} for a rollout at most, each with {method.max_contexts} contexts at most"
            )
    flat = [row for rows in of_rollouts for row in [*rows, *[Row(())] * (most - len(rows))]]
    shape = (len(of_rollouts), most)
    tokens = [writer.encoded(r.completion) if isinstance(r.completion, str) else tuple(r.completion) for r in flat]
    ids, mask = (x.reshape(*shape, -1) for x in padded_ids(tokens, pad_id, "right", device))
    weight = torch.tensor([row.weight for row in flat], device=device).reshape(shape)
    packed = PackedRows(ids, mask, weight, count)
    if prompts is None:
        return packed
    asked = [question for question in questions for _ in range(most)]
    shown = [
        prompts.render(question, context).prompt_ids
        for question, row in zip(asked, flat, strict=True)
        for context in [*row.contexts, *[Context()] * (method.max_contexts - len(row.contexts))]
    ]
    theirs = (x.reshape(*shape, method.max_contexts, -1) for x in padded_ids(shown, pad_id, "left", device))
    return replace(packed, **dict(zip(("teacher_ids", "teacher_mask"), theirs, strict=True)))


def marks(
    names: Sequence[str], drawn: Sequence[Drawn], where: Sequence[tuple[int, int]], like: Tensor
) -> dict[str, Tensor]:
    """Columns (B, T) of this rank's rollouts, at ``where`` in the groups."""
    found = {}
    for name in names:
        column = torch.zeros(like.shape, device=like.device)
        for row, (n, i) in zip(column, where, strict=True):
            values = torch.tensor(drawn[n].marks.get(name, {}).get(i, ()), dtype=column.dtype)[: len(row)]
            row[: len(values)] = values.to(row.device)
        found[name] = column
    return found


def draw_metrics(outcome: Outcome, rollouts: int) -> dict[str, float]:
    """Of the asks of a step: NaN where there were none."""
    written = [(ask, reply) for _, ask, reply in outcome.log if ask.given is None]
    secret = [reply.leaks for ask, reply in written if ask.secret]
    replaced = sum(len(d.rollouts) for d in outcome.drawn)
    return {
        "drawn_asks": float(len(outcome.log)),
        "drawn_empty": _share([not reply.text.strip() for _, reply in written]),
        "drawn_leaks": _share(secret),
        "drawn_dropped": outcome.dropped / max(1, len(outcome.drawn)),
        "drawn_replaced": replaced / rollouts,
        "drawn_rows": sum(len(rows) for d in outcome.drawn for rows in d.rows.values()) / rollouts,
    }


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags) if flags else float("nan")


def record(path: Path, step: int, outcome: Outcome) -> None:
    """A line of ``path`` for each ask of the step."""
    rows = []
    for n, ask, reply in outcome.log:
        row = {"step": step, "group": n, "who": "given" if ask.given is not None else ask.who, "text": reply.text}
        row |= {"reward": reply.reward} if ask.scored else {}
        rows.append(row | ({"leaks": reply.leaks} if ask.secret else {}))
    append_jsonl(path, rows)
