"""One rank of a two-rank job on gloo under DeepSpeed or accelerate's FSDP2, for `rank_runs.launch`: one step of each
case, and runs that are stopped and resumed."""

import importlib.util
import json
import os
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState
from rank_runs import QUESTIONS, TESTS, make, start_elsewhere, weights
from tiny_runs import CHECKPOINTED, TOKENIZER, qwen3
from transformers import AutoModelForCausalLM, TrainerCallback

from hsd.cli.__main__ import main as hsd
from hsd.methods.state import Hysteresis
from hsd.policy.sharding import gather

ENGINES = ("zero2", "zero3", "fsdp2")
_FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "ACCELERATE_TORCH_DEVICE": "cpu",
}
ENVIRONMENT = {"fsdp2": _FSDP2}
LIVE = {"teacher": "live", "reference_coef": 0.0}
COPY = {"teacher": "copy", "teacher_copy_steps": 1}
GATED = {"teacher": "gated", "teacher_gate": [1, 0.0, 1.0]}  # opens after the first generation
ANTISD = {"method": "antisd", "method_args": {"verdict": False}}  # the tokenizer lacks the words of a verdict
# name: (rows of a rank's micro-batch, HSDConfig's fields, arguments of `rank_runs.make`)
CASES = {
    "live": (2, LIVE | CHECKPOINTED, {"tied": False}),
    "fixed+reference, by itself": (2, {"teacher": "fixed", "reference_coef": 0.5, "prefix_sharing": "none"}, {}),
    "ema+reference, accumulated": (1, {"teacher": "ema", "reference_coef": 0.5, "gradient_accumulation_steps": 2}, {}),
    "trust region, tree": (2, {"teacher": "trust_region", "reference_coef": 0.0, "prefix_sharing": "tree"}, {}),
    "perplexity peers": (2, LIVE | {"peer_rule": "lowest_perplexity", "prefix_sharing": "none"}, {}),
    "sdpo": (2, {"method": "sdpo"}, {"tied": False}),
    "grpo+opsd, old": (2, {"method": "grpo+opsd", "num_iterations": 2}, {}),
    "copy": (2, COPY | {"reference_coef": 0.5, "method": "egrsd"}, {}),
    "lora, gated": (2, GATED | {"reference_coef": 0.0}, {"lora": True}),
    "antisd": (1, ANTISD | {"gradient_accumulation_steps": 2}, {"tied": False}),
    "lora, fixed+reference": (2, {"teacher": "fixed", "reference_coef": 0.5}, {"lora": True}),
    "lora, ema": (2, {"teacher": "ema", "reference_coef": 0.5, "reference_refresh_steps": 1}, {"lora": True}),
}
WITHOUT = {
    "zero2": ("copy", "antisd", "lora, fixed+reference", "perplexity peers", "grpo+opsd, old", "trust region, tree"),
}
RUN = {
    "teacher": "ema",
    "teacher_ema_rate": 0.3,
    "reference_coef": 0.5,
    "reference_refresh_steps": 2,
    "reference_ema_rate": 0.3,
    "max_steps": 3,
    "optim": "adamw_torch",
    "learning_rate": 1e-2,
    "save_strategy": "steps",
    "save_steps": 2,
}


def of(engine: str) -> dict:
    """HSDConfig's fields for an engine."""
    if engine == "ddp":
        return {}
    if engine == "fsdp2":
        return {"use_cpu": False}
    stage = int(engine.removeprefix("zero"))
    # Norms and adapters stay gathered, larger weights do not.
    zero = {"stage": stage, "stage3_param_persistence_threshold": 200}
    config = {"train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto", "zero_optimization": zero}
    config |= {"gradient_accumulation_steps": "auto", "bf16": {"enabled": "auto"}, "gradient_clipping": "auto"}
    return {"deepspeed": config | {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}}


def prepare(engine: str) -> None:
    """The process, before anything of accelerate's."""
    if engine == "ddp":
        torch.distributed.init_process_group("gloo")
        return
    if engine == "fsdp2":
        # accelerate shards on accelerators only; its own code does, given this backend and device.
        PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
        torch.distributed.init_process_group("gloo")
        return
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # is built for minutes when it is first used
    torch.distributed.init_process_group("gloo")


def reset() -> None:
    """accelerate keeps the engine of a process."""
    AcceleratorState._reset_state()
    GradientState._reset_state()


def whole(trainer) -> dict[str, torch.Tensor]:
    """The student's trained weights, on both ranks, in the optimizer's precision."""
    held, policy = trainer.frozen.held, trainer.accelerator.unwrap_model(trainer.model)
    trained = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    found = gather(held, {n: (p, held.master(p)) for n, p in trained.items()}, writes=True)
    return {n: t.clone() for n, t in found.items()}  # not gathered under ZeRO-2


def frozen(trainer) -> dict[str, dict[str, torch.Tensor]]:
    held, policy = trainer.frozen.held, trainer.accelerator.unwrap_model(trainer.model)
    return {name: gather(held, trainer.frozen.shards(policy, name), writes=True) for name in trainer.frozen.names}


def case(name: str) -> tuple[int, dict, dict]:
    """One of `CASES`, or METHOD:TEACHER, or METHOD:TEACHER:lora."""
    if name in CASES:
        return CASES[name]
    method, teacher, *lora = name.split(":")
    options = {"method": method, "teacher": teacher, "reference_coef": 0.5}
    more = {"copy": COPY, "gated": GATED, "antisd": ANTISD}
    options |= more.get(teacher, {}) | more.get(method, {})
    return 2, options, {"tied": False, "lora": bool(lora)}


def one_step(engine: str, name: str, folder: Path) -> dict:
    rows, options, arguments = case(name)
    reset()
    trainer = make(folder / "run", rows, **arguments, **{**options, **of(engine)})
    trees, asked, agree = [], [], trainer.frozen.held.agree

    def ask(here, device):
        asked.append(here)
        return agree(here, device)

    trainer.frozen.held.agree = ask
    choose = trainer.micro_batch_loss.tree

    def tree(batch):
        trees.append(choose(batch))
        return trees[-1]

    object.__setattr__(trainer.micro_batch_loss, "tree", tree)
    assert (trainer.prefix_sharing == "none") == (options.get("prefix_sharing") == "none")
    start_elsewhere(trainer)
    if isinstance(trainer.method_state, Hysteresis):
        trainer.method_state.warmup = 0  # its gate would be 0 in a first step, and the teacher would not matter
    before = weights(trainer.model)
    trainer.train()
    after = whole(trainer)
    gradient = {n: before[n] - after[n] for n in before}
    shared = [t is not None for t in trees]
    out = {"gradient": gradient, "batches": trainer.batches, "shared": shared, "asked": asked}
    if trainer.frozen.teacher == "copied_teacher":  # is the student after the step
        student = {n.replace(".default.", ".*."): t for n, t in after.items()}
        out["copied"] = [student, frozen(trainer)["copied_teacher"]]
    return out | {"loss": trainer.state.log_history[0]["loss"]}


class Follow(TrainerCallback):
    """The student at the start and after each step, whole."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.students = [whole(self.trainer)]

    def on_step_end(self, args, state, control, **kwargs):
        self.students.append(whole(self.trainer))


def run(engine: str, folder: Path, resume=None, seed=1, **options):
    """A model partitioned as it is loaded, as `hsd train` does."""
    reset()
    if torch.distributed.get_rank() == 0 and not (folder / f"start{seed}").exists():
        qwen3(seed).save_pretrained(folder / f"start{seed}")
    torch.distributed.barrier()
    follow = Follow()
    options = RUN | of(engine) | options
    if engine == "fsdp2" and options.pop("bf16", False):  # HSDConfig asks for a GPU here, accelerate does not
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    args = {"callbacks": [follow], "lora": options.pop("lora", False)}
    model = str(folder / f"start{seed}")
    if engine == "fsdp2":
        model = AutoModelForCausalLM.from_pretrained(model)
    follow.trainer = trainer = make(folder / options.pop("name"), 2, model=model, **args, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, follow.students


def resumed(engine: str, folder: Path, name: str, **options) -> dict:
    """Three steps in one go; and the third again, from the checkpoint of the second, in a model of other initial
    weights (with LoRA of the same)."""
    trainer, students = run(engine, folder, name=f"{name} whole", **options)
    out = {"students": students, "whole": [whole(trainer), frozen(trainer)]}
    trainer.save_model(str(folder / f"{name} model"))
    seed = 1 if options.get("lora") else 2
    checkpoint = str(folder / f"{name} whole" / "checkpoint-2")
    trainer, _ = run(engine, folder, resume=checkpoint, seed=seed, name=f"{name} parts", **options)
    return out | {"parts": [whole(trainer), frozen(trainer)]}


RUNS = {
    "run": {},
    "run, lora": {"lora": True, "reference_refresh_steps": None},
    "run, bf16": {"bf16": True, "teacher_ema_rate": 0.005, "learning_rate": 1e-3},
}


CONFIGS = {
    "ddp": ("cpu_demo", "qwen3_1.7b_lora_1gpu"),
    "zero3": ("qwen3_32b_32gpu_zero3_vllm",),
    "fsdp2": ("qwen3_8b_8gpu_fsdp2",),
}


def command_line(engine: str, config: str, folder: Path) -> None:
    """`hsd train` from a shipped configuration, with a model, questions and batches of this size; and its resume."""
    if torch.distributed.get_rank() == 0:
        qwen3().save_pretrained(folder / "tiny")
        TOKENIZER.save_pretrained(folder / "tiny")
        (folder / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
        (folder / "deepspeed.json").write_text(json.dumps(of("zero3")["deepspeed"]))
    torch.distributed.barrier()
    words = {
        "model.path": folder / "tiny",
        "output_dir": folder / config,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_completion_length": 6,
        "save_steps": 1,
        "save_total_limit": 2,
        "use_vllm": "false",
        "bf16": "false",
        "report_to": "none",
    }
    if config != "cpu_demo":  # which brings its questions
        words |= {"data.path": folder / "questions.jsonl", "data.split": "null", "data.instruction": ""}
        words |= {"reward": "hsd.tasks.small_world:reward", "answer_only_template": "[{answer}]"}
        words |= {"with_peer_template": "[{answer}|{demonstration}]"}
    words |= {} if engine == "fsdp2" else {"use_cpu": "true"}
    words |= {"deepspeed": folder / "deepspeed.json"} if engine == "zero3" else {}
    for steps in (1, 2):
        reset()
        given = [f"--{key}={value}" for key, value in (words | {"max_steps": steps}).items()]
        assert hsd(["train", str(TESTS.parent / "configs" / f"{config}.yaml"), *given]) == 0


def warm() -> None:
    """What DeepSpeed imports late, TorchInductor with it."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    if importlib.util.find_spec("deepspeed") is not None:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")


def main(engine: str, folder: str, *cases: str) -> None:
    rank, here = int(os.environ["RANK"]), Path(folder)
    prepare(engine)
    for name in cases or CASES:
        if (name in CASES or ":" in name) and name not in WITHOUT.get(engine, ()):
            torch.save(one_step(engine, name, here), here / f"{name}-{rank}.pt")
            print("done", name, flush=True)
    for name in cases or RUNS:
        if name in RUNS:
            torch.save(resumed(engine, here, name, **RUNS[name]), here / f"{name}-{rank}.pt")
            print("done", name, flush=True)
    for config in CONFIGS.get(engine, ()):
        if not cases or config in cases:
            command_line(engine, config, here)
            print("done", config, flush=True)
