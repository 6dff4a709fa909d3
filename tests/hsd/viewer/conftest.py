"""Made-up credit on tokens that try to break a page, with the letters of a byte-level tokenizer."""

import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hsd.hindsight.credit import divergence_position
from hsd.hindsight.groups import Group, Rollout
from hsd.viewer.measure import TokenCredit, Top

HOSTILE = [
    "</script><script>document.title='broken'</script>",
    "<img src=x onerror=\"document.title='broken'\">",
    "<!--",
    "&lt;",
    "{{data}}",
    "\n",
    "\t",
    "\x00",
    "\x1b[31m",
    "\u202eright to left override",
    "\u05e9\u05dc\u05d5\u05dd",
    " leading space",
    "\u2028",
    "\\",
    "'\"",
]
SPLIT = "\N{GRINNING FACE}"  # no token of its own: four tokens of a byte each


def build_tokenizer(words: list[str] = HOSTILE) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with one token for each byte, then one for each of ``words``, then <|end|> and <|pad|>."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(list(words))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>", clean_up_tokenization_spaces=False
    )


def made_up(tokenizer, group: Group, peers: list[int | None], g: int = 0, k: int = 3) -> list[TokenCredit]:
    """Credit that falls with the distance to tau, -4 nats there, and the tokens themselves as likeliest ones."""
    read = []
    for i, (rollout, peer) in enumerate(zip(group.rollouts, peers, strict=True)):
        n = len(rollout.token_ids)
        tau = None if peer is None else divergence_position(rollout.token_ids, group.rollouts[peer].token_ids)
        t = torch.arange(n)
        credit = 0.01 * torch.cos(t) if tau is None else torch.cos((t - tau) / 3) * -4 * 0.9 ** (t - tau).abs()
        top = (torch.tensor(rollout.token_ids)[:, None] + torch.arange(k)) % len(tokenizer)
        probs = torch.tensor([0.7, 0.2, 0.05, 0.02, 0.01])[:k].expand(n, k)
        read.append(
            TokenCredit(
                g, i, peer, tau, credit, 0.1 * credit, credit.abs(), -1 - credit.abs(), Top(top, probs), Top(top, probs)
            )
        )
    return read


def hostile_group(tokenizer) -> Group:
    """A failing rollout that holds every hostile token, its peer, which parts at token 4, and a prefix of the peer."""
    ids = {word: tokenizer.convert_tokens_to_ids(word) for word in HOSTILE}
    split = tokenizer(SPLIT, add_special_tokens=False)["input_ids"]
    assert len(split) == 4
    end = tokenizer.eos_token_id
    common = [ids["</script><script>document.title='broken'</script>"], ids["\n"], ids["<!--"], ids[" leading space"]]
    failing = [*common, *ids.values(), *split, end]
    peer = [*common, split[0], ids["\t"], end]
    rollouts = (Rollout(tuple(failing), 0.0), Rollout(tuple(peer), 1.0), Rollout(tuple(common), 0.0))
    return Group("<b>What</b> is 1+1?</textarea></script>", "2 & <i>", rollouts)


@pytest.fixture
def made():
    return sys.modules[__name__]
