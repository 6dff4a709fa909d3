"""`hsd merge`: the merged model computes what the adapted one does."""

from pathlib import Path

import pytest
import torch
from tiny_runs import LORA, SMALLER, TOKENIZER, qwen3, start_adapters, with_lora
from transformers import AutoModelForCausalLM, AutoTokenizer

from hsd.cli.__main__ import main
from hsd.train.card import model_card
from hsd.train.config import HSDConfig

IDS = torch.tensor([TOKENIZER("47+38+25+61=")["input_ids"]])


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def save(dtype):
    """A base model and a run whose adapters change it."""
    qwen3(0, **SMALLER, tie_word_embeddings=False).to(dtype).save_pretrained("base")
    adapted = with_lora(AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32))
    start_adapters(adapted, std=0.5)
    for folder in ("base", "run/model"):
        TOKENIZER.save_pretrained(folder)
    adapted.save_pretrained("run/model")


def logits(folder):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits


@pytest.mark.parametrize(
    ("words", "base", "dtype", "rounding"),
    [
        ([], torch.float32, torch.float32, 1e-5),
        ([], torch.bfloat16, torch.bfloat16, 2**-6),  # as the base model is saved
        (["--dtype", "float32"], torch.bfloat16, torch.float32, 1e-5),
    ],
)
def test_its_logits_are_the_adapted_models(words, base, dtype, rounding, capsys):
    save(base)
    assert main(["merge", "run", "deep/out", *words]) == 0
    assert f"deep/out: run/model merged into base, {str(dtype)[6:]}" in capsys.readouterr().out
    assert sorted(p.name for p in Path("deep").iterdir()) == ["out"]
    assert not Path("deep/out/adapter_config.json").exists()
    assert AutoModelForCausalLM.from_pretrained("deep/out", dtype="auto").dtype == dtype
    assert AutoTokenizer.from_pretrained("deep/out")("1+2=")["input_ids"] == TOKENIZER("1+2=")["input_ids"]
    wanted = logits("run/model")
    largest = wanted.abs().max().item()
    torch.testing.assert_close(logits("deep/out"), wanted, rtol=0, atol=rounding * largest)
    assert (logits("base") - wanted).abs().max() > 10 * rounding * largest  # the adapters do something


@pytest.mark.parametrize("card", [True, False])
def test_it_has_the_card_of_its_adapters(card):
    save(torch.float32)
    text = model_card(HSDConfig("run", use_cpu=True, bf16=False), "base", 7, LORA)
    Path("run/model/README.md").write_text(text) if card else Path("run/model/README.md").unlink()
    assert main(["merge", "run", "out"]) == 0
    if not card:
        assert not Path("out/README.md").exists()
        return
    changes = [
        (a, b) for a, b in zip(text.split("\n"), Path("out/README.md").read_text().split("\n"), strict=True) if a != b
    ]
    after = "`base` after 7 steps of hsd-kernels' `method: hsd`."
    assert changes == [
        ("library_name: peft", "library_name: transformers"),
        (f"A LoRA adapter of {after}", f"All weights, with a LoRA adapter added, of {after}"),
    ]


def test_what_cannot_be_merged_is_named(capsys):
    save(torch.float32)
    Path("there").mkdir()
    Path("file").touch()
    for words, named in (
        (["run", "file/out"], "OUT: expected a new folder in a folder, got file/out, where "),
        (["base", "out"], "RUN: expected a model with LoRA adapters, got base, whose weights are whole"),
        (["run", "there"], "OUT: expected a new folder, got there, which is a folder that exists"),
        (["nowhere", "out"], "run: expected a folder, got nowhere"),
    ):
        assert main(["merge", *words]) == 2
        assert named in capsys.readouterr().err
    assert not Path("out").exists() and not list(Path("there").iterdir())
