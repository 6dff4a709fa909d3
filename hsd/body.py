"""A causal language model taken apart: a body that returns hidden states, and the head that would make logits.

The fused loss needs ``h`` and ``W``, never ``W h``. Most heads are a plain Linear; some model families scale or cap
the logits afterwards (Gemma 2: soft cap, Cohere: scale, Granite: division). Those are read from the config, and
`check_split` proves on the model itself that nothing else happens between the body and the logits.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Split:
    """``logits = cap(logit_scale * (body(x) @ weight.T + bias))`` with ``cap(z) = softcap * tanh(z / softcap)``."""

    body: nn.Module
    head: nn.Linear
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def weight(self) -> Tensor:
        return self.head.weight

    @property
    def bias(self) -> Tensor | None:
        return self.head.bias


def split_model(model: Any) -> Split:
    """Body and head of a transformers causal LM, or of a PEFT model around one (its adapters stay active).

    Raises ValueError naming the model class when it has no separable body or its head is not a plain Linear.
    """
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    name = type(inner).__name__
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"model: expected {name}.get_output_embeddings() to be a plain nn.Linear, got {type(head).__name__}; "
            "a head with an adapter of its own (LoRA on lm_head, modules_to_save) is not supported"
        )
    body = inner.get_decoder() if hasattr(inner, "get_decoder") else None
    if body is None or body is inner or isinstance(body, nn.Linear):
        body = getattr(inner, "model", None)
    if not isinstance(body, nn.Module):
        raise ValueError(f"model: expected {name} to have a body (get_decoder() or .model) that returns hidden states")
    config = inner.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    division = getattr(config, "logits_scaling", None) or 1.0
    return Split(body, head, scale / division, getattr(config, "final_logit_softcapping", None))


def hidden_states(body: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Last hidden states (B, T, D) of a padded batch. Positions count from the first real token of each row."""
    kwargs = {}
    if "position_ids" in inspect.signature(body.forward).parameters:
        kwargs["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp_min(0)
    return body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **kwargs).last_hidden_state


@torch.no_grad()
def check_split(model: nn.Module, split: Split) -> None:
    """Raise ValueError unless head(body(x)), scaled and capped as ``split`` says, equals the model's own logits."""
    was_training = model.training
    model.eval()
    try:
        ids = torch.arange(1, 7, device=split.weight.device).remainder(split.weight.shape[0]).reshape(1, -1)
        mask = torch.ones_like(ids)
        expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
        h = hidden_states(split.body, ids, mask).to(split.weight.dtype)
        got = nn.functional.linear(h, split.weight, split.bias).float() * split.logit_scale
        if split.softcap is not None:
            got = split.softcap * torch.tanh(got / split.softcap)
    finally:
        model.train(was_training)
    if got.shape != expected.shape:
        raise ValueError(
            f"model: expected the logits of {type(model).__name__} to have the shape of head(body(x)), "
            f"{tuple(got.shape)}, got {tuple(expected.shape)}; tokens that live outside the body (prompt tuning) are "
            "not supported"
        )
    gap = (got - expected).abs().max().item()
    scale = expected.abs().max().item()
    if not gap <= 2e-2 * scale:  # relative at any magnitude: a fresh or down-scaled head has logits far below 1
        raise ValueError(
            f"model: {type(model).__name__} changes its logits after the head in a way that is not known here: "
            f"expected head(body(x)) to equal model(x).logits, got a difference of {gap:.3g} at magnitude {scale:.3g}"
        )
