"""The text of single tokens, so that every token of a rollout can be shown and none is lost."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

REPLACEMENT = "\ufffd"


def token_texts(tokenizer: Any, ids: Iterable[int]) -> list[str]:
    """The text of each token on its own. Special tokens keep their name (``<|im_end|>``), a leading space is kept.

    A token that is only part of a character (emoji are often split over several) is written as its bytes,
    ``\\xf0\\x9f``; ids that the tokenizer does not know, as a padded vocabulary has, as ``<id 151700>``.
    """
    return [_text(tokenizer, int(i)) for i in ids]


def partial_bytes(tokenizer: Any, token_id: int) -> bytes | None:
    """The bytes of a token that is not whole characters; None for any other token."""
    if REPLACEMENT not in tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False):
        return None
    data = _bytes_of(tokenizer.convert_ids_to_tokens(token_id) or "")
    return data if data and data.decode("utf-8", errors="ignore").encode() != data else None


def _text(tokenizer: Any, token_id: int) -> str:
    name = tokenizer.convert_ids_to_tokens(token_id)
    if name is None:
        return f"<id {token_id}>"
    if data := partial_bytes(tokenizer, token_id):
        return data.decode("utf-8", errors="backslashreplace")
    text = tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if name.startswith("\u2581") and not text.startswith(" "):  # SentencePiece's mark; decode drops the first space
        return " " + text
    return text or name


def _bytes_of(name: str) -> bytes | None:
    """The bytes that a token's name stands for: SentencePiece's ``<0xF0>``, or GPT-2's letter for each byte."""
    if match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", name):
        return bytes([int(match[1], 16)])
    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    return bytes(map(byte_of.__getitem__, name)) if all(letter in byte_of for letter in name) else None
