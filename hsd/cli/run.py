"""One training run from its settings to its model. `hsd train` and `hsd demo` share all of it."""

from __future__ import annotations

import sys
from pathlib import Path

from datasets import Dataset
from transformers.trainer_callback import ProgressCallback

from hsd.cli.folder import check_folder, claim, remove_checkpoints, save_model_of, steps_done, steps_of
from hsd.cli.prepare import Run, check_policy, check_questions, evaluates, left_out, peft_config
from hsd.progress import counted, say
from hsd.train.builds import check_builds
from hsd.train.callbacks import HELD_OUT, StepLine, StopOnSignal, last_checkpoint, load_metrics
from hsd.train.limits import check_engine, check_no_tensor_parallelism, check_packages, launched
from hsd.train.trainer import HSDTrainer


def train(run: Run) -> int:
    """Train, or go on with the run in the folder; the exit code."""
    config, out, lora = run.config, run.folder, run.settings.model.lora
    engine = launched(config)
    check_engine(config, engine, peft=lora is not None)
    check_no_tensor_parallelism(None, config)
    check_packages(config)
    if engine.name == "deepspeed":
        check_builds()
    with config.main_process_first(desc="the questions and the model's files"):
        task = run.task()
        check_questions(run, task)
        check_folder(run, task)  # a task may take minutes to make its model
        check_policy(run, task.model())
    # On all ranks at once: under ZeRO-3 they share the weights out as they read them.
    model, tokenizer = run.initial_policy(task)
    if config.process_index == 0:
        claim(run, task)
    stop = StopOnSignal()
    trainer = HSDTrainer(
        model=model,
        reward_funcs=list(task.rewards),
        args=config,
        train_dataset=Dataset.from_list(list(task.questions)),
        eval_dataset=Dataset.from_list(list(task.held_out)) if evaluates(config) else None,
        processing_class=tokenizer,
        peft_config=None if lora is None else peft_config(lora),
        context_template=task.template,
        callbacks=[stop],
    )
    if not config.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(StepLine())
    checkpoint, done = last_checkpoint(out), steps_done(out)
    if 0 < config.max_steps <= done or (config.max_steps <= 0 and 0 < done == steps_of(out / "model")):
        # Trainer would take one step more on a run that has them all.
        if checkpoint and steps_of(out / "model") < done and trainer.is_world_process_zero():
            save_model_of(checkpoint, out / "model")  # the run ended between its last checkpoint and its model
            end(run, trainer)
        say(
            f"{out}: this run already has {counted(done, 'step')}"
            + ("; --max_steps asks for more" * bool(last_checkpoint(out)))
        )
        return 0
    # An accelerate launch with --cpu starts one process, whatever number it is given.
    say(f"{out}: {counted(config.world_size, 'process', 'es')} on {config.device.type}, {engine}")
    if run.left_out:
        say(f"{out}: {left_out(run)}")
    say(
        f"{out}: {counted(len(task.questions), 'question')}, "
        + (f"resuming after step {done}" if done else "from the start")
    )
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except (ValueError, TypeError, OSError) as error:
        if trainer.state.global_step == 0:  # as a rule bad input
            if not config.disable_tqdm:
                print(file=sys.stderr)  # the bar's line has no end yet
            raise
        # Hours into a run, where it happened is worth a traceback.
        raise RuntimeError(f"training stopped at step {trainer.state.global_step}") from error
    if stop.signal is not None:
        write_picture(trainer)
        say(f"{out}: stopped at step {trainer.state.global_step}; the same command resumes")
        return 128 + stop.signal
    trainer.save_model(str(out / "model"))
    if trainer.is_world_process_zero():
        trainer.state.save_to_json(str(out / "model" / "trainer_state.json"))
        end(run, trainer)
    say(f"{out}: {counted(trainer.state.global_step, 'step')}; the model is in {out / 'model'}")
    return 0


def end(run: Run, trainer: HSDTrainer) -> None:
    """What is left to do in the folder of a run that has its model."""
    if not run.keeps_checkpoints:
        remove_checkpoints(run.folder)
    write_picture(trainer)


def write_picture(trainer: HSDTrainer) -> None:
    """Write training.png of what the run has logged."""
    from hsd.viewer.report import training_picture

    out = Path(str(trainer.args.output_dir))
    if trainer.is_world_process_zero():
        training_picture(out, load_metrics(out / "metrics.jsonl"), load_metrics(out / HELD_OUT))
