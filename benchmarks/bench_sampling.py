"""Rollouts of a generation on one CPU thread: `hsd.policy.generate` beside transformers' own.

    python benchmarks/bench_sampling.py [--gsm8k gsm8k_train.jsonl] [--json PATH]

SmolLM2-135M-Instruct in fp32, computed in bf16 as in training, 64 rollouts of 8 questions (24 of 4 for additions).
Tokens are those up to a rollout's end. No row is printed unless the first greedy tokens in fp32 are equal.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import environment, header, save

from hsd.data import load
from hsd.evaluate.sampling import end_token_ids, until_end
from hsd.hindsight.context import tokenize_prompt
from hsd.padding import padded
from hsd.policy.generate import generate
from hsd.tasks import registered
from hsd.tasks.task import load_policy

GREEDY = 8  # tokens of the gate
BY = "transformers' `generate`", "hsd"


class Case:
    """Questions times rollouts, and how long a reply may be."""

    def __init__(self, name: str, policy: Any, questions: list[Any], rollouts: int, new: int):
        self.name, self.new, (self.model, tokenizer) = name, new, policy
        self.ids = [tokenize_prompt(tokenizer, q) for q in questions for _ in range(rollouts)]
        self.pad_id, self.ends = tokenizer.pad_token_id, end_token_ids(self.model, tokenizer)
        self.batch = padded(self.ids, self.pad_id, "left")

    def plain(self, new: int, **settings: Any) -> list[list[int]]:
        ids, mask = self.batch
        ending = {"max_new_tokens": new, "pad_token_id": self.pad_id, "eos_token_id": self.ends}
        return self.replies(self.model.generate(input_ids=ids, attention_mask=mask, **ending, **settings))

    def ours(self, new: int, **settings: Any) -> list[list[int]]:
        ending = {"max_new_tokens": new, "pad_id": self.pad_id, "end_ids": self.ends}
        return self.replies(generate(self.model, *self.batch, **ending, **settings))

    def replies(self, out: torch.Tensor) -> list[list[int]]:
        return [until_end(row, self.ends) for row in out[:, self.batch[0].shape[1] :].tolist()]

    def row(self, by: str) -> dict[str, Any]:
        call = dict(zip(BY, (self.plain, self.ours), strict=True))[by]
        torch.manual_seed(0)
        start = time.process_time()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            tokens = sum(map(len, call(self.new, do_sample=True, temperature=0.6, top_k=0)))
        seconds = time.process_time() - start
        prompt = sum(map(len, self.ids)) / len(self.ids)
        counts = {"rollouts": len(self.ids), "prompt": prompt, "tokens": tokens, "seconds": seconds}
        return {"case": self.name, "by": by} | counts


def cases(gsm8k: Path | None) -> list[Callable[[], Case]]:
    policy = load_policy(registered("additions", 0).model())
    policy.model.eval()

    def of(task: str, questions: int, rollouts: int) -> Case:
        found = registered(task, 0)
        prompts = [q["prompt"] for q in found.questions[:questions]]
        return Case(task, policy, prompts, rollouts, found.sampling.max_new_tokens)

    made: list[Callable[[], Case]] = [lambda: of("additions", 4, 6), lambda: of("chain_sum", 8, 8)]
    if gsm8k is not None:
        asked = [[{"role": "user", "content": row["question"]}] for row in load(str(gsm8k))[:8]]
        made.append(lambda: Case("GSM8K", policy, asked, 8, 200))
    return made


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| questions | sampled by | rollouts | tokens of a prompt | tokens sampled | CPU s | tokens / CPU s |",
        "|---" * 7 + "|",
    ]
    for r in rows:
        counts = f"{r['rollouts']} | {r['prompt']:.0f} | {r['tokens']:,}"
        times = f"{r['seconds']:.1f} | {r['tokens'] / r['seconds']:.0f}"
        lines.append(f"| {r['case']} | {r['by']} | {counts} | {times} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", type=Path, help="a file of its questions; without it that row is left out")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    facts, rows = environment("cpu"), []
    for make in cases(args.gsm8k):
        case = make()
        with torch.no_grad():
            if case.plain(GREEDY, do_sample=False) != case.ours(GREEDY, do_sample=False):
                raise SystemExit(f"{case.name}: greedy tokens differ from those of model.generate")
        rows += [case.row(by) for by in BY]
        print(table(rows[-len(BY) :]), flush=True)
    shown = table(rows)
    print(header(facts), shown, sep="\n\n")
    if args.json:
        save(args.json, facts, rows, shown)


if __name__ == "__main__":
    main()
