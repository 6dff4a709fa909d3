"""Keys and values in room that grows by blocks: transformers' own layer copies all of them at every token."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.generation.configuration_utils import GenerationMode
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module

from hsd.policy.frozen import inner_model

BLOCK = 64  # tokens
# These count from where a generation begins, and would count anew in each segment, or return no row for each prompt.
OF_A_WHOLE_GENERATION = ("min_length", "min_new_tokens", "forced_eos_token_id", "exponential_decay_length_penalty")
OF_A_WHOLE_GENERATION += ("begin_suppress_tokens", "encoder_repetition_penalty", "guidance_scale", "max_time")
OF_A_WHOLE_GENERATION += ("num_return_sequences", "return_dict_in_generate")


def growing_cache(model: Any, **settings: Any) -> DynamicCache | None:
    """An empty cache of ``model``, to generate in segments with ``settings`` and those that it declares.

    None where a layer keeps something else than the keys and values of all tokens, a setting asks for another cache,
    for beams or for something of `OF_A_WHOLE_GENERATION`, or ranks hold parts of the weights: these must call the model
    equally often.
    """
    asked = copy.deepcopy(model.generation_config)
    asked.update(**settings)
    if model.config.is_encoder_decoder or asked.cache_implementation is not None or asked.use_cache is False:
        return None
    if asked.get_generation_mode() not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        return None
    if any(getattr(asked, name) for name in OF_A_WHOLE_GENERATION):
        return None
    if is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model):
        return None
    if "past_key_values" not in inspect.signature(inner_model(model).forward).parameters:  # RWKV, XLNet, the first GPT
        return None
    cache = DynamicCache(config=model.config)
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    cache.layers[:] = [GrowingLayer() for _ in cache.layers]
    return cache


class GrowingLayer(DynamicLayer):
    """`DynamicLayer` whose ``keys`` and ``values`` are views (N, heads, T, width) of room for more tokens."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.rooms = {}
        assert self.keys is not None and self.values is not None
        self.keys = self._appended("keys", self.keys, key_states)
        self.values = self._appended("values", self.values, value_states)
        return self.keys, self.values

    def _appended(self, name: str, held: Tensor, new: Tensor) -> Tensor:
        """``torch.cat([held, new], -2)``."""
        room, start = self.rooms.get(name), 0 if held.numel() == 0 else held.shape[-2]
        stop = start + new.shape[-2]
        # Another pointer: rows were selected or repeated since.
        if room is None or room.data_ptr() != held.data_ptr() or stop > room.shape[-2] or room.dtype != new.dtype:
            dtype = new.dtype if start == 0 else torch.promote_types(held.dtype, new.dtype)
            room = self.rooms[name] = new.new_empty(*new.shape[:-2], stop + BLOCK, new.shape[-1], dtype=dtype)
            room[..., :start, :] = held if start else room[..., :0, :]
        room[..., start:stop, :] = new
        return room[..., :stop, :]
