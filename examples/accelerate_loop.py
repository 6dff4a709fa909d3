"""Hindsight Self-Distillation in a hand-written loop with accelerate alone, no trainer.

    python examples/accelerate_loop.py              # CPU, about 10 s
    accelerate launch examples/accelerate_loop.py   # the same loop on several processes

The model is a random Qwen3 of 40 k parameters, so there is nothing in it that could use a demonstration: the loop is
real, what it learns is not. Watch the divergence between the policy with and without the privileged context fall. Put
your model, tokenizer, questions and verifier in its place.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import Qwen3Config, Qwen3ForCausalLM

from hsd.adapters.transformers import hsd_loss_from_ids
from hsd.hindsight.context import build_context, tokenize_prompt
from hsd.hindsight.groups import Group, Rollout
from hsd.hindsight.peers import choose_peers, peer_rng
from hsd.tasks import small_world

GROUP_SIZE = 8  # G, rollouts of one question
QUESTIONS = 4  # a step, on each process
MAX_TOKENS = 12


def verify(token_ids: list[int]) -> float:
    """Stands for a verifier: a random model passes about half the time."""
    return float(sum(token_ids[:2]) % 2)


def tiny_model(tokenizer) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    return Qwen3ForCausalLM(config)


@torch.no_grad()
def sample(model, tokenizer, prompt_ids: tuple[int, ...], device) -> list[list[int]]:
    """GROUP_SIZE completions, each up to and including its end of sequence."""
    ids = torch.tensor([prompt_ids], device=device).repeat(GROUP_SIZE, 1)
    model.eval()
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=MAX_TOKENS)
    model.train()
    rows = out[:, len(prompt_ids) :].tolist()
    eos = tokenizer.eos_token_id
    return [row[: row.index(eos) + 1] if eos in row else row for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    set_seed(0)
    tokenizer = small_world.build_tokenizer()
    model = tiny_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    set_seed(0, device_specific=True)
    rank, world = accelerator.process_index, accelerator.num_processes
    questions = small_world.make_questions(QUESTIONS * world * steps, seed=0)

    for step in range(steps):
        student_ids, teacher_ids, lengths, rewards = [], [], [], []
        for k in range(QUESTIONS):
            number = (step * world + rank) * QUESTIONS + k
            question = questions[number]
            prompt_ids = tokenize_prompt(tokenizer, question["prompt"])
            completions = sample(accelerator.unwrap_model(model), tokenizer, prompt_ids, accelerator.device)
            rollouts = tuple(Rollout(tuple(ids), reward=verify(ids)) for ids in completions)
            group = Group(question["prompt"], question["answer"], rollouts)
            peers = choose_peers(group, rng=peer_rng(0, step, number))
            for rollout, peer in zip(rollouts, peers, strict=True):
                shown = None if peer is None else rollouts[peer].token_ids
                context = build_context(tokenizer, question["prompt"], question["answer"], shown, small_world.TEMPLATE)
                student_ids.append([*prompt_ids, *rollout.token_ids])
                teacher_ids.append([*context.prompt_ids, *rollout.token_ids])
                lengths.append(len(rollout.token_ids))
                rewards.append(rollout.reward)

        with accelerator.autocast():
            out = hsd_loss_from_ids(model, student_ids, teacher_ids, lengths)
        accelerator.backward(out.loss)
        optimizer.step()
        optimizer.zero_grad()

        loss = accelerator.gather(out.loss.detach().reshape(1)).mean().item()
        entropy = out.stats.student_entropy.mean().item()
        success = sum(rewards) / len(rewards)
        accelerator.print(f"step {step + 1}: loss {loss:.4f} nats, entropy {entropy:.2f}, success {success:.2f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
