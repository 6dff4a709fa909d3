"""One rank of a two-rank job on gloo, for `rank_runs.launch`: trains with DDP and saves what it saw."""

import signal
from pathlib import Path

import torch
from rank_runs import make, start_elsewhere, weights
from transformers import TrainerCallback

from hsd.train.callbacks import StopOnSignal

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
    # Texts that ranks write in shares, judged in shares, and rows of which a rank may have none.
    "brts": (2, {"method": "brts", "method_args": {"trajectories": 3}, "gradient_accumulation_steps": 3}),
    # One row a group, and nothing else goes through the models: a micro-batch of a rank may have none.
    "mixed_policy": (
        1,
        {"method": "mixed_policy", "method_args": {"ask": "[{attempt}"}, "gradient_accumulation_steps": 6},
    ),
    "budget": (4, {"teacher": "live", "reference_coef": 0.0, "prefix_sharing": "tree", "tree_token_budget": 40}),
}


def ddp(name: str, folder: Path, rank: int) -> None:
    rows, options = DDP[name]
    trainer = make(folder / "run", rows, **options)
    start_elsewhere(trainer)
    before = weights(trainer.model)
    trainer.train()
    after = weights(trainer.model)
    gradient = {n: before[n] - after[n] for n in before}
    loss = trainer.state.log_history[0]["loss"]
    torch.save({"gradient": gradient, "batches": trainer.batches, "loss": loss}, folder / f"ddp-{name}-{rank}.pt")


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


def main(folder: str) -> None:
    torch.distributed.init_process_group("gloo")
    here, rank = Path(folder), torch.distributed.get_rank()
    for name in DDP:
        ddp(name, here, rank)
    interrupted(here, rank)
    torch.distributed.destroy_process_group()
