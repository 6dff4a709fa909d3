"""``hsd eval``: pass@1 of a model on benchmarks, as JSON and a Markdown table.

hsd eval --model Qwen/Qwen3-1.7B --data math-500 aime-24 --samples 16 --out runs/eval
hsd eval runs/mine
hsd eval --model MODEL --data mine.jsonl --reward my_module:my_reward --out runs/eval
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hsd.data.sources import Loaded
    from hsd.evaluate import Sampling
    from hsd.evaluate.benchmark import Request

HELP = "pass@1 of a run's model on its questions, or of any model on benchmarks and files"
KINDS = ("math", "code", "generated")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run",
        nargs="?",
        type=Path,
        metavar="RUN",
        help="run folder of hsd train or hsd demo, or a model in it: model, held-out questions, reward, sampling",
    )
    parser.add_argument("--model", help="hub id or folder, instead of the run's newest model")
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="NAME|FILE",
        help="data sets by name, with an optional :split (math-500, gsm8k:train), or files",
    )
    parser.add_argument("--out", type=Path, help="folder; the same command goes on where it stopped (RUN/eval-STEPS)")
    parser.add_argument("--samples", type=int, help="rollouts per question (1, or the run's task's)")
    parser.add_argument("--limit", type=int, help="only the first n questions of each data set")
    parser.add_argument("--max-new-tokens", type=int, help="of a rollout (4096, or the run's)")
    parser.add_argument("--temperature", type=float, help="1.0, or the run's; 0 is greedy")
    parser.add_argument("--top-p", type=float, help="1.0, or the run's")
    parser.add_argument("--batch-size", type=int, help="rollouts at a time (32, or the run's; for vllm, hundreds)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=("auto", "transformers", "vllm"), default="auto")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="auto: as the model is saved",
    )
    parser.add_argument(
        "--reward",
        nargs="+",
        metavar="NAME|MODULE:FUNCTION",
        help="as in hsd train: number, math, code or your own (the run's, or by the kind of question)",
    )
    parser.add_argument("--judge-again", action="store_true", help="score the samples in --out with --reward anew")
    parser.add_argument("--chat-template-kwargs", type=_object, metavar="JSON", help='as {"enable_thinking": false}')


@dataclass(frozen=True)
class Asked:
    model: str
    data: Sequence[Loaded]
    rewards: Mapping[str, Any]  # by kind of question
    request: Request
    out: Path


def run(args: argparse.Namespace) -> int:
    from hsd.evaluate.benchmark import evaluate
    from hsd.evaluate.engines import choose, load_engine
    from hsd.evaluate.table import markdown
    from hsd.files import check_folder, replacing
    from hsd.json_files import write_json
    from hsd.progress import counter
    from hsd.train.card import write_success

    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit: expected a positive number of questions, got {args.limit}")
    choose(args.engine)  # whatever is wrong with the request is said before a model is loaded
    asked = of_run(args) if args.run else of_benchmarks(args)
    check_folder("--out", asked.out)
    loaded: dict[str, Loaded] = {}
    for data in asked.data:
        if (other := loaded.setdefault(slug(data.name), data)) is not data:
            folder = asked.out / slug(data.name)
            raise ValueError(f"--data: expected one data set for {folder}, got {other.name} and {data.name}")
    engine = load_engine(args.engine, asked.model, args.dtype)
    results = []
    for folder, data in loaded.items():
        print(data, flush=True)
        result = evaluate(
            engine,
            asked.model,
            data,
            asked.rewards,
            asked.out / folder,
            asked.request,
            judge_again=args.judge_again,
            progress=counter("sampled"),
        )
        results.append(result)
        write_json(asked.out / "results.json", results)
        with replacing(asked.out / "results.md") as part:
            part.write_text(markdown(results), encoding="utf-8")
    print(markdown(results))
    if args.run and not (args.model or args.data):
        write_success(Path(asked.model), markdown(results).removeprefix(f"`{asked.model}`, "))  # a path is private
    return 0


def of_benchmarks(args: argparse.Namespace) -> Asked:
    """A model on data sets as they are published."""
    from hsd.data.sources import load_source
    from hsd.evaluate import Sampling

    for name in ("model", "data", "out"):
        if getattr(args, name) is None:
            raise ValueError(f"--{name}: expected a value, or a run of hsd train or hsd demo, got none")
    request = _request(args, Sampling(4096, batch_size=32), 1, {})
    data = [load_source(name, limit=args.limit) for name in dict.fromkeys(args.data)]
    return Asked(args.model, data, _rewards(args.reward), request, args.out)


def of_run(args: argparse.Namespace) -> Asked:
    """What the run says about everything that was not given."""
    from hsd.cli.folder import find_run, run_and_model, steps_of
    from hsd.data.sources import Loaded
    from hsd.tasks.task import success_of
    from hsd.viewer import held_out

    if args.judge_again and not args.reward:  # it may need the completions' tokens, which are not kept
        raise ValueError("--reward: expected another reward with --judge-again, got none")
    folder, newest = run_and_model(args.run)
    model, data = args.model or str(newest), []
    out = args.out or folder / (f"eval-{slug(Path(model).name)}" if args.model else f"eval-{steps_of(newest)}")
    names = list(dict.fromkeys(args.data or [None]))
    of_data = [find_run(folder, model, name, args.max_new_tokens) for name in names]
    for name, (_, task) in zip(names, of_data, strict=True):
        rows = list(task.evaluated)
        title = name or (held_out.QUESTIONS if task.held_out else "training questions")
        data.append(Loaded(rows[: args.limit], Path(title).name, len(rows), {}))
    job, task = of_data[0]
    template: Any = job.config.chat_template_kwargs
    request = _request(args, task.sampling, task.eval_samples, template or {})
    own = success_of(task.rewards, task.reward_weights, task.success_reward)
    return Asked(model, data, _rewards(args.reward) if args.reward else dict.fromkeys(KINDS, own), request, out)


def _request(args: argparse.Namespace, sampling: Sampling, samples: int, template: Mapping[str, Any]) -> Request:
    from hsd.evaluate.benchmark import Request

    names = ("max_new_tokens", "temperature", "top_p", "batch_size")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    return Request(
        replace(sampling, **given),
        samples if args.samples is None else args.samples,
        args.seed,
        template if args.chat_template_kwargs is None else args.chat_template_kwargs,
    )


def _rewards(names: Sequence[str] | None) -> Mapping[str, Any]:
    """A reward function per kind of question: those of ``names``, whose sum of 1 is a success, for all kinds."""
    from hsd import verify
    from hsd.tasks.files import load_rewards
    from hsd.tasks.task import success_of

    if names:
        return dict.fromkeys(KINDS, success_of(load_rewards(list(names))))
    # Code as LiveCodeBench's harness, so that pass@1 can be compared with what is published.
    own = {"math": verify.math_reward, "code": verify.code_reward_with(official=True)}
    return own | {"generated": verify.reasoning_gym_success}


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}")
    return value


def slug(name: str) -> str:
    """A folder's name: ``openai/gsm8k main test`` gives ``openai-gsm8k-main-test``."""
    return re.sub(r"[^\w.+]+", "-", re.sub(r"\.jsonl(\.gz)?$", "", name)).strip("-")
