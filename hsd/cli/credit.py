"""`hsd credit`: the paper's figures of credit, and a page that shows every rollout token by token.

    hsd credit runs/small-seed0
    hsd credit RUN --data questions.jsonl
    hsd credit --model PATH --data questions.jsonl --questions 32 --max-new-tokens 1024

Samples two groups for each question, lets the model itself be the teacher, once with a peer and the answer in context
and once with the answer alone, and writes credit.html, credit.json and the figures into RUN/credit (or ``--out``).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hsd.viewer.make import Subject

HELP = "figures of where the credit lands, and a page of rollouts token by token"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="?", type=Path, help="run folder of hsd train or of the demo")
    parser.add_argument("--model", help="hub id or path, instead of the run's newest model")
    parser.add_argument("--data", type=Path, help="JSONL with question and answer; a run brings its own")
    parser.add_argument("--out", type=Path, help="folder to write into (RUN/credit, or ./credit)")
    parser.add_argument("--questions", type=int, default=64, help="use the first N (64)")
    parser.add_argument("--rollouts", type=int, default=8, help="group size G (8)")
    parser.add_argument("--max-new-tokens", type=int, help="of a rollout (512; a run has its own)")
    parser.add_argument("--shown", type=int, default=6, help="groups on the page (6)")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    """Returns 0. Raises ValueError where a model or questions are missing."""
    from hsd.demo import report
    from hsd.train.callbacks import load_metrics
    from hsd.viewer import summary
    from hsd.viewer.make import make_credit, sample_groups

    for name, least in (("questions", 1), ("rollouts", 2), ("shown", 1), ("max_new_tokens", 1)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise ValueError(f"{name}: expected at least {least}, got {getattr(args, name)}")
    model = args.model or newest_model(args.run)
    subject, questions = load(args, str(model))
    questions = questions[: args.questions]
    out = args.out or (args.run / "credit" if args.run else Path("credit"))
    out.mkdir(parents=True, exist_ok=True)
    print(f"{subject.title}: {model}, {len(questions)} questions x {args.rollouts} rollouts, twice", flush=True)
    groups, again = (sample_groups(subject, questions, args.seed + n, args.rollouts) for n in (0, 1))
    note = f"Model {model}, seed {args.seed}. The teacher has the same weights."
    credit = make_credit(out, subject, groups, again, seed=args.seed, note=note, shown=args.shown)
    pictures = summary.draw(out, credit)
    if args.run and (rows := load_metrics(args.run / "metrics.jsonl")):
        pictures += report.training_picture(out, rows)
    print("\n".join(summary.lines(credit)))
    print("\nWrote " + ", ".join(str(p) for p in (out / "credit.html", out / "credit.json", *pictures)))
    return 0


def newest_model(run: Path | None) -> Path:
    """``RUN/model``, else the last whole checkpoint, else RUN itself where that is a saved model."""
    from hsd.train.callbacks import last_checkpoint

    if run is None:
        raise ValueError("run: expected a run folder, or --model with --data, got neither")
    if not run.is_dir():
        raise ValueError(f"run: expected a folder, got {run}")
    for folder in (run / "model", last_checkpoint(run), run):
        if folder is not None and any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
            return folder
    raise ValueError(f"run: expected a model, a checkpoint or config.json in {run}, got none; give --model")


def load(args: argparse.Namespace, model: str) -> tuple[Subject, list[dict[str, Any]]]:
    """The policy with its verifier and context template, and questions: a run's own, else those of --data.

    The demo's questions are held out; those of `hsd train` are the ones it trains on.
    """
    import torch
    from transformers import AutoModelForCausalLM

    own = next((find for name, find in RUNS.items() if args.run and (args.run / name).exists()), None)
    if args.data is None and own is None:
        raise ValueError("data: expected a JSONL file of questions, or a run of `hsd train` or of the demo, got none")
    cuda = torch.cuda.is_available()
    policy: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto" if cuda else torch.float32)
    policy = policy.to("cuda" if cuda else "cpu")
    found = _from_file if args.data is not None or own is None else own
    subject, questions = found(args, model)
    subject.tokenizer.pad_token = subject.tokenizer.pad_token or subject.tokenizer.eos_token
    length = args.max_new_tokens or subject.sampling.max_new_tokens
    return replace(subject, model=policy, sampling=replace(subject.sampling, max_new_tokens=length)), questions


def _from_demo(args: argparse.Namespace, model: str) -> tuple[Subject, list[dict[str, Any]]]:
    from hsd.data.rows import read_json
    from hsd.demo import worlds
    from hsd.demo.__main__ import parse, say

    given = read_json(args.run / "arguments.json")
    name = given.pop("world")
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in given.items()]
    world = getattr(worlds, name)(parse([name, *flags, f"--out={args.run}"]), say)
    return world.subject, world.held_out


def _from_train(args: argparse.Namespace, model: str) -> tuple[Subject, list[dict[str, Any]]]:
    from transformers import AutoTokenizer

    from hsd.cli.pieces import load_rewards, load_rows
    from hsd.cli.settings import read
    from hsd.evaluate import Sampling
    from hsd.hindsight.context import DEFAULT_CHAT_TEMPLATE, DEFAULT_TEXT_TEMPLATE
    from hsd.train.config import HSDConfig
    from hsd.viewer.make import Subject

    settings, _ = read(args.run / "config.yaml")
    config = HSDConfig(**settings.train)
    tokenizer = AutoTokenizer.from_pretrained(model)
    chat = bool(tokenizer.chat_template) if settings.data.chat is None else settings.data.chat
    template = config.context_template(DEFAULT_CHAT_TEMPLATE if chat else DEFAULT_TEXT_TEMPLATE)
    rewards = load_rewards(settings.reward)
    sampling = Sampling(config.max_completion_length or 512, config.temperature, config.top_p, batch_size=64)
    title = f"{settings.model.path} on {settings.data.path}"
    weights = config.reward_weights or [1.0] * len(rewards)
    reward = _weighted(rewards, weights, config.success_reward)
    subject = Subject(title, None, tokenizer, reward, template, sampling, config.success_reward)
    return subject, load_rows(settings.data, config.seed, chat)


def _weighted(
    rewards: Sequence[Callable[..., Any]], weights: Sequence[float], success_reward: float
) -> Callable[..., list[float]]:
    """The sum that `HSDTrainer` compares with ``success_reward``: verdicts that failed (None, NaN) are left out, and a
    rollout without any is no success."""
    unscored = min(0.0, success_reward - 1.0)

    def reward(**columns: Any) -> list[float]:
        verdicts = [
            [None if r is None or math.isnan(r) else w * r for r in f(**columns)]
            for f, w in zip(rewards, weights, strict=True)
        ]
        judged = [[r for r in of_one if r is not None] for of_one in zip(*verdicts, strict=True)]
        return [sum(of_one) if of_one else unscored for of_one in judged]

    return reward


def _from_file(args: argparse.Namespace, model: str) -> tuple[Subject, list[dict[str, Any]]]:
    from transformers import AutoTokenizer

    from hsd.demo.worlds import read_questions
    from hsd.evaluate import Sampling
    from hsd.hindsight.context import DEFAULT_CHAT_TEMPLATE, DEFAULT_TEXT_TEMPLATE
    from hsd.verify import number_reward
    from hsd.viewer.make import Subject

    tokenizer = AutoTokenizer.from_pretrained(model)
    questions = read_questions(args.data, args.questions)
    chat = tokenizer.chat_template is not None
    if not chat:
        questions = [{**q, "prompt": q["prompt"][-1]["content"]} for q in questions]
    template = DEFAULT_CHAT_TEMPLATE if chat else DEFAULT_TEXT_TEMPLATE
    title = f"{Path(model).name} on {args.data.name}"
    sampling = Sampling(max_new_tokens=512, top_p=0.95, batch_size=64)
    return Subject(title, None, tokenizer, number_reward, template, sampling), questions


# What a run folder holds -> how to read it.
RUNS = {"arguments.json": _from_demo, "config.yaml": _from_train}
