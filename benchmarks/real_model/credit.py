"""Where the divergence of the first step lies: on the number, on the words around it, or on the end of the reply.

python -m benchmarks.real_model.credit [--seed 0] [--questions 24]
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch

from benchmarks.real_model.__main__ import RESULTS
from hsd.evaluate import end_token_ids, sample, score
from hsd.hindsight.context import build_context, tokenize_prompt
from hsd.tasks import registered
from hsd.tasks.task import load_policy

G = 6
KINDS = ("first token", "digit", "end", "other words")


def kind_of(position: int, token: int, text: str, ends: list[int]) -> str:
    """The class of a reply's token; a first token that is a digit is a digit."""
    if token in ends:
        return "end"
    if text.strip().isdigit():
        return "digit"
    return "first token" if position == 0 else "other words"


@torch.no_grad()
def rows(task: Any, policy: Any, questions: int, seed: int) -> list[dict[str, Any]]:
    """One row a token of each rollout: its class, KL(teacher || student) in nats at the task's temperature, D."""
    model, tokenizer = policy
    asked = [q for q in task.questions[:questions] for _ in range(G)]
    sampling = replace(task.sampling, batch_size=48)
    rollouts = sample(model, tokenizer, [q["prompt"] for q in asked], sampling, seed=seed)
    rewards, ends, found = score(tokenizer, asked, rollouts, task.reward), end_token_ids(model, tokenizer), []
    rng, temperature = random.Random(seed), task.sampling.temperature
    for i, (q, ids) in enumerate(zip(asked, rollouts, strict=True)):
        group = range(i - i % G, i - i % G + G)
        peers = [j for j in group if j != i and rewards[j] == 1.0]
        peer = rollouts[rng.choice(peers)] if peers else None
        context = build_context(tokenizer, q["prompt"], q["answer"], peer, task.template)
        own = tokenize_prompt(tokenizer, q["prompt"])
        p, t = (_log_probs(model, [*prompt, *ids], len(ids), temperature) for prompt in (own, context.prompt_ids))
        kl = (t.exp() * (t - p)).sum(-1)
        for at, token in enumerate(ids):
            text = tokenizer.decode([token])
            found.append(
                {
                    "kind": kind_of(at, token, text, ends),
                    "context": context.kind,
                    "success": rewards[i] == 1.0,
                    "kl": kl[at].item(),
                    "d": (t[at, token] - p[at, token]).item(),
                    "share": 1.0 / len(ids) / len(asked),
                }
            )
    return found


def _log_probs(model: Any, ids: list[int], last: int, temperature: float) -> torch.Tensor:
    logits = model(torch.tensor([ids]), logits_to_keep=last + 1).logits[0, :-1].float()
    return (logits / temperature).log_softmax(-1)


def table(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By context and class: tokens, mean KL, and the share of the loss (mean over tokens, then over rollouts)."""
    cells: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in found:
        cells[row["context"], row["kind"]].append(row)
    total = sum(r["kl"] * r["share"] for r in found)
    return [
        {
            "context": context,
            "kind": kind,
            "tokens": len(cell),
            "kl": sum(r["kl"] for r in cell) / len(cell),
            "share_of_loss": sum(r["kl"] * r["share"] for r in cell) / total,
        }
        for context in ("peer", "answer_only")
        for kind in KINDS
        if (cell := cells.get((context, kind)))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_model.credit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--questions", type=int, default=24)
    args = parser.parse_args()
    torch.set_num_threads(1)
    task = registered("additions", args.seed)
    policy = load_policy(task.model(), "bfloat16")
    found = table(rows(task, policy, args.questions, args.seed))
    (RESULTS / f"credit-seed{args.seed}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    for row in found:
        print(row)


if __name__ == "__main__":
    main()
