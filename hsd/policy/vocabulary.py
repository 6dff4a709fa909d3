"""Whether a model has a row for every token of its tokenizer."""

from __future__ import annotations

from typing import Any


def check_vocabulary(model: Any, tokenizer: Any) -> None:
    """Raises ValueError where a token's id is beyond the model's embedding or its head.

    Such a token is an index error in the middle of a run, on a GPU one that ends the process.
    """
    last, token = max((number, token) for token, number in tokenizer.get_vocab().items())
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    sizes = {"embedding": getattr(embedding, "base_layer", embedding).num_embeddings}  # below PEFT's
    sizes |= {"head": head.out_features} if hasattr(head, "out_features") else {}
    for name, rows in sizes.items():
        if rows <= last:
            raise ValueError(
                f"model: expected at least {last + 1} {name} rows, one for each token of its tokenizer, got {rows} "
                f"(the last token is {token!r}); model.resize_token_embeddings({last + 1}) adds them"
            )
