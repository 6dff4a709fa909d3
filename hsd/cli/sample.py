"""`hsd sample MODEL [MODEL ...] --prompt TEXT`: what models reply, side by side.

    hsd sample Qwen/Qwen3-0.6B runs/mine --prompt "What is 12 * 7?"
    hsd sample runs/mine/checkpoint-20 runs/mine --prompts questions.jsonl --n 3 --temperature 0.7

A prompt is asked as the first run among the models asks its questions: after its system message and other turns before
the question, above its instruction, through its chat template, with its sampling. Without a run, a model with a chat
template gets a user's message and another one the text.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hsd.cli.side_by_side import Reply, shown

if TYPE_CHECKING:
    from hsd.evaluate.sampling import Sampling
    from hsd.hindsight.groups import Prompt

HELP = "the replies of models or runs to prompts, side by side"
BATCH = 32  # rollouts at a time
MOST = 1000  # replies to a prompt; they are printed when all are there


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="hub id or folder of a model; run folder of hsd train or hsd demo (its newest model), or a model in it",
    )
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="text with a prompt a line, or JSONL, CSV or Parquet with question or prompt",
    )
    parser.add_argument("--n", type=int, default=1, help="replies of each model to each prompt (1, at most 1000)")
    parser.add_argument("--temperature", type=float, help="1.0, or the run's; 0 is greedy")
    parser.add_argument("--top-p", "--top_p", type=float, help="1.0, or the run's")
    parser.add_argument("--max-new-tokens", "--max_new_tokens", type=int, help="of a reply (512, or the run's)")
    parser.add_argument("--as-is", action="store_true", help="without the run's system message and instruction")
    parser.add_argument("--seed", type=int, default=0)


@dataclass(frozen=True)
class Asking:
    """How a prompt is put to a model."""

    chat: bool | None = None  # messages or the text; None: messages where the tokenizer has a chat template
    before: Sequence[dict[str, Any]] = ()  # turns before the question
    after: str = ""  # below the question
    template: Mapping[str, Any] = field(default_factory=dict)  # chat_template_kwargs

    def prompt(self, asked: Prompt, tokenizer: Any) -> Prompt:
        from hsd.hindsight.groups import last_user_text

        chat = self.chat is not False and bool(tokenizer.chat_template)
        if isinstance(asked, str):
            text = asked + self.after
            return [*self.before, {"role": "user", "content": text}] if chat else text
        return asked if chat else last_user_text(asked)


def run(args: argparse.Namespace) -> int:
    """Returns 0. Raises ValueError for what is no model and for a bad prompt, before any weights are loaded."""
    from hsd.cli.folder import run_and_model
    from hsd.evaluate.sampling import Sampling
    from hsd.policy.pretrained import check

    prompts = [*args.prompt, *(read_prompts(args.prompts) if args.prompts else [])]
    if not prompts or not all(prompts):
        raise ValueError(f"--prompt: expected a text, or --prompts with a file of them, got {prompts or 'none'}")
    if not 1 <= args.n <= MOST:
        raise ValueError(f"--n: expected 1 to {MOST} replies, got {args.n}")
    found = [run_and_model(Path(name)) if Path(name).is_dir() else (None, name) for name in args.models]
    paths = [str(path) for _, path in found]
    for path in paths:
        check(path)
    asking, sampling = how_to_ask(found, as_is=args.as_is) or (Asking(), Sampling(512))
    names = ("max_new_tokens", "temperature", "top_p")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    sampling = replace(sampling, batch_size=BATCH, **given)
    replies = []
    for name, path in zip(args.models, paths, strict=True):
        if sys.stderr.isatty():
            print(f"sampling from {name}", file=sys.stderr)
        replies.append(sampled(path, prompts, asking, sampling, n=args.n, seed=args.seed))
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for at, asked in enumerate(prompts):
        of_models = [of_all[at] for of_all in replies]
        print("\n".join(shown(asked, args.models, of_models, width)))
    return 0


def read_prompts(path: Path) -> list[Prompt]:
    """The lines of a text file; of a file of questions each row's question, else its prompt or problem."""
    from hsd.data.local_files import ENDINGS, read_rows
    from hsd.data.rows import is_prompt, likely_first
    from hsd.json_files import decoded

    if not path.is_file():
        raise ValueError(f"--prompts: expected a file, got {path}, which is not there")
    if not path.name.removesuffix(".gz").lower().endswith(ENDINGS):
        lines = decoded(path.read_bytes(), str(path)).splitlines()
        return [line for line in lines if line.strip()]
    asked = []
    for number, row in enumerate(read_rows(path), 1):
        prompt = next((row[name] for name in ("question", "prompt", "problem") if row.get(name)), None)
        if not prompt or not is_prompt(prompt):
            wanted = "a question, prompt or problem, text or messages that end with the user's text"
            got = f"the columns {likely_first(row)}" if prompt is None else f"{prompt!r:.200}"
            raise ValueError(f"--prompts: {path}, row {number}: expected {wanted}, got {got}")
        asked.append(prompt)
    return asked


def how_to_ask(found: Sequence[tuple[Path | None, Any]], *, as_is: bool) -> tuple[Asking, Sampling] | None:
    """How the first run among ``found`` (run, model) asks, and its sampling; None where there is no run."""
    from hsd.cli.folder import CONFIG, find_run
    from hsd.cli.prepare import prepare
    from hsd.cli.settings import load
    from hsd.evaluate.sampling import Sampling, choice_of

    runs = [(folder, model) for folder, model in found if folder is not None and (folder / CONFIG).exists()]
    if not runs:
        return None
    (folder, model), around = runs[0], {}
    config = prepare(load(folder / CONFIG), "sample", source=str(folder / CONFIG), check=True).config
    if not as_is:
        try:
            job, task = find_run(folder, str(model), None, None)
        except ValueError as error:
            raise ValueError(f"{error} (--as-is asks without the run's questions)") from error
        around = habits(task.evaluated, job.settings.data.instruction)
    template: Any = config.chat_template_kwargs
    sampling = Sampling(config.max_completion_length or 512, **choice_of(config))
    return Asking(template=template or {}, **around), sampling


def habits(rows: Sequence[Mapping[str, Any]], instruction: str | None) -> dict[str, Any]:
    """What all of a run's questions have around them, as fields of `Asking`."""
    from hsd.hindsight.groups import last_user_text

    prompts = [row["prompt"] for row in rows]
    texts = [last_user_text(prompt) for prompt in prompts]
    question = rows[0].get("question") or texts[0]
    own = texts[0][len(question) :] if texts[0].startswith(question) else ""  # hsd.data's
    after = f"\n\n{instruction}" if instruction else own
    found: dict[str, Any] = {"after": after if all(text.endswith(after) for text in texts) else ""}
    if isinstance(prompts[0], str):
        return found | {"chat": False}
    before = prompts[0][:-1]
    return found | {"before": before if all(prompt[:-1] == before for prompt in prompts) else ()}


def sampled(
    path: str, prompts: Sequence[Prompt], asking: Asking, sampling: Sampling, *, n: int, seed: int
) -> list[list[Reply]]:
    """``n`` replies of a model to each prompt."""
    import torch

    from hsd.evaluate import end_token_ids
    from hsd.evaluate.sampling import is_truncated, sample_from_ids
    from hsd.hindsight.context import tokenize_prompt
    from hsd.tasks.task import load_policy

    model, tokenizer = load_policy(path, "auto" if torch.cuda.is_available() else "float32").on_accelerator()
    asked = [asking.prompt(prompt, tokenizer) for prompt in prompts]
    ids = [tokenize_prompt(tokenizer, prompt, chat_template_kwargs=asking.template) for prompt in asked]
    rollouts = sample_from_ids(model, tokenizer, [i for i in ids for _ in range(n)], sampling, seed=seed)
    ends = end_token_ids(model, tokenizer)
    texts = tokenizer.batch_decode(rollouts, skip_special_tokens=True)
    replies = [Reply(t.strip(), len(r), is_truncated(r, ends)) for t, r in zip(texts, rollouts, strict=True)]
    return [replies[at : at + n] for at in range(0, len(replies), n)]
