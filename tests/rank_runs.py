"""What the jobs of several ranks and the tests that read them share: one step of SGD on tiny models, and its reference,
the same rollouts in one micro-batch of one process."""

import atexit
import functools
import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tiny_runs import LORA, STEP, TOKENIZER, half, qwen3
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from hsd.hindsight.context import ContextTemplate
from hsd.tasks import small_world
from hsd.train.config import HSDConfig
from hsd.train.trainer import HSDTrainer

SIZE = 4  # rollouts a group
TEMPLATE = ContextTemplate(small_world.WITH_PEER, small_world.ANSWER_ONLY, demonstration_only="[|{demonstration}]")
QUESTIONS = small_world.make_questions(8, seed=0)
TESTS = Path(__file__).parent


class Recorder(HSDTrainer):
    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        self.batches = [*getattr(self, "batches", []), batch | {"questions": [x["prompt"] for x in inputs]}]
        return batch


def make(folder, rows, *, lora=False, tied=True, model=None, callbacks=(), **kwargs):
    """A trainer whose single step, SGD at learning rate 1, moves the weights by minus the gradient."""
    return Recorder(
        model=qwen3(tie_word_embeddings=tied) if model is None else model,
        reward_funcs=half,
        args=HSDConfig(str(folder), **STEP | {"per_device_train_batch_size": rows} | kwargs),
        train_dataset=Dataset.from_list(QUESTIONS),
        processing_class=TOKENIZER,
        context_template=TEMPLATE,
        peft_config=LORA if lora else None,
        callbacks=list(callbacks),
    )


def start_elsewhere(trainer) -> None:
    """The student off the initial policy (and LoRA off its zero): where they agree, a wrong side would not show."""
    generator = torch.Generator().manual_seed(3)  # its own: one seed for both ranks would give both the same rollouts
    with torch.no_grad():
        for p in trainer.model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=generator))


def weights(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def load(path: Path) -> Any:
    """A file as a module."""
    spec = importlib.util.spec_from_file_location(f"job_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def host() -> subprocess.Popen:
    env = os.environ | {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, str(TESTS / "rank_host.py")], env=env, text=True, **pipes)
    atexit.register(process.communicate)  # it ends with its input
    return process


def launch(job: Path, arguments, folder: Path, *, seconds: float, **env: str) -> None:
    """``main(*arguments)`` of the file ``job`` on two ranks of this machine. Raises AssertionError with their last
    words."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | env
    asked = {
        "job": str(job),
        "arguments": [*map(str, arguments)],
        "folder": str(folder),
        "seconds": seconds,
        "env": env,
    }
    process = host()
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(asked) + "\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    assert answer, "the host of the ranks has ended"
    logs = "\n".join((folder / f"log{rank}").read_text()[-3000:] for rank in (0, 1))
    assert json.loads(answer) == [0, 0], logs


def saved(folder, name):
    return [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1)]


def joined(batches):
    """One batch of several ranks' (prompts padded on the left, rollouts on the right)."""
    out = {"questions": [q for b in batches for q in b["questions"]]}
    for name, value in batches[0].items():
        if isinstance(value, torch.Tensor) and value.ndim > 0:
            rows = [row for b in batches for row in b[name]]
            side = "right" if name.startswith("completion") else "left"
            pad = TOKENIZER.pad_token_id if name.endswith("_ids") else 0
            if name.startswith("rows/") and value.ndim > 2:
                side = "left" if "teacher" in name else "right"
                longest = max(row.shape[-1] for row in rows)
                ends = [longest - row.shape[-1] for row in rows]
                rows = [
                    functional.pad(r, (n, 0) if side == "left" else (0, n)) for r, n in zip(rows, ends, strict=True)
                ]
            out[name] = pad_sequence(rows, True, pad, padding_side=side) if value.ndim == 2 else torch.stack(rows)
        elif name.startswith("column/"):
            assert all(torch.equal(b[name], value) for b in batches), name  # a number of the generation
            out[name] = value
    if "rows/mask" in out:
        out["rows/rows_per_micro_batch"] = out["rows/mask"].any(-1).sum().float()
    tokens = out["completion_mask"].sum(-1)
    out["policy_tokens_per_micro_batch"] = tokens.sum().float()  # all of the step's, in one micro-batch
    if "has_context" in out:
        out["tokens_per_micro_batch"] = (tokens * out["has_context"]).sum().float()
    return out


def one_process(folder, batch, options, **of_make):
    """Loss and gradients of the same rows in this process, in one micro-batch."""
    options = {k: v for k, v in options.items() if "accumulation" not in k}
    trainer = make(folder, len(batch["questions"]), **of_make, **options)
    start_elsewhere(trainer)
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in trainer.model.named_parameters() if p.requires_grad}


def assert_same(gradient, expected):
    assert gradient.keys() == expected.keys()
    scale = max(g.abs().max().item() for g in expected.values())
    assert scale > 1e-4  # a vanishing gradient would pass any comparison
    for name, g in expected.items():
        torch.testing.assert_close(gradient[name], g, rtol=1e-3, atol=1e-5 * scale, msg=name)
