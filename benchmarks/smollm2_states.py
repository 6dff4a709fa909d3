"""Records real hidden states for the benchmarks: SmolLM2-135M-Instruct on the times table.

    python benchmarks/smollm2_states.py runs/smollm2_states.pt [--tokens 1024]
    python benchmarks/smollm2_states.py .states/smollm2_8k.pt --tokens 512 --vocabulary 8192

Rollouts are sampled, graded and paired as in `make demo-smollm2`. Every failing rollout with a successful peer gets two
forward passes, the student's (prompt alone) and the teacher's (peer and answer in context). The file holds the states
that predict its tokens, "student" and "teacher" (N, 576), and the head, "weight" (49,152, 576), in fp32. --vocabulary
keeps the tokens with the largest mass under both sides and stores bf16: 10 MB, small enough to be carried to a GPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from hsd.hindsight.context import build_context, tokenize_prompt
from hsd.hindsight.peers import choose_peers, peer_rng
from hsd.policy.body_and_head import body_and_head
from hsd.policy.forward import forward_rollouts
from hsd.progress import say
from hsd.tasks import registered
from hsd.tasks.task import load_policy
from hsd.viewer.make import sample_groups


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, help="tokens of the head to keep, all of them without it")
    args = parser.parse_args()
    task = registered("smollm2", seed=0)
    policy = load_policy(task.model())
    policy.model.eval()
    parts = body_and_head(policy.model)
    student, teacher = [], []
    for i, question in enumerate([*task.held_out, *task.questions]):
        group = sample_groups(task, policy, [question], seed=i)[0]
        for place, peer in enumerate(choose_peers(group, "uniform", rng=peer_rng(0, 0, i))):
            if peer is None or place in group.successes:
                continue
            rollout, shown = group.rollouts[place].token_ids, group.rollouts[peer].token_ids
            context = build_context(policy.tokenizer, group.prompt, group.answer, shown, task.template)
            for prompt, states in (
                (tokenize_prompt(policy.tokenizer, group.prompt), student),
                (context.prompt_ids, teacher),
            ):
                ids = torch.tensor([[*prompt, *rollout]])
                states.append(forward_rollouts(parts, ids, torch.ones_like(ids), len(rollout))[0])
        found = sum(len(s) for s in student)
        say(f"{found} of {args.tokens} tokens")
        if found >= args.tokens:
            break
    args.out.parent.mkdir(parents=True, exist_ok=True)
    states = {
        "student": torch.cat(student),
        "teacher": torch.cat(teacher),
        "weight": parts.linear.weight.detach().clone(),
    }
    dtype = torch.float32
    if args.vocabulary is not None:
        states = {name: t[: args.tokens] if name != "weight" else t for name, t in states.items()}
        logits = (states[side] @ states["weight"].T for side in ("student", "teacher"))
        mass = torch.stack([x.softmax(-1).sum(0) for x in logits]).sum(0)
        kept = mass.topk(args.vocabulary).indices.sort().values
        say(f"{args.vocabulary} tokens hold {mass[kept].sum() / mass.sum():.6f} of the mass")
        states["weight"], dtype = states["weight"][kept], torch.bfloat16
    torch.save({name: t.to(dtype) for name, t in states.items()}, args.out)


if __name__ == "__main__":
    main()
