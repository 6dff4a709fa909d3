"""`model.generate` for groups of rollouts: a prompt is computed once a group, a row no further than its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hsd.policy.growing_cache import growing_cache

# A prompt of several rows is computed once where that saves so many tokens. Below, plain `generate` is as fast.
WORTH_SHARING = 2048
# After every so many tokens the rows that have ended leave the batch.
SEGMENT = 64


@torch.no_grad()
def generate(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    max_new_tokens: int,
    pad_id: int,
    end_ids: Sequence[int],
    **settings: Any,
) -> Tensor:
    """``model.generate(input_ids, attention_mask=attention_mask, ...)``, faster for groups of rollouts on a CPU.

    Where no row ends before the last `SEGMENT` and no prompt is shared, the samples of a seed are those of plain
    ``generate``. A model with other layers than full attention gets plain ``generate``, and so do settings that
    segments would change (`growing_cache`).

    Args:
        input_ids: (N, L), padded on the left.
        attention_mask: (N, L).
        end_ids: The tokens that end a row; what follows is ``pad_id``.
        **settings: As for ``model.generate``.

    Returns:
        (N, L + T), T the number of new tokens of the longest row.
    """
    cache = growing_cache(model, **settings)
    ending = {"pad_token_id": pad_id, "eos_token_id": list(end_ids) or None}
    if cache is None:
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        return model.generate(**given, **ending, **settings, max_new_tokens=max_new_tokens)
    prompts = _shared(input_ids, attention_mask)
    if prompts is not None and attention_mask.all() and input_ids.device.type == "cpu":
        # Without a masked column SDPA gets no mask, and its CPU kernel for grouped queries is the slow one.
        # A token of the prompt: a repetition penalty would count another one.
        column = input_ids[:, :1]
        ids, mask = torch.cat([column, input_ids], -1), torch.cat([column * 0, attention_mask], -1)
        settings |= {"max_new_tokens": max_new_tokens, "pad_id": pad_id, "end_ids": end_ids}
        return generate(model, ids, mask, **settings)[:, 1:]
    if prompts is not None:
        ids, mask, row = prompts
        given = {"input_ids": ids[:, :-1], "attention_mask": mask[:, :-1], "past_key_values": cache}
        model.generate(**given, max_new_tokens=1, do_sample=False, pad_token_id=pad_id)
        cache.batch_select_indices(row)
    longest = input_ids.shape[1] + max_new_tokens
    out = input_ids.new_full((len(input_ids), longest), pad_id)
    ends = torch.tensor(list(end_ids), device=input_ids.device, dtype=input_ids.dtype)
    rows, ids, mask = torch.arange(len(input_ids), device=input_ids.device), input_ids, attention_mask
    while len(rows) and ids.shape[1] < longest:
        known = ids.shape[1]
        given = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}
        ids = model.generate(**given, **ending, **settings, max_new_tokens=min(SEGMENT, longest - known))
        out[rows, : ids.shape[1]] = ids
        goes_on = ~torch.isin(ids[:, known:], ends).any(-1)
        mask = torch.cat([mask, mask.new_ones(len(ids), ids.shape[1] - known)], -1)
        if not goes_on.all():
            rows, ids, mask = rows[goes_on], ids[goes_on], mask[goes_on]
            cache.batch_select_indices(goes_on.nonzero().squeeze(-1))
    return out[:, : ids.shape[1]]


def _shared(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """The different prompts, their masks, and which of them each row has; None where computing them once saves little,
    or one of them has nothing before its last token."""
    both, row = torch.cat([input_ids, attention_mask], -1).unique(dim=0, return_inverse=True)
    ids, mask = both.split(input_ids.shape[1], -1)
    few = attention_mask.sum() - mask.sum() < WORTH_SHARING
    return None if few or mask.sum(-1).min() < 2 else (ids, mask, row)
