"""An interrupted run against an uninterrupted one, bit by bit: metrics, weights, optimizer, rollouts, frozen copies."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny_runs import QUIET, SMALLER, TOKENIZER, half, qwen3

from hsd.cli.__main__ import main
from hsd.hindsight.context import ContextTemplate
from hsd.tasks import small_world
from hsd.train.callbacks import load_metrics
from hsd.train.config import HSDConfig
from hsd.train.trainer import HSDTrainer

ROOT = Path(__file__).parents[3]
QUESTIONS = small_world.make_questions(16, seed=0)  # eight steps' worth
LORA = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
SETTINGS = QUIET | {
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 8,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 3,
    "save_strategy": "steps",
    "save_steps": 1000,  # the last step is always saved
}
TIMES = ("step_time", "train_runtime")


def build_model(seed=1):
    # Dropout: random numbers of a step's own.
    return qwen3(seed, **SMALLER, tie_word_embeddings=False, attention_dropout=0.1)


class Recorder(HSDTrainer):
    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        self.seen = [*getattr(self, "seen", []), ([row["prompt"] for row in inputs], batch)]
        return batch


def make(folder, steps, model_seed=1, peft_config=None, questions=QUESTIONS, **kwargs):
    return Recorder(
        model=build_model(model_seed),
        reward_funcs=half,
        args=HSDConfig(str(folder), max_steps=steps, **SETTINGS | kwargs),
        train_dataset=Dataset.from_list(questions),
        processing_class=TOKENIZER,
        context_template=ContextTemplate(
            small_world.WITH_PEER, small_world.ANSWER_ONLY, demonstration_only="[|{demonstration}]"
        ),
        peft_config=peft_config,
    )


def rows(folder):
    """metrics.jsonl without what a clock measured."""
    found = load_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMES and not k.startswith("time/")} for row in found]


def assert_equal(a, b, where=""):
    """Bit-equal trees of tensors and numbers."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_equal(*pair, f"{where}[{i}]")
    else:
        assert a == b or a != a, where  # NaN: nothing to measure, in both


RUNS = {
    "fixed": {"teacher": "fixed", "reference_coef": 0.0, "gradient_accumulation_steps": 2},
    "ema": {"teacher": "ema", "teacher_ema_rate": 0.3, "reference_coef": 0.0},
    "live+reference": {"teacher": "live", "reference_coef": 0.5, "divergence_coef": [1.0, 0.0, 6]},
    "ema+refreshed reference": {
        "teacher": "ema",
        "teacher_ema_rate": 0.3,
        "reference_coef": 0.5,
        "reference_refresh_steps": 3,
        "reference_ema_rate": 0.3,
    },
    "copy": {"teacher": "copy", "teacher_copy_steps": 3, "reference_coef": 0.0},
    "gated": {"teacher": "gated", "teacher_gate": [2, 0.0, 1.0], "reference_coef": 0.0},
    "antisd": {"method": "antisd", "method_args": {"verdict": False}},
    "egrsd": {"method": "egrsd"},
    "lora+reference": {"teacher": "live", "reference_coef": 0.5, "peft_config": LORA},
    "lora+ema+refreshed reference": {
        "teacher": "ema",
        "teacher_ema_rate": 0.3,
        "reference_coef": 0.5,
        "reference_refresh_steps": 3,
        "reference_ema_rate": 0.3,
        "peft_config": LORA,
    },
}


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_the_uninterrupted_one(name, tmp_path):
    assert_resumes(tmp_path, 2, 4, RUNS[name])


def assert_resumes(tmp_path, cut, steps, options):
    whole = make(tmp_path / "whole", steps, **options)
    whole.train()
    make(tmp_path / "parts", cut, **options).train()
    # Other initial weights, as a new process may have; an adapter's base model is the user's to give again.
    second = make(tmp_path / "parts", steps, model_seed=1 if "peft_config" in options else 9, **options)
    assert not equal(second.model, whole.model)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / f"checkpoint-{cut}"))

    assert_equal(whole.seen[-len(second.seen) :], second.seen, "rollouts")
    assert_equal(rows(tmp_path / "whole"), rows(tmp_path / "parts"), "metrics")
    written = [(tmp_path / run / "rollouts.jsonl").read_text() for run in ("whole", "parts")]
    assert written[0] == written[1] != ""
    assert len(rows(tmp_path / "whole")) == steps
    assert equal(second.model, whole.model)
    assert_equal(whole.optimizer.state_dict(), second.optimizer.state_dict(), "optimizer")
    assert_equal(whole.lr_scheduler.state_dict(), second.lr_scheduler.state_dict(), "schedule")
    if whole.method_state is not None:
        assert whole.method_state == second.method_state != whole.args.method_spec.state()
    assert whole.gate == second.gate
    assert whole.frozen.models.keys() == second.frozen.models.keys()
    assert all(equal(whole.frozen.models[kind], second.frozen.models[kind]) for kind in whole.frozen.models)


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_a_run_resumes_after_its_first_epoch(tmp_path):
    assert_resumes(tmp_path, 3, 4, RUNS["ema"] | {"questions": QUESTIONS[:4]})


def test_a_run_resumes_at_the_end_of_a_generation_that_served_two_steps(tmp_path):
    assert_resumes(tmp_path, 2, 4, RUNS["ema"] | {"steps_per_generation": 2, "per_device_train_batch_size": 4})


CONFIG = """
model: {path: model}
data: {path: questions.jsonl}
reward: rewards:half
train:
  max_steps: 6
  save_steps: 100
  per_device_train_batch_size: 8
  num_generations: 4
  max_completion_length: 8
  learning_rate: 1e-2
  teacher: ema
  teacher_ema_rate: 0.3
  reference_coef: 0.5
  with_peer_template: "[{answer}|{demonstration}]"
  answer_only_template: "[{answer}]"
  bf16: false
  gradient_checkpointing: false
  dataloader_pin_memory: false
  use_cpu: yes
  disable_tqdm: yes
"""
REWARDS = """
import os, time
def half(completion_ids, **kwargs):
    time.sleep(float(os.environ.get("SLOW", "0")))
    return [float(sum(ids[:2]) % 2) for ids in completion_ids]
"""


def test_sigterm_saves_and_the_same_command_resumes(tmp_path, monkeypatch, capsys):
    """A real process under a real SIGTERM, at no step in particular."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    build_model().save_pretrained("model")
    TOKENIZER.save_pretrained("model")
    Path("questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    Path("run.yaml").write_text(CONFIG)
    Path("rewards.py").write_text(REWARDS)

    command = [sys.executable, "-m", "hsd.cli", "train", "run.yaml", "--output_dir", "cut"]
    threads = str(torch.get_num_threads())  # another test may have changed this process's; sums would differ
    env = os.environ | {"PYTHONPATH": str(ROOT), "SLOW": "0.3", "OMP_NUM_THREADS": threads}
    with open("log", "w") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + 300
            while len(rows(Path("cut"))) < 2 and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            code = process.wait(timeout=240)
        finally:
            process.kill()
    assert code == 128 + signal.SIGTERM, Path("log").read_text()[-3000:]
    stopped = len(rows(Path("cut")))
    assert 2 <= stopped < 6
    assert [p.name for p in Path("cut").glob("checkpoint-*")] == [f"checkpoint-{stopped}"]
    assert not Path("cut/model").exists() and Path("cut/training.png").exists()

    assert main(["train", "run.yaml", "--output_dir", "cut"]) == 0
    assert f"resuming after step {stopped}" in capsys.readouterr().out
    assert main(["train", "run.yaml", "--output_dir", "whole"]) == 0
    assert_equal(rows(Path("whole")), rows(Path("cut")), "metrics")
    assert Path("whole/model/model.safetensors").read_bytes() == Path("cut/model/model.safetensors").read_bytes()
    assert main(["train", "run.yaml", "--output_dir", "cut"]) == 0  # nothing left to do
    assert "already has 6 steps" in capsys.readouterr().out
