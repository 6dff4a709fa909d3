"""The model card, README.md beside saved weights: method, base model, settings, source; full and LoRA runs alike."""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.utils import validate_repo_id

from hsd.files import replacing
from hsd.methods import title
from hsd.policy.frozen import inner_model, is_peft
from hsd.progress import counted
from hsd.train.config import HSDConfig

CARD = "README.md"
SUCCESS = "\n## Success\n"
ADAPTER, WHOLE, MERGED = "A LoRA adapter of", "All weights of", "All weights, with a LoRA adapter added, of"
SETTINGS = ("method", "teacher", "divergence", "divergence_coef", "policy_coef", "reference_coef", "learning_rate")
SETTINGS += ("lr_scheduler_type", "num_generations", "generation_batch_size", "max_completion_length", "temperature")
SETTINGS += ("top_p", "seed")
OF_A_TEACHER = ("teacher", "divergence", "divergence_coef")
# As in CITATION.cff.
PAPER = """@article{li2026localizing,
  title   = {Localizing Credit at the Divergence: Path-Conditioned Self-Distillation for LLM Reasoning},
  author  = {Li, Yu and Hong, Shu and Lan, Tian},
  journal = {arXiv preprint arXiv:2606.15576},
  year    = {2026},
  url     = {https://arxiv.org/abs/2606.15576}
}"""


def model_card(args: HSDConfig, base: str, steps: int, lora: Any = None) -> str:
    """The card after ``steps`` optimizer steps from ``base``, a hub id or a folder. ``lora``: PEFT's config."""
    hub = is_hub_id(base)
    base = base if hub else folder_name(base)
    data = [yaml.safe_dump({"base_model": base}).strip()] if hub else []
    data += [f"library_name: {'transformers' if lora is None else 'peft'}", "pipeline_tag: text-generation"]
    tags = dict.fromkeys(
        ["hsd", args.method_spec.name, "self-distillation" if args.has_teacher else "policy-gradient", "trl"]
    )
    names = [key for key in SETTINGS if args.has_teacher or key not in OF_A_TEACHER]
    settings = {key: getattr(args, key) for key in names}
    settings = {key: getattr(value, "value", value) for key, value in settings.items()}  # transformers has enums
    if lora is not None:
        settings |= {"LoRA rank": lora.r, "LoRA alpha": lora.lora_alpha}
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("trl", "transformers", "torch"))
    return "\n".join(
        [
            "---",
            *data,
            "tags:",
            *(f"- {tag}" for tag in tags),
            "---",
            "",
            f"# {Path(base).name}, trained by {title(args.method)}",
            "",
            f"{WHOLE if lora is None else ADAPTER} `{base}` after {counted(steps, 'step')} of "
            f"hsd-kernels' `method: {args.method}`.",
            "",
            "| setting | value |",
            "|---|---|",
            *(f"| {key} | {value} |" for key, value in settings.items()),
            "",
            f"With {versions}. `hsd train` writes all settings to `config.yaml` in the run's folder.",
            "",
            "## Citation",
            "",
            f"The method is {title(args.method)}. hsd-kernels implements the family of this paper:",
            "",
            "```bibtex",
            PAPER,
            "```",
            "",
        ]
    )


def write_merged_card(adapters: Path, folder: Path) -> None:
    """The adapters' card in the folder of the model that they were merged into. Without a card do nothing."""
    if (path := adapters / CARD).exists():
        text = path.read_text(encoding="utf-8").replace("library_name: peft", "library_name: transformers", 1)
        (folder / CARD).write_text(text.replace(ADAPTER, MERGED, 1), encoding="utf-8")


def is_hub_id(base: str) -> bool:
    """Whether a model's name is a repository's on the hub, and no folder's."""
    try:
        validate_repo_id(base)
    except ValueError:
        return False
    return not Path(base).is_dir()


def folder_name(path: str) -> str:
    """What a card, which is read by others, says of a private path: the folder's own name, as a line of Markdown."""
    name = Path(os.path.abspath(path)).name if path else ""
    return "".join(c if c.isprintable() and c != "`" else "?" for c in name) or "a model"


def write_card(folder: Path, args: HSDConfig, policy: Any, steps: int) -> None:
    """The card of ``policy``, which is PEFT's where adapters were trained."""
    lora = policy.peft_config[policy.active_adapter] if is_peft(policy) else None
    base = inner_model(policy).config._name_or_path or ""
    with replacing(folder / CARD) as part:
        part.write_text(model_card(args, base, steps, lora), encoding="utf-8")


def write_success(folder: Path, text: str) -> None:
    """Put ``text`` at the end of a saved model's card, in place of an earlier one. Without a card do nothing."""
    path = folder / CARD
    if path.exists():
        with replacing(path) as part:
            part.write_text(path.read_text(encoding="utf-8").partition(SUCCESS)[0] + f"{SUCCESS}\n{text}\n", "utf-8")
