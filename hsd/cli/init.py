"""`hsd init [OUT.yaml]`: a commented configuration for `hsd train`, from three questions or from options.

    hsd init
    hsd init mine.yaml --model Qwen/Qwen3-1.7B --data train.jsonl --reward math --method hsd --learning_rate 1e-5

What a comment says is declared with the field, in `hsd.tasks.settings`, `hsd.HSDConfig` and TRL's `GRPOConfig`. A file
is written only where `hsd train OUT.yaml --check` accepts it.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import Field, asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hsd.files import check_file, replacing
from hsd.tasks.settings import Data, Lora, Model, Settings

if TYPE_CHECKING:
    from hsd.train.config import HSDConfig

HELP = "write a commented configuration for hsd train, from three questions or from options"
TAKES_OVERRIDES = True
OUT = "hsd.yaml"
SUFFIXES = (".yaml", ".yml")
ASKED = {"model": "model.path", "data": "data.path", "reward": "reward"}
WIDTH = 120
# The keys of ``train`` that are written, and values for those whose default is no place to begin.
WRITTEN = ("method", "learning_rate", "max_steps", "num_generations", "per_device_train_batch_size")
WRITTEN += ("gradient_accumulation_steps", "max_completion_length", "save_steps")
BEGIN = {"max_steps": 200, "save_steps": 50, "gradient_accumulation_steps": 8}
# The keys of ``train`` that are shown at their defaults.
OTHERS = ("teacher", "divergence", "reference_coef", "temperature", "top_p", "success_reward", "gradient_checkpointing")
OTHERS += ("save_total_limit", "eval_strategy", "eval_steps", "report_to", "use_vllm", "seed")
# What `hsd train` does with a key, instead of TRL's words.
NOTES = {
    "save_total_limit": "checkpoints that a finished run keeps, for more steps later; without this key it keeps none",
    "divergence": "forward_kl (the paper's), reverse_kl, or jsd, which learnt faster (docs/methods.md)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "hsd init [OUT.yaml] [--model M] [--data D] [--reward R] [--method NAME] [--key value ...]"
    for name, place in ASKED.items():
        parser.add_argument(f"--{name}", help=f"{declared()[place].metadata['help']}; asked for on a terminal")
    parser.epilog = "Any other key of hsd train can be set too: --max_steps 50, --data.held_out 100."


def run(args: argparse.Namespace) -> int:
    """Returns 0. Raises ValueError for a file that exists and for a configuration that `hsd train` would refuse."""
    words = list(args.overrides)
    path = Path(words.pop(0) if words and not words[0].startswith("-") else OUT)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"OUT: expected a file that ends in .yaml, got {path}")
    check_file("OUT", path, new=True)
    given = {name: getattr(args, name) for name in ASKED}
    for name in ASKED:
        if given[name] is None and not (name == "reward" and brings_its_reward(given["data"])):
            given[name] = ask(name)
    for name, value in given.items():
        words += [f"--{name}", value] if value is not None else []
    args.overrides = words  # by which hsd.cli.__main__ names the key of an error

    from hsd.cli.prepare import check, prepare
    from hsd.cli.settings import parse

    settings = parse({}, words)
    settings = replace(settings, train=BEGIN | without_gpu() | settings.train)
    job = prepare(settings, path.stem, check=True)
    found = check(job)
    with replacing(path) as part:
        part.write_text("\n".join(lines(path, settings, job.config)) + "\n", encoding="utf-8")
    print(f"{path}: {found}\nhsd train {path}")
    return 0


def without_gpu() -> dict[str, Any]:
    import torch

    return {} if torch.cuda.is_available() else {"use_cpu": True, "bf16": False}


def brings_its_reward(data: str) -> bool:
    from hsd.verify.generators import PREFIX

    return data.startswith(PREFIX)


def ask(name: str) -> str:
    """The answer to a question on the terminal; ValueError where there is none."""
    if not sys.stdin.isatty():
        raise ValueError(f"--{name}: expected a value where there is no terminal to ask on, got none")
    while True:
        try:
            answer = input(f"{name}: {declared()[ASKED[name]].metadata['help']}\n> ").strip()
        except EOFError:
            raise ValueError(f"--{name}: expected a value, got the end of the input") from None
        if answer:
            return answer


def declared() -> dict[str, Field[Any]]:
    """The fields of all sections but ``train``, by key."""
    found = {f.name: f for f in fields(Settings)}
    return found | {f"{name}.{f.name}": f for name, part in (("model", Model), ("data", Data)) for f in fields(part)}


def lines(path: Path, settings: Settings, config: HSDConfig) -> Iterator[str]:
    """The file's: what ``settings`` hold, and as comments what is left to its default."""
    places, train = declared(), {f.name: f for f in fields(config)}
    yield f"# hsd train {path}"
    yield "#"
    yield f"# `hsd train {path} --check` prints what would run. A key behind a # is at its default."
    for name, section in (("model", settings.model), ("data", settings.data)):
        yield f"{name}:"
        for f in fields(section):
            value = getattr(section, f.name)
            shown = Lora() if f.name == "lora" and value is None else value
            yield from entry(places[f"{name}.{f.name}"], shown, given=value != f.default)
    if settings.reward is not None:
        yield from entry(places["reward"], settings.reward, indent="")
    yield "train:"
    for name in dict.fromkeys((*WRITTEN, *settings.train)):
        yield from entry(train[name], settings.train.get(name, getattr(config, name)))
    for name in OTHERS:
        if name not in settings.train:
            default = train[name].default
            yield from entry(train[name], getattr(config, name) if default is None else default, given=False)


def entry(f: Field[Any], value: Any, *, given: bool = True, indent: str = "  ") -> Iterator[str]:
    """``key: value  # what it is``, all of it a comment where it was not given; the first sentences of a
    declaration, as many as there is room for."""
    plain = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    if isinstance(plain, str) and "\n" in plain:
        text = json.dumps(plain)  # on one line, which YAML reads
    else:
        flow = {"default_flow_style": True, "width": float("inf"), "allow_unicode": True, "sort_keys": False}
        text = yaml.safe_dump([plain], **flow)[1:-2]
    key = f"{indent}{'' if given else '# '}{f.name}: {text}"
    told = NOTES.get(f.name) or f.metadata.get("help", "")
    first, *more = " ".join(told.replace("%%", "%").split()).rstrip(".").split(". ")
    texts = [". ".join([first, *more[:n]]) for n in range(len(more) + 1)]
    said = max((text for text in texts if len(text) <= WIDTH - 4), key=len, default=first)
    if len(beside := f"{key}  # {said}") <= WIDTH:
        yield beside if said else key
    else:
        yield from textwrap.wrap(said, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
        yield key
