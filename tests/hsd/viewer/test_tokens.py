"""Every token has a text of its own."""

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from hsd.tasks import small_world
from hsd.viewer.tokens import partial_bytes, token_texts


def test_byte_level_tokens(made):
    tokenizer = made.build_tokenizer()
    ids = tokenizer("a\n<!-- leading space", add_special_tokens=False)["input_ids"]
    assert token_texts(tokenizer, ids) == ["a", "\n", "<!--", " leading space"]
    emoji = tokenizer(made.SPLIT, add_special_tokens=False)["input_ids"]
    assert token_texts(tokenizer, emoji) == ["\\xf0", "\\x9f", "\\x98", "\\x80"]
    assert [partial_bytes(tokenizer, i) for i in emoji] == [b"\xf0", b"\x9f", b"\x98", b"\x80"]
    assert partial_bytes(tokenizer, ids[0]) is None
    assert token_texts(tokenizer, [tokenizer.eos_token_id]) == ["<|end|>"]
    assert token_texts(tokenizer, [len(tokenizer) + 5]) == [f"<id {len(tokenizer) + 5}>"]


def test_every_hostile_token_comes_back_as_it_was(made):
    tokenizer = made.build_tokenizer()
    ids = tokenizer.convert_tokens_to_ids(made.HOSTILE)
    assert token_texts(tokenizer, ids) == made.HOSTILE


def test_sentencepiece_tokens_keep_their_space_and_bytes():
    vocabulary = {"<unk>": 0, "\u2581the": 1, "cat": 2, "<0xF0>": 3, "<0x41>": 4, "<pad>": 5}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    assert token_texts(fast, [1, 2, 3, 4, 5]) == [" the", "cat", "\\xf0", "A", "<pad>"]


def test_the_small_world():
    tokenizer = small_world.build_tokenizer()
    assert token_texts(tokenizer, tokenizer("12+34=46;#46$")["input_ids"]) == list("12+34=46;#46$")
