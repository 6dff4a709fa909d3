"""`generate` beside `model.generate`: the same tokens, from fewer."""

import pytest
import torch
import transformers
from datasets import Dataset
from tiny_runs import QUESTIONS, STEP, TEMPLATE, TOKENIZER, half, qwen3, with_lora
from torch import nn
from transformers.cache_utils import DynamicLayer
from trl import GRPOTrainer

from hsd.padding import padded
from hsd.policy import generate as module
from hsd.policy.generate import generate
from hsd.policy.growing_cache import BLOCK, GrowingLayer, growing_cache
from hsd.train.config import HSDConfig
from hsd.train.trainer import HSDTrainer

TINY = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
RWKV = {"attention_hidden_size": 32, "num_hidden_layers": 2}
PAD = 0
ENDS = (5, 7)
PROMPTS = [[3, 9, 4], [8, 2, 6, 11, 12, 13], [4, 0, 9]]  # the padding token may stand in a prompt
EQUAL = [[3, 9, 4], [8, 2, 6], [4, 0, 9]]


def family(name: str) -> nn.Module:
    torch.manual_seed(0)
    bloom = {"vocab_size": 61, "hidden_size": 32, "n_layer": 2, "n_head": 4}
    gpt2 = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4}
    gemma3 = {**TINY, **HEADS, "sliding_window": 4}
    models = {
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY, **HEADS)),
        "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**gpt2)),
        "bloom": lambda: transformers.BloomForCausalLM(transformers.BloomConfig(**bloom)),
        "gemma3": lambda: transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**gemma3)),
        "mamba": lambda: transformers.MambaForCausalLM(transformers.MambaConfig(**TINY)),
        "gpt1": lambda: transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(**gpt2)),
        "rwkv": lambda: transformers.RwkvForCausalLM(transformers.RwkvConfig(vocab_size=61, hidden_size=32, **RWKV)),
        "lora": lambda: with_lora(transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY, **HEADS))),
    }
    model = models[name]().eval()
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.3)
    return model


def both(model, prompts, new=20, do_sample=False, **settings):
    """The tokens of plain ``generate`` and of ours."""
    ids, mask = padded(prompts, PAD, "left")
    torch.manual_seed(3)
    given = {"do_sample": do_sample, **settings}
    plain = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=new, pad_token_id=PAD, eos_token_id=list(ENDS), **given
    )
    torch.manual_seed(3)
    ours = generate(model, ids, mask, max_new_tokens=new, pad_id=PAD, end_ids=ENDS, **given)
    return plain, ours


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "gemma3", "mamba", "rwkv", "gpt1", "lora"])
@pytest.mark.parametrize("prompts", [PROMPTS, EQUAL], ids=["padded", "equal"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("segment", [1, 4, 64])
def test_greedy_tokens_are_those_of_plain_generate(name, prompts, shared, segment, monkeypatch):
    monkeypatch.setattr(module, "WORTH_SHARING", 1 if shared else 10**9)
    monkeypatch.setattr(module, "SEGMENT", segment)
    plain, ours = both(family(name), [p for p in prompts for _ in range(3)])
    assert torch.equal(plain, ours)


def test_samples_are_those_of_plain_generate_to_the_bit():
    plain, ours = both(family("llama"), PROMPTS * 4, new=module.SEGMENT, do_sample=True, top_k=0)
    assert torch.equal(plain, ours)
    assert len(plain.unique(dim=0)) > len(PROMPTS)


def test_a_shared_prompt_is_computed_once_and_an_ended_row_no_more(monkeypatch):
    monkeypatch.setattr(module, "WORTH_SHARING", 6)
    monkeypatch.setattr(module, "SEGMENT", 2)
    model, computed = family("llama"), []
    model.model.register_forward_hook(
        lambda m, args, kwargs, out: computed.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    ids, mask = padded([PROMPTS[0]] * 3 + [PROMPTS[1]], PAD, "left")
    ends = range(5, 15)
    torch.manual_seed(0)
    out = generate(model, ids, mask, max_new_tokens=20, pad_id=PAD, end_ids=ends, do_sample=True, top_k=0)
    lengths = [next((t + 1 for t, i in enumerate(row) if i in ends), 20) for row in out[:, 6:].tolist()]
    assert len(set(lengths)) > 1  # or nothing is tested
    assert computed[0] == (2, 5)  # the different prompts without their last token
    assert computed[1] == (4, 1)
    # A row is computed to the end of its segment.
    alive = [sum(n > t - t % 2 for n in lengths) for t in range(max(lengths))]
    assert [rows for rows, _ in computed[1:]] == alive


@pytest.mark.parametrize(("saved", "shares"), [(6, True), (7, False)])
def test_sharing_begins_where_it_saves_enough(saved, shares, monkeypatch):
    monkeypatch.setattr(module, "WORTH_SHARING", saved)
    ids, mask = padded([[3, 9, 4]] * 3, PAD, "left")
    assert (module._shared(ids, mask) is not None) == shares


def test_a_prompt_of_one_token_is_not_shared(monkeypatch):
    monkeypatch.setattr(module, "WORTH_SHARING", 1)
    plain, ours = both(family("llama"), [[3], [3], [3], [4, 9]])
    assert torch.equal(plain, ours)


@pytest.mark.parametrize("new", [1, 2])
def test_few_tokens_and_no_end(new):
    model = family("llama")
    ids, mask = padded(PROMPTS, PAD, "left")
    out = generate(model, ids, mask, max_new_tokens=new, pad_id=PAD, end_ids=(), do_sample=False)
    assert out.shape == (3, 6 + new)


def test_the_batch_is_as_wide_as_its_longest_row(monkeypatch):
    monkeypatch.setattr(module, "SEGMENT", 4)
    model = family("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[ENDS[0]] = 0  # all logits equal: token 0 is taken; not an end
    ids, mask = padded(PROMPTS, PAD, "left")
    ended = generate(model, ids, mask, max_new_tokens=20, pad_id=PAD, end_ids=(0,), do_sample=False)
    assert ended.shape == (3, 7)
    assert generate(model, ids, mask, max_new_tokens=20, pad_id=PAD, end_ids=ENDS, do_sample=False).shape == (3, 26)


@pytest.mark.parametrize(
    "setting",
    [
        {"cache_implementation": "static"},
        {"num_beams": 2},
        {"min_length": 15},
        {"min_new_tokens": 10},
        {"forced_eos_token_id": 5},
        {"exponential_decay_length_penalty": (3, 1.5)},
        {"encoder_repetition_penalty": 1.5},
        {"guidance_scale": 1.5},
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
    ],
    ids=lambda setting: next(iter(setting)),
)
@pytest.mark.parametrize("declared", [True, False])
def test_settings_mean_what_they_mean_to_plain_generate(setting, declared, monkeypatch):
    monkeypatch.setattr(module, "WORTH_SHARING", 1)
    monkeypatch.setattr(module, "SEGMENT", 4)
    model = family("llama")
    if declared:
        model.generation_config.update(**setting)
    plain, ours = both(model, [p for p in EQUAL for _ in range(3)], **({} if declared else setting))
    assert torch.equal(plain, ours)


@pytest.mark.parametrize("name", ["gemma3", "mamba", "rwkv", "gpt1"])
def test_other_layers_than_full_attention_have_no_growing_cache(name):
    assert growing_cache(family(name)) is None


@pytest.mark.parametrize("setting", [{"cache_implementation": "static"}, {"use_cache": False}])
def test_a_cache_that_is_asked_for_is_left_alone(setting):
    model = family("llama")
    assert growing_cache(model) is not None
    model.generation_config.update(**setting)
    assert growing_cache(model) is None


@pytest.mark.parametrize("lengths", [(1,), (3, 1, 1), (BLOCK, 1), (BLOCK + 1, 1, BLOCK, 1), (1, 0, 1)])
def test_the_growing_layer_is_a_concatenation(lengths):
    ours, plain = GrowingLayer(), DynamicLayer()
    for n in lengths:
        keys, values = torch.randn(2, 3, n, 4), torch.randn(2, 3, n, 5)
        for a, b in zip(ours.update(keys, values), plain.update(keys, values), strict=True):
            assert torch.equal(a, b)
        assert ours.get_seq_length() == plain.get_seq_length()


@pytest.mark.parametrize(
    "between",
    [
        lambda layer: layer.batch_select_indices(torch.tensor([1, 0, 1])),
        lambda layer: layer.batch_select_indices(torch.tensor([0])),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
        lambda layer: layer.crop(-1),
        lambda layer: layer.reset(),
    ],
    ids=["more rows", "fewer rows", "repeated", "reordered", "cropped", "reset"],
)
def test_what_happens_between_two_tokens(between):
    ours, plain = GrowingLayer(), DynamicLayer()
    old, new = torch.randn(2, 3, 5, 4), torch.randn(6, 3, 1, 4)
    for layer in (ours, plain):
        layer.update(old, old)
        between(layer)
    rows = len(plain.keys) if plain.is_initialized else 2
    for a, b in zip(ours.update(new[:rows], new[:rows]), plain.update(new[:rows], new[:rows]), strict=True):
        assert torch.equal(a, b)


def test_a_wider_type_is_kept():
    ours, plain = GrowingLayer(), DynamicLayer()
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        x = torch.randn(1, 1, 2, 4, dtype=dtype)
        a, b = ours.update(x, x)[0], plain.update(x, x)[0]
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def trainer(tmp_path, **options):
    args = HSDConfig(output_dir=str(tmp_path), **STEP | options)
    return HSDTrainer(
        qwen3(), half, args, Dataset.from_list(QUESTIONS), processing_class=TOKENIZER, context_template=TEMPLATE
    )


def test_the_trainer_samples_what_trl_samples(tmp_path):
    ours = trainer(tmp_path)
    ids = [TOKENIZER(q["prompt"])["input_ids"] for q in QUESTIONS for _ in range(4)]
    sampled = []
    for turn in (ours._generate_single_turn, super(HSDTrainer, ours)._generate_single_turn):
        torch.manual_seed(1)
        sampled.append(turn(ids, None, {}, 4)[0])
    assert sampled[0] == sampled[1]
    assert len(set(map(len, sampled[0]))) > 1


@pytest.mark.parametrize(
    ("options", "by_groups"),
    [({}, True), ({"generation_kwargs": {"min_new_tokens": 3}}, False), ({"pad_to_multiple_of": 8}, False)],
)
def test_what_the_trainer_leaves_to_trl(options, by_groups, tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr("hsd.train.trainer.generate", lambda *a, **k: called.append(1) or generate(*a, **k))
    said, _ = trainer(tmp_path, **options)._generate_single_turn([[3, 4], [5]], None, {}, 1)
    assert len(said) == 2
    assert bool(called) == by_groups


def test_rollouts_of_vllm_are_trls(tmp_path, monkeypatch):
    ours = trainer(tmp_path)
    ours.use_vllm = True
    del ours.generation_kwargs  # TRL sets it for transformers alone
    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", lambda *args: ("TRL's", args[1:]))
    assert ours._generate_single_turn([[3]], None, {}, 1) == ("TRL's", ([[3]], None, {}, 1))
