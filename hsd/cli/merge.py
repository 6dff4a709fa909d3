"""`hsd merge RUN OUT`: a run's LoRA adapters added to its base model's weights, as a model that needs no peft.

The sums are computed in fp32 and rounded once, to ``--dtype``. RUN may also be a checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "add a run's LoRA adapters to its base model's weights, as a model of its own"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, or a model or checkpoint in it")
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the weights; auto: as the base model is saved",
    )


def run(args: argparse.Namespace) -> int:
    """Returns 0. Raises ValueError for a model without adapters and for a folder that exists."""
    import torch
    from peft import PeftConfig, PeftModel

    from hsd.cli.folder import run_and_model
    from hsd.files import check_folder, replacing
    from hsd.policy.pretrained import load, load_config, load_tokenizer
    from hsd.train.card import write_merged_card

    _, adapters = run_and_model(args.run)
    if not (adapters / "adapter_config.json").exists():
        raise ValueError(f"RUN: expected a model with LoRA adapters, got {adapters}, whose weights are whole")
    check_folder("OUT", args.out, new=True)
    base = str(PeftConfig.from_pretrained(str(adapters)).base_model_name_or_path)
    tokenizer = load_tokenizer(str(adapters))
    model, _ = load(base, "float32")
    merged = PeftModel.from_pretrained(model, str(adapters)).merge_and_unload(safe_merge=True)
    saved = load_config(base).dtype or torch.float32
    dtype = saved if args.dtype == "auto" else getattr(torch, args.dtype)
    with replacing(args.out) as part:
        merged.to(dtype).save_pretrained(part)
        tokenizer.save_pretrained(part)
        write_merged_card(adapters, part)
    print(f"{args.out}: {adapters} merged into {base}, {str(dtype).removeprefix('torch.')}")
    return 0
