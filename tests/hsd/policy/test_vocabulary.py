"""Rows of embedding and head beside the tokenizer's vocabulary, also below an adapter."""

from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from tiny_runs import SMALLER, TOKENIZER, qwen3

from hsd.policy.vocabulary import check_vocabulary


@pytest.mark.parametrize("adapted", [False, True])
def test_every_token_needs_a_row(adapted):
    model = qwen3(0, **SMALLER, tie_word_embeddings=False)
    if adapted:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["embed_tokens"]))
    check_vocabulary(model, TOKENIZER)
    base: Any = getattr(model.get_input_embeddings(), "base_layer", model.get_input_embeddings())
    base.num_embeddings = len(TOKENIZER) - 1
    with pytest.raises(ValueError, match=f"expected at least {len(TOKENIZER)} embedding rows"):
        check_vocabulary(model, TOKENIZER)
