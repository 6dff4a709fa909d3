"""``hsd eval``: pass@1 of a model on benchmarks, as JSON and a Markdown table.

hsd eval --model Qwen/Qwen3-1.7B --data math-500 aime-24 --samples 16 --out runs/eval
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hsd.data.sources import Loaded

HELP = "pass@1 of a model on benchmarks or local JSONL files"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="hub id or folder")
    parser.add_argument(
        "--data",
        required=True,
        nargs="+",
        metavar="NAME|FILE",
        help="data sets by name, with an optional :split (math-500, gsm8k:train), or JSONL files",
    )
    parser.add_argument("--out", required=True, type=Path, help="folder; the same command goes on where it stopped")
    parser.add_argument("--samples", type=int, default=1, help="rollouts per question (1)")
    parser.add_argument("--limit", type=int, help="only the first n questions of each data set")
    parser.add_argument("--max-new-tokens", type=int, default=4096, help="of a rollout (4096)")
    parser.add_argument("--temperature", type=float, default=1.0, help="1.0; 0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--batch-size", type=int, default=32, help="rollouts at a time (32; for vllm, hundreds)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=("auto", "transformers", "vllm"), default="auto")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="auto: as the model is saved",
    )
    parser.add_argument(
        "--verifier",
        choices=("auto", "numbers"),
        default="auto",
        help="auto: math_reward or code_reward by the kind of question; numbers: the last number of the answer",
    )
    parser.add_argument("--judge-again", action="store_true", help="score the samples in --out with --verifier anew")
    parser.add_argument(
        "--chat-template-kwargs", type=_object, default={}, metavar="JSON", help='as {"enable_thinking": false}'
    )


def run(args: argparse.Namespace) -> int:
    from hsd.data.rows import write_json
    from hsd.data.sources import load_source
    from hsd.evaluate.benchmark import Request, evaluate
    from hsd.evaluate.engines import choose, load_engine
    from hsd.evaluate.sampling import Sampling
    from hsd.evaluate.table import markdown
    from hsd.files import replacing
    from hsd.progress import counter

    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_p, args.batch_size)
    request = Request(sampling, args.samples, args.seed, args.chat_template_kwargs)
    choose(args.engine)  # whatever is wrong with the request is said before a model is loaded
    loaded: dict[str, Loaded] = {}
    for data in (load_source(name, limit=args.limit) for name in dict.fromkeys(args.data)):
        if (other := loaded.setdefault(slug(data.name), data)) is not data:
            folder = args.out / slug(data.name)
            raise ValueError(f"--data: expected one data set for {folder}, got {other.name} and {data.name}")
    rewards = verifiers(args.verifier)
    engine = load_engine(args.engine, args.model, args.dtype)
    results = []
    for folder, data in loaded.items():
        print(data, flush=True)
        result = evaluate(
            engine,
            args.model,
            data,
            rewards,
            args.out / folder,
            request,
            judge_again=args.judge_again,
            progress=counter("sampled"),
        )
        results.append(result)
        write_json(args.out / "results.json", results)
        with replacing(args.out / "results.md") as part:
            part.write_text(markdown(results), encoding="utf-8")
    print(markdown(results))
    return 0


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}")
    return value


def verifiers(choice: str) -> Mapping[str, Any]:
    """A reward function per kind of question."""
    from hsd import verify

    rewards: dict[str, Any] = {"generated": verify.reasoning_gym_success}
    if choice == "numbers":
        return rewards | {"math": verify.number_reward}

    # As LiveCodeBench's harness, so that pass@1 can be compared with what is published.
    return rewards | {"math": verify.math_reward, "code": verify.code_reward_with(official=True)}


def slug(name: str) -> str:
    """A folder's name: ``openai/gsm8k main test`` gives ``openai-gsm8k-main-test``."""
    return re.sub(r"[^\w.+]+", "-", re.sub(r"\.jsonl(\.gz)?$", "", name)).strip("-")
