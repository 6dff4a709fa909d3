"""What generates: transformers anywhere, vLLM where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hsd.evaluate.sampling import Sampling, all_end_ids, choice_of, end_token_ids, sample_from_ids
from hsd.policy.pretrained import load, load_tokenizer
from hsd.policy.vocabulary import check_vocabulary

EngineName = Literal["auto", "transformers", "vllm"]
# (prompts as token ids, settings, seed) -> one rollout per prompt, up to and including its first end token
Generate = Callable[[Sequence[Sequence[int]], Sampling, int], list[list[int]]]


@dataclass(frozen=True)
class Engine:
    name: str  # with its version
    tokenizer: Any
    end_ids: list[int]
    generate: Generate


def choose(name: EngineName) -> Literal["transformers", "vllm"]:
    """``"auto"`` is vLLM where it is installed and a GPU is there, else transformers. A name is taken as it is.

    Raises ValueError for another name, and for ``"vllm"`` where it is not installed.
    """
    if name not in ("auto", "transformers", "vllm"):
        raise ValueError(f"engine: expected 'auto', 'transformers' or 'vllm', got {name!r}")
    installed = importlib.util.find_spec("vllm") is not None
    if name == "auto":
        import torch

        return "vllm" if installed and torch.cuda.is_available() else "transformers"
    if name == "vllm" and not installed:
        raise ValueError("engine: vllm is not installed (pip install vllm); 'auto' or 'transformers' runs without it")
    return name


def load_engine(name: EngineName, model: str, dtype: str = "auto") -> Engine:
    """The model behind one of the engines; ``dtype`` as transformers and vLLM name them."""
    return {"transformers": transformers_engine, "vllm": vllm_engine}[choose(name)](model, dtype)


def transformers_engine(path: str, dtype: str) -> Engine:
    import torch
    import transformers

    model, tokenizer = load(path, dtype)
    check_vocabulary(model, tokenizer)
    model.to("cuda" if torch.cuda.is_available() else "cpu")

    def generate(prompt_ids: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> list[list[int]]:
        return sample_from_ids(model, tokenizer, prompt_ids, sampling, seed=seed)

    name = f"transformers {transformers.__version__}, {str(model.dtype).removeprefix('torch.')}, {model.device.type}"
    return Engine(name, tokenizer, end_token_ids(model, tokenizer), generate)


def vllm_engine(path: str, dtype: str) -> Engine:
    """vLLM's offline engine."""
    import vllm  # type: ignore[import-not-found]
    from transformers import GenerationConfig

    tokenizer = load_tokenizer(path)
    try:
        declared = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # the model declares nothing
        declared = None
    end_ids = all_end_ids(declared, tokenizer)
    llm = vllm.LLM(model=path, dtype=dtype, generation_config="vllm")  # "vllm": no settings that the model declares

    def generate(prompt_ids: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> list[list[int]]:
        settings = [
            vllm.SamplingParams(
                **choice_of(sampling) | {"min_p": sampling.min_p or 0.0},
                max_tokens=sampling.max_new_tokens,
                stop_token_ids=end_ids,
                seed=seed + i,  # a request's own: it does not depend on what else is in the batch
                detokenize=False,
            )
            for i in range(len(prompt_ids))
        ]
        prompts = [{"prompt_token_ids": list(ids)} for ids in prompt_ids]
        return [list(out.outputs[0].token_ids) for out in llm.generate(prompts, settings)]

    return Engine(f"vllm {vllm.__version__}, {dtype}", tokenizer, end_ids, generate)
