"""A method's draw in a run: the asks of all groups, sampled and judged in shares, and what becomes of the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hsd.data.rows import completions_of
from hsd.hindsight.context import Context
from hsd.hindsight.groups import Member, Prompt, Rollout, members
from hsd.hindsight.peers import peer_rng
from hsd.hindsight.teacher_prompts import TeacherPrompts
from hsd.json_files import append_jsonl
from hsd.methods.draw import Ask, Drawn, GroupView, Outcome, Reply, Row, converse, gives_away
from hsd.methods.method import Method
from hsd.padding import padded
from hsd.policy.forward import Prompts, RolloutInputs
from hsd.progress import counted
from hsd.train.batch import COLUMN, PackedRows, student_inputs
from hsd.train.config import HSDConfig

Ids = tuple[int, ...]
Tokens = tuple[Ids, Ids | None]  # of a reply, and of the prompt that it was sampled behind


@dataclass(frozen=True)
class Writer:
    """How replies come about. The functions are called on all ranks alike, each with its share, of equal size.

    Args:
        prompt_ids: The tokens of a prompt as the student reads it.
        prompts: Of the run's teacher; None where the method has none.
        sample: (prompts, who, seed) -> tokens of each reply.
        judge: (rows, texts, tokens) of this rank -> (raw, weighted) rewards of all ranks, in order.
        gather: A list of this rank's -> the list of all ranks'.
        write: ``writer_fn`` of the trainer, which may say something else on each rank.
    """

    tokenizer: Any
    prompt_ids: Callable[[Prompt], Ids]
    prompts: TeacherPrompts | None
    sample: Callable[[Sequence[Ids], str, int], Sequence[Sequence[int]]]
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
                share = self._share(others)
                texts = self.write([asks[i].prompt for i in share])
                if len(texts) != len(share):
                    raise ValueError(
                        f"writer_fn: expected {counted(len(share), 'text')}, one a prompt, got {len(texts)}"
                    )
                texts = self.gather(list(texts))[: len(others)]
                tokens |= {i: (self.encoded(text), None) for i, text in zip(others, texts, strict=True)}
            if mine := [i for i in wanted if i not in tokens]:
                sampled = self.gather(self._sampled([asks[i] for i in self._share(mine)], who, seed + self.rank))
                tokens |= dict(zip(mine, sampled[: len(mine)], strict=True))
        texts = self.tokenizer.batch_decode([list(tokens[i][0]) for i in range(len(asks))], skip_special_tokens=True)
        judged = self._judged(asked, groups, texts, tokens)
        replies = []
        for i, (n, ask) in enumerate(asked):
            leaks = ask.secret and gives_away(texts[i], groups[n].row.get("answer"))
            replies.append(Reply(texts[i], *tokens[i], *judged.get(i, ((), 0.0)), leaks=leaks))
        return replies

    def encoded(self, text: str) -> tuple[int, ...]:
        """With the end token."""
        ids = self.tokenizer(text=text, add_special_tokens=False)["input_ids"]
        end = self.tokenizer.eos_token_id
        return tuple(ids) if end is None or (ids and ids[-1] == end) else (*ids, end)

    def _share(self, indices: list[int]) -> list[int]:
        """Of this rank, of equal size on all; some of the last indices are there more than once."""
        size = -(-len(indices) // self.ranks)
        padded = [*indices, *[indices[-1]] * (size * self.ranks - len(indices))]
        return padded[self.rank * size : (self.rank + 1) * size]

    def _sampled(self, asks: Sequence[Ask], who: str, seed: int) -> list[Tokens]:
        asked = [self._asked_ids(ask) for ask in asks]
        return [(tuple(said), prompt) for said, prompt in zip(self.sample(asked, who, seed), asked, strict=True)]

    def _asked_ids(self, ask: Ask) -> Ids:
        if ask.context is None:
            return self.prompt_ids(ask.prompt)
        assert self.prompts is not None
        return self.prompts.render(ask.prompt, ask.context).prompt_ids

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


@dataclass(frozen=True)
class Scored:
    """What the rewards of a generation leave for its teachers' prompts."""

    rewards: list[float]  # of all ranks
    unscored: Tensor  # (rollouts of all ranks,) bool: every verifier failed
    completion_ids: list[list[int]]  # of this rank
    feedback: list[str | None]  # of this rank
    outcome: Outcome | None = None  # of the method's draw
    before: float = 0.0  # success rate before it


def weighted(rewards: Tensor, weights: Tensor, success_reward: float) -> tuple[list[float], Tensor]:
    """Of (N, functions): the weighted sums, and which have no verdict: every verifier failed, so that they are no
    success, no peer, and have no advantage."""
    unscored = rewards.isnan().all(-1)
    sums = (rewards * weights.to(rewards.device)).nansum(-1)
    return sums.masked_fill(unscored, min(0.0, success_reward - 1.0)).tolist(), unscored


def run(
    args: HSDConfig,
    writer: Writer,
    rows: Sequence[Mapping[str, Any]],
    scored: Scored,
    *,
    size: int,
    state: Any,
    spare: Sequence[Mapping[str, Any]],
    step: int,
    generation: int,
) -> tuple[Outcome, float]:
    """The draws of all groups of a step, and the success rate before them.

    ``rows`` are those of this rank's rollouts, ``spare`` is the data set. Seed and ``generation``, of
    `hsd.hindsight.peers.GenerationNumbers`, alone decide what chance does, and the sampler's seed.
    """
    draw = args.method_spec.draw
    assert draw is not None
    rows = writer.gather([{k: v for k, v in row.items() if k != "completion"} for row in rows])
    ids, feedback = writer.gather(scored.completion_ids), writer.gather(scored.feedback)
    found = zip(ids, scored.rewards, scored.unscored.tolist(), strict=True)
    rollouts = [Rollout(tuple(i), reward=r, scored=not unscored) for i, r, unscored in found]
    everyone = members(rows, rollouts, first=0, group_size=size, success_reward=args.success_reward)
    texts = writer.tokenizer.batch_decode(ids, skip_special_tokens=True)
    views = []
    for at in range(0, len(everyone), size):
        group, n = everyone[at].group, everyone[at].number
        rng = peer_rng(args.seed, generation, -(1 << 40) - n)  # apart from the peers' and the contexts'
        anything = lambda rng=rng: spare[rng.randrange(len(spare))]  # noqa: E731
        pieces = lambda i, g=group: writer.tokenizer.batch_decode([[t] for t in g.rollouts[i].token_ids])  # noqa: E731
        said = texts[at : at + size], pieces, feedback[at : at + size]
        views.append(GroupView(group, rows[at], *said, rng, args.settings, state, anything, step))

    def answer(asked: list[tuple[int, Ask]], number: int) -> Sequence[Reply]:
        return writer(asked, views, peer_rng(args.seed, generation, -(1 << 41) - number).getrandbits(31))

    outcome = converse([draw(view) for view in views], answer, args.draw_cap or 4 * len(rows))
    return outcome, sum(m.success for m in everyone) / max(1, int((~scored.unscored).sum()))


def with_replies(rewards: Tensor, outcome: Outcome, size: int) -> Tensor:
    """The rewards (N, functions) of all ranks, with those of the replies that take a rollout's place."""
    rewards = rewards.clone()
    for n, drawn in enumerate(outcome.drawn):
        if drawn.row is not None and len(drawn.rollouts) != size:
            raise ValueError(f"row: expected {size} rollouts of another question, got {len(drawn.rollouts)}")
        for i, reply in drawn.rollouts.items():
            if len(reply.scores) != rewards.shape[1]:
                raise ValueError("rollouts: expected replies to asks with scored=True, got one without a reward")
            rewards[n * size + i] = torch.tensor(reply.scores, dtype=rewards.dtype)
    return rewards


def take_replies(
    outcome: Outcome,
    inputs: list[dict[str, Any]],
    prompts: list[Prompt],
    completions: list[Any],
    scored: Scored,
    *,
    first: int,
    size: int,
) -> tuple[list[list[int]], list[str | None]]:
    """This rank's rollouts and their feedback, with replies in the place of some. The questions that these answer go
    into ``inputs`` and ``prompts``, their texts into ``completions``: TRL's lists."""
    completion_ids, feedback = list(scored.completion_ids), list(scored.feedback)
    for k, row in enumerate(inputs):
        n, i = divmod(first + k, size)
        if reply := outcome.drawn[n].rollouts.get(i):
            completion_ids[k], feedback[k] = list(reply.token_ids), None
            inputs[k] = {**row, **(outcome.drawn[n].row or {})}
            prompts[k] = inputs[k]["prompt"]
            completions[k] = completions_of([inputs[k]], [reply.text])[0]
    return completion_ids, feedback


def put_replies(
    batch: dict[str, Any],
    scored: Scored,
    rows: Sequence[Mapping[str, Any]],
    writer: Writer,
    *,
    size: int,
    ends: set[int] | None,
) -> RolloutInputs | None:
    """Put this rank's rollouts and questions into TRL's batch where replies have taken the place of some.

    Returns the rollouts behind the prompts that they were sampled behind, where a hint made one of these other than the
    student's or the batch has log-probs of the rollouts that were replaced; else None. ``ends``: a rollout that ends in
    none of these tokens is masked; None masks none.
    """
    assert scored.outcome is not None
    drawn, first = scored.outcome.drawn, writer.rank * len(rows)
    if not any(d.rollouts for d in drawn):
        return None
    pad_id, device = writer.tokenizer.pad_token_id, batch["completion_ids"].device

    def tensors(rows: Sequence[Sequence[int]], side: Any) -> list[Tensor]:
        return [x.to(device) for x in padded(rows, pad_id, side)]

    ids, mask = tensors(scored.completion_ids, "right")
    if ends is not None:
        mask = mask * torch.tensor([[row[-1] in ends] for row in scored.completion_ids], device=device)
    asked = [writer.prompt_ids(row["prompt"]) for row in rows]
    batch["prompt_ids"], batch["prompt_mask"] = tensors(asked, "left")
    batch |= {"completion_ids": ids, "completion_mask": mask}
    batch.pop("sampling_per_token_logps", None)
    outdated = batch.pop("old_per_token_logps", None) is not None
    if not (outdated or any(r.prompt_ids is not None for d in drawn for r in d.rollouts.values())):
        return None
    replies = [drawn[(first + k) // size].rollouts.get((first + k) % size) for k in range(len(asked))]
    behind = [q if r is None or r.prompt_ids is None else r.prompt_ids for q, r in zip(asked, replies, strict=True)]
    return replace(student_inputs(batch)[0], prompts={"student": Prompts(*tensors(behind, "left"))})


def drawn_columns(
    method: Method,
    outcome: Outcome,
    mine: Sequence[Member],
    writer: Writer,
    mask: Tensor,
    mean_over_ranks: Callable[[Tensor], Tensor],
    steps: int,
) -> dict[str, Tensor]:
    """The draw's marks and extra rows for TRL's batch, whose completion mask is ``mask`` (B, T)."""
    where = [(m.number, m.index) for m in mine]
    found = {COLUMN + name: x for name, x in marks(method.marks, outcome.drawn, where, mask.float()).items()}
    if not method.max_rows:
        return found
    of_rollouts = [outcome.drawn[n].rows.get(i, ()) for n, i in where]
    count = mean_over_ranks(torch.tensor(float(sum(map(len, of_rollouts))), device=mask.device))
    if count == 0:  # on no rank
        return found
    rows = pack_rows(of_rollouts, [m.group.prompt for m in mine], method, writer, count / steps)
    return found | {name: x.to(mask.device) for name, x in rows.pack().items()}


def pack_rows(
    of_rollouts: Sequence[Sequence[Row]],
    questions: Sequence[Prompt],
    method: Method,
    writer: Writer,
    rows_per_micro_batch: Tensor,
) -> PackedRows:
    """The extra rows of this rank's rollouts as tensors, on the CPU."""
    most, pad_id = method.max_rows, writer.tokenizer.pad_token_id
    for rows in of_rollouts:
        if len(rows) > most or any(len(row.contexts) > method.max_contexts for row in rows):
            raise ValueError(
                f"rows: expected {most} for a rollout at most, each with {method.max_contexts} contexts at most"
            )
    flat = [row for rows in of_rollouts for row in [*rows, *[Row(())] * (most - len(rows))]]
    shape = (len(of_rollouts), most)
    tokens = [writer.encoded(r.completion) if isinstance(r.completion, str) else tuple(r.completion) for r in flat]
    ids, mask = (x.reshape(*shape, -1) for x in padded(tokens, pad_id))
    packed = PackedRows(ids, mask, torch.tensor([row.weight for row in flat]).reshape(shape), rows_per_micro_batch)
    if writer.prompts is None:
        return packed
    asked = [question for question in questions for _ in range(most)]
    shown = [
        writer.prompts.render(question, context).prompt_ids
        for question, row in zip(asked, flat, strict=True)
        for context in [*row.contexts, *[Context()] * (method.max_contexts - len(row.contexts))]
    ]
    theirs, their_mask = (x.reshape(*shape, method.max_contexts, -1) for x in padded(shown, pad_id, "left"))
    return replace(packed, teacher_ids=theirs, teacher_mask=their_mask)


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
