"""Two gloo ranks, each with half of the rollouts: the adapters' gradients are those of one process."""

import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen3Config, Qwen3ForCausalLM

from hsd.adapters.transformers import hsd_loss_from_ids

VOCAB = 23
LENGTHS = (5, 2, 3, 4)


def make(tied, seed=0):
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    return Qwen3ForCausalLM(config)


def batch():
    g = torch.Generator().manual_seed(1)

    def draw(n):
        return torch.randint(2, VOCAB, (n,), generator=g).tolist()

    rollouts = [draw(n) for n in LENGTHS]
    return [draw(3) + o for o in rollouts], [draw(7) + o for o in rollouts], list(LENGTHS)


def sharded(model, own_group=False):
    for layer in model.model.layers:
        fully_shard(layer)
    if own_group:
        fully_shard(model.lm_head)
    return fully_shard(model)


CASES = {  # label: (tied, the student's wrapper, the teacher's or None for the live one)
    "ddp": (True, DistributedDataParallel, None),
    "fsdp2, head in the root": (True, sharded, None),
    "fsdp2, head by itself": (False, lambda m: sharded(m, own_group=True), None),
    "fsdp2, both": (False, sharded, sharded),
    "fsdp2, both heads by themselves": (False, lambda m: sharded(m, True), lambda m: sharded(m, True)),
}


def gradients(model, teacher, lists):
    loss = hsd_loss_from_ids(model, *lists, teacher=teacher).loss
    loss.backward()
    return loss.detach(), {n.removeprefix("module."): p.grad for n, p in model.named_parameters()}


def worker(rank, world):
    mine = [part[2 * rank : 2 * rank + 2] for part in batch()]
    for label, (tied, wrap, wrap_teacher) in CASES.items():
        teacher = make(tied, seed=1) if wrap_teacher else None
        want, want_grads = gradients(make(tied), teacher, batch())
        teacher = wrap_teacher(make(tied, seed=1)) if wrap_teacher else None
        loss, grads = gradients(wrap(make(tied)), teacher, mine)
        dist.all_reduce(loss)
        torch.testing.assert_close(loss / world, want, rtol=1e-4, atol=1e-6, msg=label)
        assert grads.keys() == want_grads.keys()
        for name, g in grads.items():
            g = g.full_tensor() if hasattr(g, "full_tensor") else g
            torch.testing.assert_close(g, want_grads[name], rtol=1e-3, atol=1e-5, msg=f"{label} {name} rank {rank}")


def test_gradients_of_two_ranks_are_those_of_one_process():
    run_ranks(worker, 2)
