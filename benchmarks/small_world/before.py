"""A seed's warm start, and what is measured before any training: success, coverage, credit, and the teacher's steps."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median_low
from typing import Any

import torch

from benchmarks.small_world.plan import GROUP_SIZE, Scale
from benchmarks.small_world.run import TEMPLATE, evaluate, questions, rounded, sampling_of
from hsd.evaluate import Sampling, sample, score
from hsd.hindsight.credit import coverage, divergence_position
from hsd.hindsight.groups import Group
from hsd.hindsight.peers import choose_peers
from hsd.tasks import small_world
from hsd.tasks.task import Policy
from hsd.viewer.make import sample_groups
from hsd.viewer.measure import WINDOWS, credit_tables, draw_peers, failing_with_peer, measure


def warm_start(folder: Path, seed: int, steps: int, scale: Scale, terms: int = small_world.TERMS) -> dict[str, Any]:
    """Train and save the policy that all runs of a seed begin with; success, coverage and credit before any of them."""
    torch.set_num_threads(1)
    started = time.process_time()
    tokenizer = small_world.build_tokenizer()
    model = small_world.build_model(seed)
    small_world.warm_start(model, tokenizer, seed=seed, steps=steps, terms=terms)
    model.eval()
    trained = time.process_time() - started
    part = folder.with_suffix(".part")
    model.save_pretrained(part)
    if folder.exists():
        shutil.rmtree(folder)  # a killed run's, whose JSON is missing
    part.replace(folder)
    sampling = sampling_of(terms)
    validation, final = questions(seed, scale, terms)
    task = replace(small_world.task(seed), sampling=sampling)
    groups = sample_groups(task, Policy(model, tokenizer), final[: scale.credit_questions], seed, GROUP_SIZE)
    return {
        "validation": asdict(evaluate(model, tokenizer, validation, seed, sampling)),
        "final": asdict(evaluate(model, tokenizer, final, seed, sampling)),
        "greedy": evaluate(model, tokenizer, final, seed, replace(sampling, temperature=1e-3)).mean,
        "teacher_success": teacher_success(model, tokenizer, groups, seed, sampling),
        "credit": credit_facts(model, tokenizer, groups, seed),
        "after_tau": after_tau(model, tokenizer, groups, seed, sampling),
        "train_cpu_seconds": trained,
        "cpu_seconds": time.process_time() - started,
    }


def credit_facts(model: Any, tokenizer: Any, groups: Sequence[Group], seed: int) -> dict[str, Any]:
    """Credit on the failing rollouts with a peer, under the peer teacher and the answer-only teacher."""
    rates = [len(g.successes) / GROUP_SIZE for g in groups]
    p = sum(rates) / len(rates)
    facts: dict[str, Any] = {
        "success": p,
        "coverage": sum(len(g.failures) for g in groups if g.successes) / (GROUP_SIZE * len(groups)),
        "formula": coverage(p, GROUP_SIZE),
    }
    peers = draw_peers(tokenizer, groups, seed)
    measured = measure(Policy(model, tokenizer), groups, peers, TEMPLATE, failing_with_peer(groups, peers))
    taus = [r.tau for r in measured if r.tau is not None]
    if not taus:
        return facts
    tables = credit_tables(measured)
    return facts | {
        "failing_with_peer": len(measured),
        "median_tau": float(median_low(taus)),
        "windows": list(WINDOWS),
        "mass": {n: [rounded(m) for m in table.mass()] for n, table in tables.items()},
        "mean_abs": {n: rounded(table.mean_abs()) for n, table in tables.items()},
        "at_tau": {n: rounded(table.profile(0, 0)[1][0]) for n, table in tables.items()},
    }


def teacher_success(
    model: Any, tokenizer: Any, groups: Sequence[Group], seed: int, sampling: Sampling
) -> dict[str, float]:
    """Success of each teacher, were it to write the solution itself: what a student can take over from a fixed one."""
    shown = _contexts(groups, tokenizer, random.Random(seed))
    shares = {}
    for name in ("with_peer", "answer_only"):
        prompts = [str(group.prompt) + contexts[name] for group, _, _, contexts in shown]
        asked = [{"prompt": prompt, "answer": group.answer} for prompt, (group, *_) in zip(prompts, shown, strict=True)]
        rewards = score(tokenizer, asked, sample(model, tokenizer, prompts, sampling, seed=seed), small_world.reward)
        shares[name] = sum(rewards) / len(rewards) if rewards else float("nan")
    return shares


def after_tau(
    model: Any, tokenizer: Any, groups: Sequence[Group], seed: int, sampling: Sampling
) -> dict[str, list[float]]:
    """Once a failing rollout has left its peer, does the teacher go on from the rollout's number or from the peer's?

    The rollout is kept up to tau, its first other digit, and written on under each context. Returned by context:
    the share of continuations that go on from the own numbers to the end, and of those that also add rightly.
    """
    left = []
    for group, i, peer, contexts in _contexts(groups, tokenizer, random.Random(seed)):
        ids = group.rollouts[i].token_ids
        tau = divergence_position(ids, group.rollouts[peer].token_ids)
        if i in group.failures and tau is not None and tau < len(ids) - 1:
            left.append((str(group.prompt), tokenizer.decode(list(ids[: tau + 1])), contexts))
    if not left:
        return {}
    shares = {}
    for name in ("with_peer", "answer_only", "alone"):
        prompts = [question + contexts[name] + prefix for question, prefix, contexts in left]
        rest = sample(model, tokenizer, prompts, sampling, seed=seed)
        texts = tokenizer.batch_decode([list(r) for r in rest], skip_special_tokens=True)
        kept = [follows(question, prefix, text) for (question, prefix, _), text in zip(left, texts, strict=True)]
        shares[name] = [sum(own) / len(kept) for own in zip(*kept, strict=True)]
    return shares


def _contexts(
    groups: Sequence[Group], tokenizer: Any, rng: random.Random
) -> list[tuple[Group, int, int, dict[str, str]]]:
    """(group, rollout, its peer, the words of each context) of every rollout that has a peer."""
    found = []
    for group in groups:
        for i, peer in enumerate(choose_peers(group, "uniform", rng=rng)):
            if peer is not None:
                text = tokenizer.decode(list(group.rollouts[peer].token_ids), skip_special_tokens=True)
                words = {
                    "with_peer": small_world.WITH_PEER.format(answer=group.answer, demonstration=text),
                    "answer_only": small_world.ANSWER_ONLY.format(answer=group.answer),
                    "alone": "",
                }
                found.append((group, i, peer, words))
    return found


def follows(question: str, prefix: str, rest: str) -> tuple[bool, bool]:
    """(goes on, and adds rightly), of the steps after the one that ``prefix`` ends in.

    It goes on if each of them adds the question's next number to the result before it, and the last result is given
    as the answer; it adds rightly if the results are right, too.
    """
    numbers = [int(n) for n in question.removesuffix("=").split("+")]
    *steps, answer = (prefix + rest).split(";")
    if len(steps) != len(numbers) - 1:
        return False, False
    terms = [step.partition("=")[0] for step in steps]
    results = [step.partition("=")[2] for step in steps]
    later = range(prefix.count(";") + 1, len(steps))
    goes_on = all(terms[i] == f"{results[i - 1]}+{numbers[i + 1]}" for i in later) and answer == f"#{results[-1]}"
    return goes_on, goes_on and all(int(results[i - 1]) + numbers[i + 1] == int(results[i]) for i in later)
