"""Other people's losses and ours in their place: time and peak memory of a loss and its backward.

    python benchmarks/bench_adapters.py [--shapes 32000,256 ...] [--only NAME ...] [--json PATH]

A shape is (vocabulary, completion tokens), in two rollouts behind prompts of 32 tokens (the teacher's: 96). The model
is a Qwen3 of two layers with hidden size 256, fp32, tied; one thread runs it. TRL's and Liger's sides are the packages
themselves; OPSD's and verl's are their formulas over dense logits, written anew in a few lines, since no package of
them exists. The gate comes first, at a small vocabulary: loss and gradient of both sides; a red one gets no time. Every
row has a process of its own, forked from one that has imported and not computed. Times are seconds of CPU of the second
call, which a busy machine inflates less than wall time. Memory is how much the resident set grows, at its peak, once
model, inputs and gradients are there. Linux only.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from timing import environment, header, save
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from hsd.tasks import small_world

SHAPES = ["32000,256"]
GATE_SHAPE = (1009, 24)
GATE = 1e-4  # relative, in fp32: loss, and L2 of all gradients
ROLLOUTS, PROMPT, TEACHER_PROMPT, HIDDEN = 2, 32, 96, 256
Sides = tuple[torch.nn.Module, Callable[[], Tensor], Callable[[], Tensor]]  # model, theirs, ours


def build(vocabulary: int, seed: int = 0) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=small_world.EOS_ID,
        pad_token_id=0,
    )
    return Qwen3ForCausalLM(config)


def batch(vocabulary: int, tokens: int) -> dict[str, Tensor]:
    """A batch in the keys of TRL's SDPO. The second rollout ends early, so that masks matter."""
    g = torch.Generator().manual_seed(0)
    length = tokens // ROLLOUTS

    def ids(n: int) -> Tensor:
        return torch.randint(2, vocabulary, (ROLLOUTS, n), generator=g)

    mask = torch.ones(ROLLOUTS, length, dtype=torch.long)
    mask[1, -length // 8 :] = 0
    completion = ids(length) * mask
    seen = torch.ones(ROLLOUTS, TEACHER_PROMPT, dtype=torch.long)
    return {
        "prompt_ids": ids(PROMPT),
        "prompt_mask": torch.ones(ROLLOUTS, PROMPT, dtype=torch.long),
        "completion_ids": completion,
        "completion_mask": mask,
        "teacher_input_ids": torch.cat([ids(TEACHER_PROMPT), completion], 1),
        "teacher_attention_mask": torch.cat([seen, mask], 1),
    }


def trl_sides(make: Callable[[dict[str, Any]], Any], inputs: dict[str, Any]) -> Sides:
    """One trainer, patched for ours only."""
    from hsd.adapters.trl import patch_trl

    common = {"max_steps": 1, "per_device_train_batch_size": 2, "bf16": False, "gradient_checkpointing": False}
    common |= {"use_cpu": True, "report_to": "none", "output_dir": tempfile.mkdtemp(), "disable_tqdm": True}
    trainer = make(common)
    trainer.current_gradient_accumulation_steps = 1

    def run(patched: bool) -> Tensor:
        with patch_trl() if patched else nullcontext():
            return trainer.compute_loss(trainer.model, dict(inputs))

    return trainer.model, lambda: run(False), lambda: run(True)


ROWS = [{"prompt": "1+1=", "text": "x"}] * 4


def trl_sdpo(vocabulary: int, tokens: int) -> Sides:
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    def make(common: dict[str, Any]) -> Any:
        args = SDPOConfig(**common, num_generations=2, distillation_mode="full_logits", teacher_model_kind="live")
        data = Dataset.from_list(ROWS)
        tokenizer = small_world.build_tokenizer()
        return SDPOTrainer(
            build(vocabulary), lambda **_: [0.0], args=args, train_dataset=data, processing_class=tokenizer
        )

    return trl_sides(make, batch(vocabulary, tokens))


def trl_gkd(vocabulary: int, tokens: int) -> Sides:
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    given = batch(vocabulary, tokens)
    ids = torch.cat([given["prompt_ids"], given["completion_ids"]], 1)
    mask = torch.cat([given["prompt_mask"], given["completion_mask"]], 1)
    labels = torch.cat([torch.full_like(given["prompt_ids"], -100), given["completion_ids"]], 1)
    labels = labels.masked_fill(mask == 0, -100)

    def make(common: dict[str, Any]) -> Any:
        return GKDTrainer(
            build(vocabulary),
            teacher_model=build(vocabulary, 1),
            args=GKDConfig(**common, beta=0.5),
            train_dataset=Dataset.from_list(ROWS),
            processing_class=small_world.build_tokenizer(),
            data_collator=lambda _: None,
        )

    return trl_sides(make, {"input_ids": ids, "attention_mask": mask, "labels": labels})


def trl_distillation(vocabulary: int, tokens: int) -> Sides:
    from trl import DistillationConfig, DistillationTrainer

    def make(common: dict[str, Any]) -> Any:
        args = DistillationConfig(**common, beta=0.5)
        data = Dataset.from_list(ROWS)
        students = (build(vocabulary), build(vocabulary, 1))
        return DistillationTrainer(
            *students, args=args, train_dataset=data, processing_class=small_world.build_tokenizer()
        )

    return trl_sides(make, batch(vocabulary, tokens))


def divergence(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """The generalized JSD of OPSD, GKD and SDPO over dense logits, summed over the vocabulary."""
    ls, lt = student.log_softmax(-1), teacher.log_softmax(-1)
    if beta in (0.0, 1.0):
        return (lt.exp() * (lt - ls) if beta == 0.0 else ls.exp() * (ls - lt)).sum(-1)
    lm = torch.logsumexp(torch.stack([ls + torch.tensor(1 - beta).log(), lt + torch.tensor(beta).log()]), 0)
    return (beta * lt.exp() * (lt - lm) + (1 - beta) * ls.exp() * (ls - lm)).sum(-1)


def opsd(vocabulary: int, tokens: int) -> Sides:
    from hsd.adapters.opsd import FusedOPSD

    model, given = build(vocabulary), batch(vocabulary, tokens)
    student = torch.cat([given["prompt_ids"], given["completion_ids"]], 1)
    labels = torch.cat([torch.full_like(given["prompt_ids"], -100), given["completion_ids"]], 1)
    inputs = {
        "student_input_ids": student,
        "student_attention_mask": torch.cat([given["prompt_mask"], given["completion_mask"]], 1),
        "student_prompt_length": PROMPT,
        "teacher_input_ids": given["teacher_input_ids"],
        "teacher_attention_mask": given["teacher_attention_mask"],
        "teacher_prompt_length": TEACHER_PROMPT,
        "labels": labels.masked_fill(labels == 0, -100),
    }

    def logits(side: str) -> Tensor:
        out = model(input_ids=inputs[f"{side}_input_ids"], attention_mask=inputs[f"{side}_attention_mask"]).logits
        return out[:, inputs[f"{side}_prompt_length"] - 1 : -1]

    def theirs() -> Tensor:
        seen = logits("student")
        with torch.no_grad():
            teacher = logits("teacher")
        return divergence(seen, teacher, 0.5)[inputs["labels"][:, PROMPT:] != -100].mean()

    trainer = FusedOPSD()
    accelerator = SimpleNamespace(unwrap_model=lambda m: m, autocast=nullcontext)
    options = {"beta": 0.5, "temperature": 1.0, "top_k_loss": None, "use_thinking_machines_loss": False}
    trainer.__dict__ |= options | {"fixed_teacher": False, "use_ema_teacher": False, "accelerator": accelerator}
    return model, theirs, lambda: trainer.compute_loss(model, inputs)


def hidden_sides(vocabulary: int, tokens: int) -> tuple[torch.nn.Linear, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    head = torch.nn.Linear(HIDDEN, vocabulary, bias=False)
    student, teacher = torch.randn(tokens, HIDDEN), torch.randn(tokens, HIDDEN)
    return head, student.requires_grad_(), teacher, torch.randint(vocabulary, (tokens,))


def verl(vocabulary: int, tokens: int) -> Sides:
    """On packed hidden states; every third token is a prompt's, which dense logits pay for too."""
    from hsd.adapters.packed import packed_loss

    head, student, teacher, targets = hidden_sides(vocabulary, tokens)
    mask = (torch.arange(tokens) % 3 != 0).float()
    old = torch.full((tokens,), -12.0)

    def theirs() -> Tensor:
        seen = head(student)
        with torch.no_grad():
            other = head(teacher)
        logps = seen.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        ratio = (logps - old).detach().clamp(-20, 20).exp().clamp(max=2.0)
        return (divergence(seen, other, 1.0) * ratio * mask).sum() / mask.sum()

    def ours() -> Tensor:
        given = {"target_ids": targets, "loss_mask": mask, "old_logps": old, "is_clip": 2.0}
        return packed_loss(student, teacher, head.weight, **given).loss

    return head, theirs, ours


def liger(vocabulary: int, tokens: int) -> Sides:
    """Liger's chunked JSD without its cross-entropy; its Triton JSD needs a GPU."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss as Theirs

    from hsd.adapters.liger import LigerFusedLinearJSDLoss as Ours

    head, student, teacher, targets = hidden_sides(vocabulary, tokens)
    options = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0, "compiled": False}

    def run(cls: Any) -> Tensor:
        return cls(**options)(student, head.weight, teacher, head.weight.detach(), targets)

    return head, lambda: run(Theirs), lambda: run(Ours)


def plain(vocabulary: int, tokens: int) -> Sides:
    """A hand-written loop: two calls of the model and log-softmax, against `hsd_loss_from_ids`."""
    from hsd.adapters.transformers import hsd_loss_from_ids

    model, given = build(vocabulary), batch(vocabulary, tokens)
    lengths = given["completion_mask"].sum(-1).tolist()
    rollouts = [row[:n].tolist() for row, n in zip(given["completion_ids"], lengths, strict=True)]
    prompts = (given["prompt_ids"].tolist(), given["teacher_input_ids"][:, :TEACHER_PROMPT].tolist())
    student, teacher = ([p + o for p, o in zip(side, rollouts, strict=True)] for side in prompts)
    length = given["completion_ids"].shape[1]

    def logits(ids: Tensor, mask: Tensor) -> Tensor:
        return model(input_ids=ids, attention_mask=mask, logits_to_keep=length + 1).logits[:, :-1]

    def theirs() -> Tensor:
        ids = torch.cat([given["prompt_ids"], given["completion_ids"]], 1)
        mask = torch.cat([given["prompt_mask"], given["completion_mask"]], 1)
        seen = logits(ids, mask)
        with torch.no_grad():
            other = logits(given["teacher_input_ids"], given["teacher_attention_mask"])
        rows = divergence(seen, other, 0.0) * given["completion_mask"]
        return (rows.sum(-1) / given["completion_mask"].sum(-1)).mean()

    return model, theirs, lambda: hsd_loss_from_ids(model, student, teacher, lengths).loss


CASES = {
    "trl GKD": trl_gkd,
    "trl SDPO": trl_sdpo,
    "trl Distillation": trl_distillation,
    "OPSD (formula)": opsd,
    "verl (formula)": verl,
    "liger chunked JSD": liger,
    "plain transformers": plain,
}


HOSTS = (
    "trl.experimental.gkd",
    "trl.experimental.sdpo",
    "trl.trainer.distillation_trainer",
    "liger_kernel.chunked_loss",
    "hsd.adapters.trl",
    "hsd.adapters.opsd",
    "hsd.adapters.packed",
    "hsd.adapters.liger",
    "hsd.adapters.transformers",
)


def gate(name: str) -> float:
    """The largest relative difference of loss and gradient between both sides."""
    model, *sides = CASES[name](*GATE_SHAPE)
    found = []
    for side in sides:
        model.zero_grad()
        loss = side()
        loss.backward()
        found.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    (a, x), (b, y) = found
    return max(abs(a - b) / abs(a), ((x - y).norm() / x.norm()).item())


def resident(field: str) -> int:
    """VmRSS, or VmHWM, its peak, of this process; getrusage would report what the parent held before the exec, too."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def child(job: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(1)
    checked = {"gap": gate(job["case"])} if job["side"] == "theirs" else {}
    if not checked.get("gap", 0.0) <= GATE:
        raise AssertionError(f"gate: {checked['gap']:.1e}, above {GATE}")
    model, *sides = CASES[job["case"]](job["vocabulary"], job["tokens"])
    run = sides[job["side"] == "ours"]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    run().backward()  # the first call warms up
    start = time.process_time()
    run().backward()
    seconds = time.process_time() - start
    return checked | {"seconds": seconds, "added": resident("VmHWM") - before, "before": before}


def forked(job: dict[str, Any]) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)

    def attempt() -> None:
        try:
            row = child(job)
        except Exception as error:
            row = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
        there.send(row)

    process = context.Process(target=attempt)
    process.start()
    there.close()
    try:
        return job | here.recv()
    except EOFError:
        process.join()
        return job | {"failed": f"exit status {process.exitcode}"}
    finally:
        process.join()


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| in place of | vocabulary, tokens | theirs | ours | time, ours to theirs | memory, ours to theirs |",
        "|" + "---|" * 6,
    ]
    for case, vocabulary, tokens in dict.fromkeys((r["case"], r["vocabulary"], r["tokens"]) for r in rows):
        pair = [r for r in rows if (r["case"], r["vocabulary"], r["tokens"]) == (case, vocabulary, tokens)]
        start = f"| {case} | {vocabulary:,}, {tokens} |"
        failed = [f"{r['side']}: {r['failed']}" for r in pair if "failed" in r]
        if failed:
            lines.append(f"{start} {failed[0]} | | | |")
            continue
        cells = [f"{r['seconds']:.2f} s, {r['added'] / 2**20:,.0f} MiB" for r in pair]
        ratios = [pair[1][what] / pair[0][what] for what in ("seconds", "added")]
        lines.append(f"{start} {cells[0]} | {cells[1]} | {ratios[0]:.2f} x | {ratios[1]:.2f} x |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--only", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in HOSTS:
        importlib.import_module(name)
    facts = environment("cpu")
    print(header(facts), flush=True)
    rows = []
    for name in given.only:
        for shape in given.shapes:
            vocabulary, tokens = map(int, shape.split(","))
            for side in ("theirs", "ours"):
                job = {"case": name, "side": side, "vocabulary": vocabulary, "tokens": tokens}
                if side == "ours" and "failed" in rows[-1]:
                    rows.append(job | {"failed": "not run"})
                    continue
                rows.append(forked(job))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print(table(rows))
    if given.json:
        save(given.json, facts, rows, table(rows))


if __name__ == "__main__":
    main()
