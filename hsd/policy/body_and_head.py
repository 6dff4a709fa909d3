"""A causal language model as its body, which returns hidden states, and its head, which would make logits of them.

The fused loss needs ``h`` and ``W``, never ``W h``. Most heads are a plain Linear; some model families scale or cap
the logits afterwards (Gemma 2: soft cap, Cohere: scale, Granite: division). `body_and_head` takes those from the
config, and `check_body_and_head` proves on the model itself that nothing else happens between the body and the logits.
Sharded weights rule that proof out: what `body_and_head` finds or refuses is then all there is.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hsd.policy.frozen import in_eval_mode, inner_model
from hsd_kernels import Head

# What the models of transformers 5.23 do to their logits, by the names in their configurations.
FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # Cohere, Falcon-H1, Muse
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")  # Granite and MiniCPM3, Inkling
MULTIPLIED = ("hyperclovax",)  # model types whose logits_scaling is a factor
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM


@dataclass(frozen=True)
class BodyAndHead:
    """``logits = cap(logit_scale * (body(x) @ weight.T + bias))`` with ``cap(z) = softcap * tanh(z / softcap)``."""

    body: nn.Module
    linear: nn.Linear
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def head(self) -> Head:
        """The head's tensors as they are now: sharding wrappers replace them between forward passes."""
        return Head(self.linear.weight, self.linear.bias, self.logit_scale, self.softcap)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V) in fp32, of a few tokens: the loss never makes them."""
        return logits(self.head, hidden)


def logits(head: Head, hidden: Tensor) -> Tensor:
    """As `BodyAndHead.logits`, of a head that may be in a wider dtype than the states."""
    bias = None if head.bias is None else head.bias.to(hidden.dtype)
    z = nn.functional.linear(hidden, head.weight.to(hidden.dtype), bias).float() * head.logit_scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def body_and_head(model: Any) -> BodyAndHead:
    """Of a transformers causal LM, or of a PEFT model around one (its adapters stay active).

    Raises ValueError naming the model class when it has no separable body, its head is not a plain Linear or does not
    make all of its logits, or other weights lie between the two.
    """
    inner = inner_model(model)
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
    for child_name, child in inner.named_children():
        if child is not head and body not in child.modules() and any(True for _ in child.parameters()):
            raise ValueError(
                f"model: expected {name} to have no weights but its body's and its head's, got some in {child_name}, "
                "which would be left out between hidden states and logits"
            )
    return BodyAndHead(body, head, *_logit_form(inner.config.get_text_config(), head.out_features, name))


def _logit_form(config: Any, vocabulary: int, name: str) -> tuple[float, float | None]:
    """Scale and soft cap of the logits."""
    if vocabulary != (getattr(config, "unpadded_vocab_size", None) or vocabulary):
        raise ValueError(
            f"model: expected {name} to return a logit for each of the head's {vocabulary} rows, got "
            f"unpadded_vocab_size={config.unpadded_vocab_size}"
        )
    scale = 1.0
    for key in (*FACTORS, *DIVISORS):
        value = getattr(config, key, None) or 1.0
        scale *= value if key in FACTORS or config.model_type in MULTIPLIED else 1.0 / value
    return scale, next((cap for key in CAPS if (cap := getattr(config, key, None)) is not None), None)


def hidden_states(body: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Last hidden states (B, S, D) of padded ``input_ids`` (B, S). Positions count from each row's first real token."""
    kwargs = {}
    if "position_ids" in inspect.signature(body.forward).parameters:
        kwargs["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp_min(0)
    return body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **kwargs).last_hidden_state


def probe_ids(parts: BodyAndHead) -> Tensor:
    """(1, 6) token ids that any vocabulary has, to try a model with."""
    weight = parts.linear.weight
    return torch.arange(1, 7, device=weight.device).remainder(weight.shape[0]).reshape(1, -1)


@torch.no_grad()
def check_body_and_head(model: nn.Module, parts: BodyAndHead) -> None:
    """Raise ValueError unless head(body(x)), scaled and capped as ``parts`` says, equals the model's own logits."""
    with in_eval_mode(model):
        ids = probe_ids(parts)
        mask = torch.ones_like(ids)
        expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
        got = parts.logits(hidden_states(parts.body, ids, mask).to(parts.linear.weight.dtype))
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
