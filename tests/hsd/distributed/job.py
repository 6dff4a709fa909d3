"""One rank of a two-rank job on gloo: trains with DDP and differentiates under raw FSDP2, and saves what it saw.

RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 PYTHONPATH=.:tests python job.py FOLDER
"""

import signal
import sys
from pathlib import Path

import torch
from datasets import Dataset
from ranks import leave
from tiny_runs import LORA, STEP, TOKENIZER, half, qwen3
from torch.distributed.fsdp import fully_shard
from transformers import TrainerCallback

from hsd.hindsight.context import ContextTemplate
from hsd.tasks import small_world
from hsd.train.callbacks import StopOnSignal
from hsd.train.config import HSDConfig
from hsd.train.trainer import HSDTrainer

SIZE = 4  # rollouts a group
TEMPLATE = ContextTemplate(small_world.WITH_PEER, small_world.ANSWER_ONLY, demonstration_only="[|{demonstration}]")
QUESTIONS = small_world.make_questions(8, seed=0)

# name: (rows of a rank's micro-batch, HSDConfig's fields)
DDP = {
    "whole": (4, {"teacher": "fixed", "reference_coef": 0.5}),
    "split": (2, {"teacher": "live", "reference_coef": 0.0}),
    "split+accumulation": (
        1,
        {"teacher": "ema", "reference_coef": 0.5, "gradient_accumulation_steps": 2, "prefix_sharing": "none"},
    ),
    "group and a half": (2, {"teacher": "fixed", "reference_coef": 0.0, "gradient_accumulation_steps": 3}),
    # Means over all tokens of the step, and advantages of groups that no rank holds whole.
    "sdpo": (2, {"method": "sdpo", "gradient_accumulation_steps": 3}),
    "grpo+opsd": (2, {"method": "grpo+opsd"}),
    "dapo": (2, {"method": "dapo", "gradient_accumulation_steps": 3}),  # the fused surrogate, a mean over tokens
    "egrsd": (2, {"method": "egrsd", "gradient_accumulation_steps": 3}),  # numbers of the whole generation
    "budget": (4, {"teacher": "live", "reference_coef": 0.0, "prefix_sharing": "tree", "tree_token_budget": 40}),
}
# name: (whether with LoRA, HSDConfig's fields); the batch is that of DDP's "split"
FSDP = {
    "live": (False, {"teacher": "live", "reference_coef": 0.0, "prefix_sharing": "none"}),
    "fixed+reference": (False, {"teacher": "fixed", "reference_coef": 0.5, "prefix_sharing": "none"}),
    "lora": (True, {"teacher": "fixed", "reference_coef": 0.5, "prefix_sharing": "none"}),
}


class Recorder(HSDTrainer):
    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        self.batches = [*getattr(self, "batches", []), batch | {"questions": [x["prompt"] for x in inputs]}]
        return batch


def make(folder, rows, *, lora=False, callbacks=(), **kwargs):
    """A trainer whose single step, SGD at learning rate 1, moves the weights by minus the gradient."""
    return Recorder(
        model=qwen3(),
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


def ddp(name: str, folder: Path, rank: int) -> list[dict]:
    rows, options = DDP[name]
    trainer = make(folder / "run", rows, **options)
    start_elsewhere(trainer)
    before = weights(trainer.model)
    trainer.train()
    after = weights(trainer.model)
    gradient = {n: before[n] - after[n] for n in before}
    loss = trainer.state.log_history[0]["loss"]
    torch.save({"gradient": gradient, "batches": trainer.batches, "loss": loss}, folder / f"ddp-{name}-{rank}.pt")
    return trainer.batches


def fsdp(name: str, batch: dict, folder: Path, rank: int) -> None:
    lora, options = FSDP[name]
    trainer = make(folder / "run", 2, lora=lora, **options)
    start_elsewhere(trainer)
    model = trainer.model
    for layer in model.get_base_model().model.layers if lora else model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    gradient = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.requires_grad}
    torch.save({"gradient": gradient, "loss": loss.item()}, folder / f"fsdp-{name}-{rank}.pt")


class Interrupt(TrainerCallback):
    """SIGTERM reaches this rank alone, while step 2 is on its way."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            signal.raise_signal(signal.SIGTERM)


def interrupted(folder: Path, rank: int) -> None:
    """Four steps in one go; and two, stopped by a signal to rank 1, and two more after a resume."""
    options = {"teacher": "ema", "max_steps": 4, "optim": "adamw_torch", "learning_rate": 1e-2}
    options |= {"save_strategy": "steps", "save_steps": 100, "teacher_ema_rate": 0.5}
    whole = make(folder / "whole", 2, **options)
    whole.train()
    first = make(folder / "parts", 2, callbacks=[StopOnSignal(), *([Interrupt()] if rank == 1 else [])], **options)
    first.train()
    second = make(folder / "parts", 2, **options)
    second.train(resume_from_checkpoint=str(folder / "parts" / "checkpoint-2"))
    runs = {"whole": whole, "parts": second}
    saved = {k: [weights(t.model), dict(t.frozen.models["ema_teacher"].named_parameters())] for k, t in runs.items()}
    torch.save({"stopped_at": first.state.global_step, **saved}, folder / f"interrupted-{rank}.pt")


def main() -> None:
    folder, rank = Path(sys.argv[1]), torch.distributed.get_rank()
    batches = {name: ddp(name, folder, rank) for name in DDP}
    for name in FSDP:
        fsdp(name, batches["split"][0], folder, rank)
    interrupted(folder, rank)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    main()
    torch.distributed.destroy_process_group()
    leave()
