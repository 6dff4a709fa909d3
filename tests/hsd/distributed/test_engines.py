"""Two gloo ranks under DeepSpeed's ZeRO-2 and ZeRO-3 and under FSDP2 as accelerate sets it up, against one process:
gradients within fp32 rounding, averages as computed by hand, resumed runs bit by bit."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from rank_runs import QUESTIONS, TESTS, assert_same, joined, launch, load, one_process, saved
from safetensors.torch import load_file
from tiny_runs import TOKENIZER, qwen3
from transformers import AutoModelForCausalLM

PATH = Path(__file__).with_name("engine_job.py")
job = load(PATH)

STEPS = [(e, name) for e in job.ENGINES for name in job.CASES if name not in job.WITHOUT.get(e, ())]
RUNS = [(e, name) for e in job.ENGINES for name in job.RUNS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """By engine, each run when it is first asked for."""
    done = {}

    def folder(engine):
        if engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
            pytest.skip("deepspeed is not installed")
        if not torch.distributed.is_gloo_available():
            pytest.skip("torch was built without gloo")
        if engine not in done:
            done[engine] = tmp_path_factory.mktemp(engine)
            cases = job.CONFIGS["ddp"] if engine == "ddp" else ()  # its steps are those of test_two_ranks.py
            environment = job.ENVIRONMENT.get(engine, {})
            launch(PATH, [engine, done[engine], *cases], done[engine], seconds=400, **environment)
        return done[engine]

    return folder


@pytest.mark.parametrize(("engine", "name"), STEPS)
def test_a_step_has_the_gradient_of_one_process(engine, name, folders, tmp_path):
    ranks = saved(folders(engine), name)
    rows, options, arguments = job.CASES[name]
    batch = joined([b for rank in ranks for b in rank["batches"]])
    assert len(batch["completion_ids"]) == 2 * rows * options.get("gradient_accumulation_steps", 1)
    loss, expected = one_process(tmp_path, batch, options, **arguments)
    for rank in ranks:
        assert rank["loss"] == pytest.approx(loss, rel=1e-4)
        assert_same(rank["gradient"], expected)


@pytest.mark.parametrize("engine", job.ENGINES)
def test_a_copied_teacher_becomes_the_student(engine, folders):
    for name in ("copy", "lora, gated"):
        if name not in job.WITHOUT.get(engine, ()):
            for rank in saved(folders(engine), name):
                assert_equal(*rank["copied"])


def test_ranks_share_prefixes_together(folders):
    """A micro-batch of one row: sharing pays on one rank and not on the other, and gathers must not be mixed up."""
    for engine in ("zero3", "fsdp2"):
        ranks = [saved(folders(engine), name) for name in job.CASES]
        for first, second in ranks:
            assert first["shared"] == second["shared"]
            if first["asked"]:
                together = [a and b for a, b in zip(first["asked"], second["asked"], strict=True)]
                assert first["shared"] == together[-len(first["shared"]) :]  # a scoring pass has asked before
        assert any(first["asked"] != second["asked"] for first, second in ranks)
        assert any(any(first["shared"]) for first, _ in ranks)


@pytest.mark.parametrize(("engine", "name"), RUNS)
def test_a_resumed_run_is_the_uninterrupted_one(engine, name, folders):
    for rank in saved(folders(engine), name):
        for whole, parts in zip(rank["whole"], rank["parts"], strict=True):
            assert_equal(whole, parts)


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert_equal(a[key], b[key]) if isinstance(a[key], dict) else assert_bits(a[key], b[key], key)


def assert_bits(a, b, key):
    assert a.numel() and torch.equal(a, b), key


@pytest.mark.parametrize(("engine", "name"), RUNS)
def test_averages_are_those_computed_by_hand(engine, name, folders):
    """In fp64, over the student after each step; in bf16 at rate 0.005 as well, where a bf16 average stands still."""
    rank = saved(folders(engine), name)[0]
    options = job.RUN | job.RUNS[name]
    start, *students = [{n.replace(".default.", ".*."): t.double() for n, t in s.items()} for s in rank["students"]]
    expected, frozen = {}, rank["whole"][1]
    for kind, rate in (("ema_teacher", "teacher_ema_rate"), ("reference_average", "reference_ema_rate")):
        if kind == "reference_average" and options["reference_refresh_steps"] is None:
            continue
        average = start
        for step, student in enumerate(students, 1):
            average = {n: torch.lerp(average[n], student[n], options[rate]) for n in average}
            if kind == "reference_average" and step == options["reference_refresh_steps"]:
                expected["reference"] = average
        expected[kind] = average
    assert frozen.keys() - {"initial_policy"} == expected.keys()
    for kind, tensors in expected.items():
        moved = max((tensors[n] - start[n]).abs().max() for n in start)
        assert moved > 1e-5
        narrow = kind == "reference" and "bf16" in name and engine != "fsdp2"  # the twin that is read
        bound = {"rtol": 0, "atol": 8e-3 if narrow else max(1e-3 * moved, 2.5e-7)}  # fp32 around 1.0
        assert frozen[kind].keys() == tensors.keys()
        for n, t in tensors.items():
            torch.testing.assert_close(frozen[kind][n].double(), t, **bound, msg=f"{kind} {n}")


@pytest.mark.parametrize(("engine", "name"), RUNS)
def test_the_final_model_and_the_frozen_files_hold_weights(engine, name, folders):
    folder, rank = folders(engine), saved(folders(engine), name)[0]
    student, frozen = rank["whole"]
    if "lora" in name:
        adapter = load_file(folder / f"{name} model" / "adapter_model.safetensors")
        assert {k: v.shape for k, v in adapter.items()} == {
            n.replace(".default", ""): t.shape for n, t in student.items()
        }
        for n, t in student.items():
            assert torch.equal(adapter[n.replace(".default", "")], t)
    else:
        loaded = dict(AutoModelForCausalLM.from_pretrained(folder / f"{name} model").named_parameters())
        assert loaded.keys() == student.keys()
        for n, t in student.items():
            torch.testing.assert_close(loaded[n].float(), t, rtol=1e-2 if "bf16" in name else 0, atol=0)
    for kind, tensors in frozen.items():
        at = folder / f"{name} whole" / ("." if kind == "initial_policy" else "checkpoint-3")
        stored = load_file(at / f"{kind}.safetensors")
        assert_equal(stored, tensors)


@pytest.mark.parametrize(("engine", "config"), [(e, c) for e, configs in job.CONFIGS.items() for c in configs])
def test_the_shipped_configurations_train_and_resume(engine, config, folders):
    """Neither waits for the other rank for ever: the job has a time limit."""
    folder = folders(engine)
    named = {"ddp": "unsharded", "zero3": "DeepSpeed ZeRO-3", "fsdp2": "FSDP2"}[engine]
    log, out, lora = (folder / "log0").read_text(), folder / config, "lora" in config
    assert log.count(f"{config}: 2 processes on cpu, {named}") == 2
    assert f"{config}: {8 if 'qwen3' in config else 2048} questions, resuming after step 1" in log
    assert json.loads((out / "model" / "trainer_state.json").read_text())["global_step"] == 2
    file = f"{'adapter_' if lora else ''}model.safetensors"
    first, last = (load_file(out / at / file) for at in ("checkpoint-1", "model"))
    assert first.keys() == last.keys() and not all(torch.equal(first[n], last[n]) for n in first)
    # Of the reference term, and of the demo's fixed teacher; with LoRA the adapters off.
    assert (out / "initial_policy.safetensors").exists() != lora


def test_a_launch_that_starts_one_process_says_so(tmp_path):
    """`accelerate launch --cpu` starts one, whatever number it is given."""
    qwen3().save_pretrained(tmp_path / "tiny")
    TOKENIZER.save_pretrained(tmp_path / "tiny")
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    train = {"max_steps": 1, "per_device_train_batch_size": 8, "max_completion_length": 4, "use_cpu": True}
    train |= {"bf16": False, "teacher": "live", "with_peer_template": "[{answer}|{demonstration}]"}
    train |= {"answer_only_template": "[{answer}]", "output_dir": str(tmp_path / "out"), "report_to": "none"}
    settings = {"model": {"path": str(tmp_path / "tiny")}, "data": {"path": str(tmp_path / "questions.jsonl")}}
    settings |= {"reward": "hsd.tasks.small_world:reward", "train": train}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    words = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "hsd.cli", "train"]
    run = subprocess.run(
        [sys.executable, "-m", *words, str(tmp_path / "run.yaml")],
        env=os.environ | {"PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "out: 1 process on cpu, unsharded" in run.stdout
