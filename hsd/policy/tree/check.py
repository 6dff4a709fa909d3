"""Whether a model computes the same through a tree. What is known not to is refused by name; the rest is tried once."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hsd.padding import padded
from hsd.policy.body_and_head import body_and_head, hidden_states
from hsd.policy.frozen import in_eval_mode, inner_model
from hsd.policy.tree.attention import disable_tree, enable_tree
from hsd.policy.tree.forward import tree_hidden_states

# Relative L2 error of the hidden states that rounding may cause. The mistakes of prefix_tree.md are at 0.3 and above.
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}
ROUNDING_HALF = 3e-2
LAYERS = ("full_attention", "sliding_attention")


def why_not(model: Any) -> str | None:
    """The reason why ``model`` cannot go through a tree, or None, from its configuration alone."""
    inner = inner_model(model)
    name = type(inner).__name__
    body = body_and_head(model).body
    config = inner.config.get_text_config()
    if not getattr(inner, "_supports_attention_backend", False):
        return f"{name} does not take its attention from AttentionInterface (_supports_attention_backend is False)"
    if "position_ids" not in inspect.signature(body.forward).parameters:
        return f"{type(body).__name__} takes no position_ids"
    other = sorted(set(getattr(config, "layer_types", None) or ()) - set(LAYERS))
    if other or getattr(inner, "_is_stateful", False):
        return f"{name} has layers other than full and sliding attention: {other or 'a recurrent state'}"
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "use_bidirectional_attention", None):
        return f"{name} does not read from left to right only"
    if getattr(config, "num_kv_shared_layers", None):
        return f"{name} shares keys and values between layers (num_kv_shared_layers={config.num_kv_shared_layers})"
    if getattr(config, "attn_temperature_tuning", False):  # Llama 4: from node 8,192 on, which no small group shows
        return f"{name} scales its attention by a token's place in the batch (attn_temperature_tuning)"
    moving = sorted(set(_rope_types(getattr(config, "rope_parameters", None))) & {"dynamic", "longrope"})
    if moving:
        return (
            f"{name} has {moving[0]!r} rotary embeddings, whose frequencies depend on the longest sequence of a batch"
        )
    noise = _noise(model, config)
    if noise:
        return f"{noise}: a shared token would draw its noise once for all sequences, expected 0"
    if getattr(config, "output_router_logits", False):
        return f"{name} has an auxiliary loss over its router's choices, which would count shared tokens once"
    return None


def _rope_types(parameters: Any) -> Iterator[str]:
    for key, value in (parameters or {}).items():
        if isinstance(value, dict):
            yield from _rope_types(value)
        elif key == "rope_type":
            yield value


def _noise(model: nn.Module, config: Any) -> str | None:
    """Dropout, layer drop or jitter that is not 0, including an adapter's."""
    for key, value in config.to_dict().items():
        named = "drop" in key or key == "router_jitter_noise"
        if named and isinstance(value, int | float) and value > 0 and not key.startswith(("classifier", "summary")):
            return f"{key}={value}"
    for name, module in model.named_modules():
        if name.startswith(("classifier", "summary")):
            continue
        if "Dropout" in type(module).__name__ and getattr(module, "p", 0) > 0:  # PEFT has classes of its own
            return f"{name} drops with p={module.p}"
        for key, value in vars(module).items():  # DBRX and Phimoe have theirs in no key that the loop above knows
            if ("drop" in key or "jitter" in key) and isinstance(value, float) and value > 0:
                return f"{name}.{key}={value}"
    return None


@torch.no_grad()
def self_check(model: Any) -> str | None:
    """Compute one small group of an enabled model both ways; the reason why the tree is wrong for it, or None.

    Windows are narrowed to 3 tokens meanwhile, so that a layer's window matters in sequences of a dozen.
    """
    parts = body_and_head(model)
    device, vocabulary = parts.linear.weight.device, parts.linear.weight.shape[0]
    q, first, second, a, b, c = (
        [(7 * i + 3 * offset + 1) % vocabulary for i in range(offset, offset + n)]
        for offset, n in ((0, 4), (5, 5), (11, 3), (17, 6), (23, 2), (29, 8))
    )
    b = a[:2] + b  # two rollouts that begin alike
    prompts, rollouts, teacher = [q] * 3, [a, b, c], [q + first, q + first, q + second]
    with in_eval_mode(model), _windows(model, 3):
        disable_tree(model)
        expected = [_alone(parts.body, p, o, device) for p, o in zip(prompts + teacher, rollouts * 2, strict=True)]
        padded = _padded(parts.body, prompts, rollouts, device)
        enable_tree(model)
        if not torch.equal(_padded(parts.body, prompts, rollouts, device), padded):
            return "ordinary batches are not computed as before"
        for backend in ("auto",) if device.type == "cuda" else ("dense", "gather"):
            try:
                student, taught = tree_hidden_states(model, prompts, rollouts, teacher, backend=backend)
            except (ValueError, RuntimeError, TypeError, AttributeError, KeyError, ImportError) as error:
                return f"{backend} attention failed: {error}"
            got, want = torch.cat([*student, *taught]), torch.cat(expected)
            gap = ((got - want).float().norm() / want.float().norm()).item()
            if not gap <= _rounding(want):
                return f"hidden states of a small group differ by {gap:.2g} with {backend} attention"
    return None


def _rounding(hidden: Tensor) -> float:
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) or (kind == "cuda" and torch.get_float32_matmul_precision() != "highest"):
        return ROUNDING_HALF  # TF32 keeps 10 bits of the fraction, bf16 7
    return ROUNDING.get(hidden.dtype, ROUNDING_HALF)


def _alone(body: nn.Module, prompt: list[int], rollout: list[int], device: torch.device) -> Tensor:
    ids = torch.tensor([prompt + rollout], device=device)
    return hidden_states(body, ids, torch.ones_like(ids))[0, len(prompt) - 1 : -1]


def _padded(body: nn.Module, prompts: list[list[int]], rollouts: list[list[int]], device: torch.device) -> Tensor:
    sequences = [p + o for p, o in zip(prompts, rollouts, strict=True)]
    ids, mask = (x.to(device) for x in padded(sequences, side="left"))
    return hidden_states(body, ids, mask)[mask.bool()]


@contextmanager
def _windows(model: Any, size: int) -> Iterator[None]:
    """Every sliding window is ``size`` inside: in the config, which the masks read, and in the layers."""
    holders = [model.config.get_text_config(), *model.modules()]
    before = [(h, h.sliding_window) for h in holders if isinstance(getattr(h, "sliding_window", None), int)]
    for holder, _ in before:
        holder.sliding_window = size
    try:
        yield
    finally:
        for holder, window in before:
            holder.sliding_window = window


def warn_unshared(reason: str) -> None:
    warnings.warn(f"prefix sharing is off, every sequence is computed by itself: {reason}", stacklevel=4)


def try_tree(model: Any) -> str | None:
    """`why_not`, then `enable_tree` and `self_check`. With a reason, the model's attention is as it was."""
    reason = why_not(model)
    if reason is None:
        try:
            enable_tree(model)
            reason = self_check(model)
        except ValueError as error:
            reason = str(error)
        if reason is not None:
            disable_tree(model)
    return reason


def use_tree(model: Any) -> str | None:
    """`try_tree`, and a warning with the reason where it fails: the caller goes on without a tree."""
    reason = try_tree(model)
    if reason is not None:
        warn_unshared(reason)
    return reason


def choose_sharing(asked: str, model: Any, tried: Any, noise: float | None) -> str:
    """ "tree", "prompt" or "none", for one of these or "auto"; unless it is "none", ``model`` takes a tree afterwards.

    Args:
        tried: The model itself, or one that computes as it does.
        noise: NEFTune's alpha.

    Raises ValueError where the model does not pass and ``asked`` is "tree" or "prompt".
    """
    if asked == "none":
        return asked
    if noise:
        reason = (
            f"neftune_noise_alpha={noise}: a shared token would draw its noise once for all sequences, scaled by the "
            "length of the batch, expected None"
        )
    else:
        reason = why_not(model) or try_tree(tried)
    if reason is None:
        enable_tree(model)
        return "tree" if asked == "auto" else asked
    if asked != "auto":
        raise ValueError(f"prefix_sharing: expected 'none' for this model, got {asked!r}: {reason}")
    warn_unshared(reason)
    return "none"
