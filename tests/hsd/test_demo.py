"""The demo from end to end on a tiny world: report, resume, and going on with more steps."""

import json

import pytest
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from hsd.demo import __main__ as demo
from hsd.demo import small_world, worlds
from hsd.evaluate import Sampling
from hsd.hindsight.context import ContextTemplate
from hsd.train.callbacks import load_metrics


def tiny(args, say):
    tokenizer = small_world.build_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    questions = small_world.make_questions(8, seed=0)
    return worlds.World(
        title="tiny world",
        model=Qwen3ForCausalLM(config),
        tokenizer=tokenizer,
        train=questions,
        held_out=questions[:4],
        reward=lambda completion_ids, **kwargs: [float(ids[0] % 2) for ids in completion_ids],
        template=ContextTemplate(small_world.WITH_PEER, small_world.ANSWER_ONLY),
        sampling=Sampling(max_new_tokens=6),
        eval_samples=2,
        credit_questions=4,
        steps=2,
        save_steps=1,
        config={
            "bf16": False,
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 8,
            "teacher": "ema",
            "reference_coef": 0.1,
        },
    )


def test_runs_reports_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(worlds, "small", tiny)
    out = tmp_path / "run"
    demo.main(["small", "--out", str(out)])
    printed = capsys.readouterr().out
    assert "# tiny world" in printed and "| success [95 % interval] |" in printed and "step 2/2" in printed
    files = {"report.md", "report.json", "metrics.jsonl", "credit.json", "training.png"}
    assert files <= {p.name for p in out.iterdir()}
    AutoModelForCausalLM.from_pretrained(out / "model")

    before = (out / "before.json").read_text()
    demo.main(["small", "--out", str(out), "--steps", "4"])  # goes on from step 2
    assert [row["step"] for row in load_metrics(out / "metrics.jsonl")] == [1, 2, 3, 4]
    assert (out / "before.json").read_text() == before
    facts = json.loads((out / "report.json").read_text())
    assert facts["settings"]["steps"] == 4 and facts["settings"]["teacher"] == "ema"


def test_a_finished_run_is_only_reported_again_and_another_run_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(worlds, "small", tiny)
    out = tmp_path / "run"
    demo.main(["small", "--out", str(out), "--steps", "1"])
    demo.main(["small", "--out", str(out), "--steps", "1"])
    assert "already has 1 steps" in capsys.readouterr().out
    assert [row["step"] for row in load_metrics(out / "metrics.jsonl")] == [1]
    with pytest.raises(ValueError, match=r"teacher.*--out"):
        demo.main(["small", "--out", str(out), "--steps", "1", "--teacher", "live"])


def test_read_questions(tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_text('{"question": "1+1?", "answer": "so #### 2"}\n{"question": "2+2?", "answer": "4"}\n')
    assert worlds.read_questions(file, 1) == [{"prompt": [{"role": "user", "content": "1+1?"}], "answer": "2"}]
    assert [q["answer"] for q in worlds.read_questions(file)] == ["2", "4"]
    file.write_text('{"question": "1+1?", "answer": "so two"}\n')
    with pytest.raises(ValueError, match=r"q.jsonl, row 0: text: expected an answer that holds a number"):
        worlds.read_questions(file)
    file.write_text('{"asked": "1+1?", "answer": "2"}\n')
    with pytest.raises(ValueError, match=r"q.jsonl, row 1.*question"):
        worlds.read_questions(file)
