"""A small model that computes as a large one does, where no rank has the large one's weights."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch

from hsd.policy.frozen import inner_model

TOKENS = 128
MLP_WIDTHS = ("intermediate_size", "moe_intermediate_size", "ffn_hidden_size", "n_inner")


def small_model(policy: Any, device: torch.device | str = "cpu") -> Any:
    """A causal LM of the policy's class and configuration with random fp32 weights: as few layers as have every kind of
    layer, a short vocabulary, narrow MLPs; heads, positions and scales are the policy's.

    The same on every rank. A PEFT policy stands for the model inside it.
    """
    inner = inner_model(policy)
    config = deepcopy(inner.config)
    text = config.get_text_config()
    kinds = list(getattr(text, "layer_types", None) or ())
    layers = max((kinds.index(kind) + 1 for kind in set(kinds)), default=2)
    layers = min(max(layers, 2), text.num_hidden_layers)
    if kinds:
        text.layer_types = kinds[:layers]
    text.num_hidden_layers = layers
    text.vocab_size = min(text.vocab_size, TOKENS)
    for name in MLP_WIDTHS:
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, min(getattr(text, name), 64))
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, name, None)  # may lie outside the short vocabulary
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        # Not from_config, which would partition it as well.
        return type(inner)(config).float().eval().to(device)
