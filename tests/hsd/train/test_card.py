"""The model card: one text beside every saved model, full or LoRA, and the success that is put into it."""

import pytest
import yaml
from tiny_runs import LORA, make, qwen3

from hsd.methods import METHODS, title
from hsd.train.card import model_card, write_success
from hsd.train.config import HSDConfig


@pytest.mark.parametrize("lora", [None, LORA])
def test_a_saved_model_has_the_card_of_its_method(lora, tmp_path):
    trainer = make(qwen3(), tmp_path / "run", peft_config=lora, learning_rate=0.125)
    trainer.save_model(str(tmp_path / "model"))
    card = (tmp_path / "model" / "README.md").read_text()
    assert "trained by Hindsight Self-Distillation (arXiv 2606.15576)" in card and "| learning_rate | 0.125 |" in card
    assert "title   = {Localizing Credit at the Divergence" in card
    assert ("| LoRA rank | 4 |" in card, "library_name: peft" in card) == (lora is not None, lora is not None)
    assert "More Information Needed" not in card and "GRPO" not in card


def test_a_hub_id_is_the_base_model_and_a_folder_is_its_name(tmp_path):
    args = HSDConfig(str(tmp_path), use_cpu=True, bf16=False, method="grpo")
    card = model_card(args, "Qwen/Qwen3-1.7B", 7)
    assert "\nbase_model: Qwen/Qwen3-1.7B\n" in card and "# Qwen3-1.7B, trained by GRPO (arXiv 2402.03300)\n" in card
    assert "All weights of `Qwen/Qwen3-1.7B` after 7 steps of hsd-kernels' `method: grpo`." in card
    assert "| teacher |" not in card and "- policy-gradient\n" in card
    card = model_card(args, str(tmp_path), 7)
    assert "base_model:" not in card and f"`{tmp_path.name}`" in card and str(tmp_path) not in card


@pytest.mark.parametrize(
    ("base", "name", "hub"),
    [
        ("org/name_1.5-x", "org/name_1.5-x", True),
        ("123", "123", True),  # YAML would make it a number
        ("true", "true", True),
        ("my model/", "my model", False),
        ("./a/b/", "b", False),
        ("a/b/..", "a", False),
        ("..", "{parent}", False),
        (".", "{here}", False),
        ("modèle/漢字", "漢字", False),
        ("gone/model: x", "model: x", False),
        ("~/models/x", "x", False),
        ("C:\\models", "C:\\models", False),
        ("x`|\n# y", "x?|?# y", False),
        ("/", "a model", False),
        ("", "a model", False),
    ],
)
def test_a_name_with_odd_characters_leaves_the_card_whole(base, name, hub, tmp_path, monkeypatch):
    (tmp_path / "here" / "a" / "b").mkdir(parents=True)
    (tmp_path / "here" / "my model").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    name = name.format(parent=tmp_path.name, here="here")
    card = model_card(HSDConfig("run", use_cpu=True, bf16=False), base, 7)
    _, head, text = card.split("---\n", 2)
    assert yaml.safe_load(head).get("base_model") == (name if hub else None)
    assert f"\nAll weights of `{name}` after 7 steps" in text and f"# {name.split('/')[-1]}, trained by" in text


def test_every_method_has_a_title():
    assert all(0 < len(title(name)) < 130 and "\n" not in title(name) for name in METHODS)


def test_success_takes_the_place_of_an_earlier_one_and_makes_no_card(tmp_path):
    write_success(tmp_path, "0.5")
    assert not list(tmp_path.iterdir())
    (tmp_path / "README.md").write_text("# card\n")
    for text in ("0.5", "0.75"):
        write_success(tmp_path, text)
    assert (tmp_path / "README.md").read_text() == "# card\n\n## Success\n\n0.75\n"
