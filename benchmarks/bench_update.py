"""The whole update of one group: student forward and backward, teacher forward, loss; and GRPO's update beside it.

    python benchmarks/bench_update.py [--device cpu] [--shapes 800,200,200,8 ...] [--models toy] [--json PATH]

A shape is (question, rollout, peer, G) in tokens; the group has two contexts, as the paired draw gives. GRPO's update
is the student's forward and backward with log-probs only. The gate comes first: loss and gradients of every contender
against the unshared update on a small group in fp32. A contender that fails it gets no time. Contenders take turns in
one process for their times; each has a process of its own for its peak memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from timing import environment, header, peak_bytes, reset_peak, save
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen3Config, Qwen3ForCausalLM

from hsd.policy.body_and_head import body_and_head, hidden_states
from hsd.policy.forward import FrozenStates
from hsd.policy.tree.attention import enable_tree
from hsd.policy.tree.forward import make_tree_batch, tree_hidden_states
from hsd.train.update import Objective, hsd_loss

CONTENDERS = ("unshared", "prompt", "tree", "grpo")
SHAPES = {
    "cpu": ["800,200,200,8", "40,400,400,8", "200,400,400,8", "200,200,200,8"],
    "cuda": ["200,4096,4096,8", "2000,500,500,8", "500,1000,1000,8", "200,1000,1000,16"],
}
# name: (hidden, intermediate, layers, heads, key-value heads, head dimension, vocabulary)
MODELS = {
    "toy": (64, 192, 6, 4, 2, 16, 1024),
    "toy-256": (256, 768, 6, 8, 4, 32, 1024),
    "qwen3-0.6b": (1024, 3072, 28, 16, 8, 128, 151_936),
    "qwen3-1.7b": (2048, 6144, 28, 16, 8, 128, 151_936),
    "qwen3-8b": (4096, 12_288, 36, 32, 8, 128, 151_936),
}
GATE_SHAPE = (24, 12, 10, 4)
GATE = 1e-4  # relative, in fp32: loss, and L2 of all gradients


def build(name: str, device: str, dtype: torch.dtype) -> Qwen3ForCausalLM:
    hidden, intermediate, layers, heads, kv_heads, head_dim, vocabulary = MODELS[name]
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=32_768,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen3ForCausalLM(config)
    model = model.to(dtype).train()
    if device == "cuda":  # 8 rollouts of thousands of tokens do not fit otherwise
        model.gradient_checkpointing_enable({"use_reentrant": False})
    enable_tree(model)
    return model


def make_group(shape: tuple[int, ...], vocabulary: int) -> tuple[list[list[int]], ...]:
    """Prompts, rollouts, teacher prompts: everyone is shown A's rollout, A is shown B's."""
    q, o, peer, g = shape
    generator = torch.Generator().manual_seed(1)

    def tokens(n: int) -> list[int]:
        return torch.randint(3, vocabulary, (n,), generator=generator).tolist()

    question, rollouts, shown = tokens(q), [tokens(o) for _ in range(g)], [tokens(peer), tokens(peer)]
    return [question] * g, rollouts, [question + shown[0 if i else 1] for i in range(g)]


def states(model: Any, prompts: list[list[int]], rollouts: list[list[int]]) -> Tensor:
    """(G, o, D) as the trainer computes them without sharing; sequences of one length need no padding."""
    parts = body_and_head(model)
    ids = torch.tensor([p + o for p, o in zip(prompts, rollouts, strict=True)], device=parts.linear.weight.device)
    return hidden_states(parts.body, ids, torch.ones_like(ids))[:, -(len(rollouts[0]) + 1) : -1]


def update(contender: str, model: Any, group: tuple[list[list[int]], ...]) -> Tensor:
    """One update's loss; its gradients are in the parameters."""
    prompts, rollouts, teacher_prompts = group
    parts = body_and_head(model)
    targets = torch.tensor(rollouts, device=parts.linear.weight.device)
    if contender == "grpo":
        from trl.trainer.utils import selective_log_softmax

        logits = parts.linear(states(model, prompts, rollouts))
        loss = -selective_log_softmax(logits, targets).mean()
    else:
        if contender == "unshared":
            student = states(model, prompts, rollouts)
            with torch.no_grad():
                teacher = states(model, teacher_prompts, rollouts)
        else:
            sides = tree_hidden_states(model, prompts, rollouts, teacher_prompts, sharing=contender)
            student, teacher = (pad_sequence(side, batch_first=True) for side in sides)
        loss = hsd_loss(student, parts.head, FrozenStates(teacher), targets, torch.ones_like(targets), Objective()).loss
    loss.backward()
    return loss.detach()


def small_update(contender: str, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Loss and gradient of a small group, away from initial weights, at which attention hardly matters."""
    model = build("toy", device, dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())).to(p) * 0.1)
    loss = update(contender, model, make_group(GATE_SHAPE, MODELS["toy"][-1]))
    grads = [p.grad.flatten().double() for p in model.parameters() if p.grad is not None]
    return loss.double(), torch.cat(grads)


def gate(contender: str, device: str) -> str | None:
    """Why this contender's numbers would mean nothing, or None. On CUDA in bf16, which other kernels compute: at most
    twice the unshared update's own error there."""
    if contender in ("grpo", "unshared"):
        return None
    loss, grad = small_update("unshared", device, torch.float32)

    def error(name: str, dtype: torch.dtype) -> float:
        got, got_grad = small_update(name, device, dtype)
        return max(((got - loss).abs() / loss.abs()).item(), ((got_grad - grad).norm() / grad.norm()).item())

    dtype, allowed = torch.float32, GATE
    if device == "cuda":
        dtype, allowed = torch.bfloat16, 2 * error("unshared", torch.bfloat16)
    found = error(contender, dtype)
    return None if found <= allowed else f"gate: relative error {found:.2g} in {dtype}, allowed {allowed:.2g}"


def count(contender: str, model_name: str, shape: tuple[int, ...]) -> tuple[int, float]:
    """Tokens that go through the body, and FLOPs of the update: products only, attention without masked pairs."""
    hidden, intermediate, layers, heads, kv_heads, head_dim, vocabulary = MODELS[model_name]
    prompts, rollouts, teacher_prompts = make_group(shape, vocabulary)
    if contender in ("unshared", "grpo"):

        def plain(side: list[list[int]]) -> list[int]:
            return [n for p, o in zip(side, rollouts, strict=True) for n in range(1, len(p) + len(o) + 1)]

        student, teacher = plain(prompts), plain(teacher_prompts)
    else:
        pack = make_tree_batch(prompts, rollouts, teacher_prompts, sharing=contender)
        student, teacher = ((pack.trie.pos[nodes] + 1).tolist() for nodes in (pack.student_nodes, pack.teacher_only))
    if contender == "grpo":
        teacher = []
    weights = layers * hidden * (head_dim * (2 * heads + 2 * kv_heads) + 3 * intermediate)

    def forward(seen: list[int]) -> float:
        return 2.0 * weights * len(seen) + 4.0 * layers * heads * head_dim * sum(seen)

    head = 2.0 * hidden * vocabulary * sum(map(len, rollouts))
    total = 3 * (forward(student) + head) + (forward(teacher) + head if teacher else 0.0)
    return len(student) + len(teacher), total


def times(model_name: str, shape: tuple[int, ...], contenders: list[str], device: str, repeats: int) -> dict[str, Any]:
    """Seconds by contender, or why there are none. They take turns, so that a busy machine slows all of them alike."""
    failed = {c: why for c in contenders if (why := gate(c, device)) is not None}
    model = build(model_name, device, torch.bfloat16 if device == "cuda" else torch.float32)
    group = make_group(shape, MODELS[model_name][-1])
    seconds: dict[str, list[float]] = {c: [] for c in contenders}
    for i in range(repeats + 1):
        for contender in contenders:
            if contender in failed:
                continue
            model.zero_grad()
            start = time.perf_counter()
            try:
                update(contender, model, group)
                if device == "cuda":
                    torch.cuda.synchronize()
            except torch.OutOfMemoryError:
                failed[contender] = "out of memory"
                continue
            if i:  # the first is the warm-up
                seconds[contender].append(time.perf_counter() - start)
    return {c: {"failed": failed[c]} if c in failed else {"seconds": sorted(seconds[c])} for c in contenders}


def one_update(
    contender: str, model: Any, model_name: str, shape: tuple[int, ...], device: str, repeats: int
) -> dict[str, Any]:
    """A row of one contender in this process: time and, of CUDA's allocator, peak memory beyond model and gradients."""
    group = make_group(shape, MODELS[model_name][-1])
    tokens, flops = count(contender, model_name, shape)
    seconds, peak = [], 0
    for i in range(repeats + 1):
        model.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        base, start = reset_peak(device), time.perf_counter()
        update(contender, model, group)
        if device == "cuda":
            torch.cuda.synchronize()
        if i:  # the first is the warm-up
            seconds.append(time.perf_counter() - start)
            peak = peak_bytes(device) - base
    model.zero_grad()
    seconds.sort()
    row = {"tokens": tokens, "flops": flops, "median": statistics.median(seconds), "peak_bytes": peak}
    return row | {"p20": seconds[len(seconds) // 5], "p80": seconds[len(seconds) * 4 // 5]}


def memory(model_name: str, shape: tuple[int, ...], contender: str, device: str) -> dict[str, Any]:
    """Peak memory of one update beyond the model, in a process of its own."""
    model = build(model_name, device, torch.bfloat16 if device == "cuda" else torch.float32)
    group = make_group(shape, MODELS[model_name][-1])
    base = reset_peak(device)
    update(contender, model, group)
    return {"peak_bytes": peak_bytes(device) - base}


def in_child(name: str, *arguments: Any) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", json.dumps([name, *arguments])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    return {"failed": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}


def measure(
    model: str, shape: tuple[int, ...], contenders: list[str], device: str, repeats: int
) -> list[dict[str, Any]]:
    timed = in_child("times", model, shape, contenders, device, repeats)
    rows = []
    for contender in contenders:
        tokens, flops = count(contender, model, shape)
        row: dict[str, Any] = {"model": model, "shape": shape, "contender": contender, "tokens": tokens, "flops": flops}
        result = timed if "failed" in timed else timed[contender]
        if "failed" in result:
            rows.append(row | result)
            continue
        s = result["seconds"]
        row |= {"median": statistics.median(s), "p20": s[len(s) // 5], "p80": s[len(s) * 4 // 5]}
        rows.append(row | {"peak_bytes": 0} | in_child("memory", model, shape, contender, device))
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown. "speedup" is time of unshared / time, "counted" the same of FLOPs; "x GRPO" is time / time of GRPO."""
    lines = [
        "| model | q, o, peer, G | update | tokens | TFLOP | counted | median s | p20 to p80 | speedup | x GRPO | MiB |",  # noqa: E501
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    times = {(r["model"], tuple(r["shape"]), r["contender"]): r for r in rows if "median" in r}
    for r in rows:
        key = (r["model"], tuple(r["shape"]))
        start = f"| {r['model']} | {', '.join(map(str, r['shape']))} | {r['contender']} | "
        if "failed" in r:
            lines.append(start + f"failed: {r['failed']} | | | | | | | |")
            continue
        unshared, grpo = times.get((*key, "unshared")), times.get((*key, "grpo"))
        counted = f"{unshared['flops'] / r['flops']:.2f}" if unshared else ""
        speedup = f"{unshared['median'] / r['median']:.2f}" if unshared else ""
        ratio = f"{r['median'] / grpo['median']:.2f}" if grpo else ""
        lines.append(
            start + f"{r['tokens']} | {r['flops'] / 1e12:.4g} | {counted} | {r['median']:.3g} | "
            f"{r['p20']:.3g} to {r['p80']:.3g} | {speedup} | {ratio} | {r['peak_bytes'] / 2**20:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shapes", nargs="+", help="question,rollout,peer,G")
    parser.add_argument("--models", nargs="+", choices=list(MODELS))
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        name, model, shape, *rest = json.loads(args.child)
        print(json.dumps({"times": times, "memory": memory}[name](model, tuple(shape), *rest)))
        return
    facts = environment(args.device)
    print(header(facts))
    rows = []
    for model in args.models or [m for m in MODELS if m.startswith("toy") == (args.device == "cpu")]:
        for text in args.shapes or SHAPES[args.device]:
            shape = tuple(map(int, text.split(",")))
            rows += measure(model, shape, args.contenders, args.device, args.repeats)
            print(f"  {model} {text} done", file=sys.stderr)
            if args.json:  # after each shape: a run that is cut off leaves what it has
                save(args.json, facts, rows, table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
