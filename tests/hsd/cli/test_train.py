"""`hsd train`: whose folder it is, what it refuses before training, and its metrics in tensorboard.

Training, a stop and a resume through the command line are in tests/hsd/train/test_resume.py.
"""

import json
import re
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from tiny_runs import SMALLER, TOKENIZER, qwen3
from transformers import T5Config
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from hsd.cli.__main__ import main
from hsd.cli.folder import BEFORE, claim
from hsd.cli.prepare import prepare, with_adapters
from hsd.cli.settings import load
from hsd.tasks import small_world
from hsd.tasks.settings import Lora
from hsd.train.callbacks import load_metrics
from hsd.train.config import HSDConfig

CONFIG = """
model: {path: model}
data: {path: questions.jsonl}
reward: hsd.tasks.small_world:reward
train:
  max_steps: 1
  per_device_train_batch_size: 4
  num_generations: 4
  max_completion_length: 4
  learning_rate: 1e-3
  teacher: fixed
  reference_coef: 0
  with_peer_template: "[{answer}|{demonstration}]"
  answer_only_template: "[{answer}]"
  bf16: false
  gradient_checkpointing: false
  use_cpu: true
"""


@pytest.fixture
def model(here):
    qwen3(0, **SMALLER).save_pretrained("model")
    TOKENIZER.save_pretrained("model")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(CONFIG)
    Path("questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in small_world.make_questions(4, seed=0)))
    return tmp_path


def asked(*overrides, file="run.yaml", rows=()):
    """A run in the folder "out" and its task."""
    run = prepare(load(Path(file), ["--output_dir", "out", *overrides]), "run")
    return run, replace(small_world.task(0), questions=list(rows), held_out=[])


def begin(words=(), rows=(), step="checkpoint-1/x"):
    """A run in the folder "out" that has taken a step."""
    claim(*asked(*words, rows=rows))
    (Path("out") / step).parent.mkdir(exist_ok=True)
    (Path("out") / step).write_text('{"step": 1}')


def test_the_folder_gets_a_configuration_that_makes_the_same_run(here):
    claim(*asked("--max_steps", "7", rows=[{"prompt": "q"}]))
    written = yaml.safe_load(Path("out/config.yaml").read_text())
    assert written["train"]["max_steps"] == 7 and written["train"]["learning_rate"] == 1e-3
    assert written["train"]["method"] == "hsd" and written["model"]["dtype"] == "float32"
    begin(["--max_steps", "7"], rows=[{"prompt": "q"}])
    claim(*asked(file="out/config.yaml", rows=[{"prompt": "q"}]))
    assert not list(Path("out").glob("*.part"))


@pytest.mark.parametrize(
    "words", [["--max_steps", "9"], ["--save_steps", "3"], ["--report_to", "none"], ["--logging_steps", "2"]]
)
def test_a_run_may_go_on_longer_and_log_otherwise(here, words):
    begin()
    claim(*asked(*words))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--learning_rate", "2e-3"], r"train\.learning_rate: out holds a run with 0\.001, got 0\.002"),
        (["--teacher", "live"], r"train\.teacher"),
        (["--model.path", "other"], r"model\.path"),
        (["--lora", "{r: 4}"], r"model\.lora: out holds a run with None"),
        (["--weight_decay", "0.1"], r"train\.weight_decay: out holds a run with 0\.0"),  # left to its default before
        (["--seed", "1"], r"train\.seed"),
    ],
)
def test_a_folder_with_another_run_is_refused(here, words, named):
    begin()
    before = Path("out/config.yaml").read_text()
    with pytest.raises(ValueError, match=named):
        claim(*asked(*words))
    assert Path("out/config.yaml").read_text() == before


@pytest.mark.parametrize(("began", "now"), [(1, 2), (2, 1)])
def test_another_number_of_processes_is_refused_also_with_the_same_batch(here, monkeypatch, began, now):
    def processes(n):
        monkeypatch.setattr(HSDConfig, "world_size", property(lambda self: n))
        return ["--per_device_train_batch_size", str(8 // n)]

    begin(processes(began))
    claim(*asked(*processes(began)))
    with pytest.raises(ValueError, match=f"^processes: out holds a run of {began}, got {now}; states of optimizer"):
        claim(*asked(*processes(now)))


def test_other_questions_are_another_run(here):
    begin(rows=[{"prompt": "q"}])
    with pytest.raises(ValueError, match=r"data\.questions: out holds a run with '1 questions"):
        claim(*asked(rows=[{"prompt": "r"}]))


@pytest.mark.parametrize(
    "words",
    [["--lr_scheduler_type", "linear"], ["--lr_scheduler_type", "constant_with_warmup", "--warmup_steps", "0.5"]],
)
def test_more_steps_are_another_run_where_the_schedule_depends_on_them(here, words):
    begin(words)
    with pytest.raises(ValueError, match="max_steps"):
        claim(*asked(*words, "--max_steps", "9"))


def test_a_warmup_of_so_many_steps_does_not(here):
    words = ["--lr_scheduler_type", "constant_with_warmup", "--warmup_steps", "2"]
    begin(words)
    claim(*asked(*words, "--max_steps", "9"))


def test_a_finished_run_keeps_what_more_steps_need_only_where_it_is_asked_to(model, here, capsys):
    assert main(["train", "run.yaml"]) == 0
    weights = [str(p.relative_to(here)) for p in (here / "runs").rglob("*") if p.suffix in (".safetensors", ".pt")]
    assert weights == ["runs/run/model/model.safetensors"]
    assert main(["train", "run.yaml"]) == 0
    assert "already has 1 step\n" in capsys.readouterr().out
    assert main(["train", "run.yaml", "--max_steps", "2"]) == 2
    assert "got 2; for a new run add --output_dir runs/run-2" in capsys.readouterr().err
    kept = ["train", "run.yaml", "--output_dir", "kept", "--save_total_limit", "1"]
    assert main(kept) == 0 and main([*kept, "--max_steps", "2"]) == 0
    assert [row["step"] for row in load_metrics(here / "kept" / "metrics.jsonl")] == [1, 2]
    assert [p.name for p in (here / "kept").glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_run_that_ended_before_its_model_was_saved_gets_it(model, here, capsys):
    words = ["train", "run.yaml", "--output_dir", "out"]
    assert main([*words, "--save_total_limit", "1"]) == 0
    whole = {p.name for p in (here / "out" / "model").iterdir()}
    written = (here / "out" / "model" / "model.safetensors").read_bytes()
    assert main([*words, "--save_total_limit", "1"]) == 0  # a model that is there stays
    (here / "out" / "model" / "trainer_state.json").unlink()
    (here / "out" / "model" / "model.safetensors").write_bytes(b"half")
    assert main(words) == 0
    assert {p.name for p in (here / "out" / "model").iterdir()} == whole
    assert (here / "out" / "model" / "model.safetensors").read_bytes() == written
    assert not list((here / "out").glob("checkpoint-*"))
    assert capsys.readouterr().out.endswith("already has 1 step\n")


@pytest.mark.parametrize(("rank", "writes"), [(0, True), (1, False)])
def test_one_rank_writes_the_folder(model, here, rank, writes, monkeypatch):
    """Two that replace one file at a time take each other's away."""
    monkeypatch.setattr(HSDConfig, "process_index", property(lambda self: rank))
    monkeypatch.setattr("hsd.cli.run.HSDTrainer.train", lambda self, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["train", "run.yaml", "--output_dir", "out"])
    assert (here / "out" / "run.json").exists() == (here / "out" / "config.yaml").exists() == writes


@pytest.mark.parametrize("where", ["model", "checkpoint-5"])
def test_fewer_steps_than_the_run_has_are_refused_and_as_many_are_not(here, where):
    begin(["--max_steps", "5"])
    (Path("out") / where).mkdir()
    (Path("out") / where / "trainer_state.json").write_text('{"global_step": 5}')
    before = Path("out/config.yaml").read_text()
    with pytest.raises(ValueError, match=r"max_steps: out holds a run of 5 steps, got 4; .* --output_dir out-4 "):
        claim(*asked("--max_steps", "4"))
    assert Path("out/config.yaml").read_text() == before
    for words in (["--max_steps", "5"], ["--max_steps", "-1"]):
        claim(*asked(*words))
    if where == "model":  # has nothing to go on from
        with pytest.raises(ValueError, match=r"max_steps: out holds a finished run of 5 steps, .*, got 6"):
            claim(*asked("--max_steps", "6"))
    else:
        claim(*asked("--max_steps", "6"))


def test_a_folder_of_something_else_is_refused(here):
    (here / "out").mkdir()
    (here / "out" / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="which holds another run"):
        claim(*asked())


@pytest.mark.parametrize("step", ["checkpoint-1/x", "metrics.jsonl", "model/x", BEFORE])
def test_what_has_not_begun_may_be_corrected_and_what_has_may_not(here, step):
    claim(*asked())
    Path("out/metrics.jsonl").write_text("")
    begin(["--seed", "1"], step=step)
    with pytest.raises(ValueError, match=r"train\.seed: out holds a run with 1, got 2"):
        claim(*asked("--seed", "2"))
    Path("out/run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json: expected a JSON object, got '{'"):
        claim(*asked("--seed", "1"))


def test_check_prints_the_resolved_configuration_and_leaves_nothing(here, model, capsys):
    Path("model/model.safetensors").unlink()  # no weights are loaded
    before = sorted(here.rglob("*"))
    assert main(["train", "run.yaml", "--check", "--learning_rate", "2e-3"]) == 0
    out, err = capsys.readouterr()
    shown = yaml.safe_load(out)
    assert "model on questions.jsonl: 4 questions, 0 held out, reward reward" in err
    assert shown["train"]["learning_rate"] == 2e-3 and shown["train"]["output_dir"] == "runs/run"
    assert sorted(here.rglob("*")) == before


SOLVED, BLANK = {"solution": "1+1="}, {"solution": " "}
NOTE = "method {} reads the column 'solution', which {} of 4 rows lack or leave blank; it trains on those without"


@pytest.mark.parametrize(
    ("method", "more", "lacking"),
    [
        *((name, {}, 4) for name in ("egrsd", "cl_egrsd", "vopd", "rlsd", "sdpg", "grpo+opsd", "opsd", "antisd")),
        ("egrsd", {0: BLANK, 1: SOLVED, 2: SOLVED, 3: {"solution": None}}, 2),
        ("egrsd", dict.fromkeys(range(4), SOLVED), 0),
        ("atesd", {0: SOLVED, 1: BLANK, 2: BLANK, 3: BLANK}, 3),  # which needs the column
        ("hsd", {}, 0),
        ("grpo", {}, 0),
    ],
)
def test_check_says_what_the_method_reads_and_rows_lack(method, more, lacking, here, model, capsys):
    rows = [q | more.get(i, {}) for i, q in enumerate(small_world.make_questions(4, seed=0))]
    Path("questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["train", "run.yaml", "--check", "--method", method]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if "rows lack" in line]
    assert notes == ([NOTE.format(method, lacking)] if lacking else [])


@pytest.mark.parametrize(("method", "lacking"), [("vopd", 4), ("hsd", 0)])
def test_a_run_says_so_at_its_start(method, lacking, here, model, capsys):
    words = ["--method", method, "--use_cpu", "true", "--output_dir", "out"]
    assert main(["train", "run.yaml", *words]) == 0
    said = capsys.readouterr().out.splitlines()
    notes = [line for line in said if "rows lack" in line]
    assert notes == ([NOTE.format(method, lacking)] if lacking else [])
    assert not lacking or said.index(notes[0]) < min(i for i, line in enumerate(said) if "before step 1" in line)


def test_check_of_a_registered_task_does_not_make_its_model(here, monkeypatch):
    monkeypatch.setattr(small_world, "warm_started", lambda *args: pytest.fail("made a model"))
    Path("task.yaml").write_text("task: small_world\ntrain: {use_cpu: true, bf16: false}\n")
    assert main(["train", "task.yaml", "--check"]) == 0
    assert main(["train", "task.yaml", "--check", "--data.path", "questions.jsonl", "--num_generations", "4"]) == 2


def test_a_package_that_reports_and_is_missing_is_one_line(here, model, monkeypatch, capsys):
    class Missing:
        def __init__(self):
            raise RuntimeError("requires wandb to be installed")

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "wandb", Missing)
    for check in ([], ["--check"]):
        assert main(["train", "run.yaml", "--report_to", "wandb", *check]) == 2
        assert "report_to: expected names of installed packages, got 'wandb': requires wandb" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--model.path", "./nowhere"],
            "--model.path: expected a folder with a model, or a hub id, got './nowhere', which",
        ),
        (
            ["--model.path", "questions.jsonl"],
            "--model.path: expected a folder with a model, or a hub id, got 'questions",
        ),
        (["--data.path", "nowhere.jsonl"], "--data.path: expected a file, got nowhere.jsonl, which is not there"),
        (["--data", "model/config.json"], "--data: model/config.json, line 1: expected a JSON object, got the first l"),
        (["--reward", "hsd.verify:nothing"], "reward: expected a function, got 'hsd.verify:nothing'"),
        (["--num_generations", "3"], "num_generations: expected a divisor of 4, the rollouts of one generation (per_d"),
        (
            ["--per_device_train_batch_size", "32"],
            "run.yaml: data.path: expected 8 questions or more, one step's worth, got 4",
        ),
        (
            ["--data.held_out", "4"],
            "run.yaml: data.path: expected 1 question or more, one step's worth, got 0 beside 4 of data.held_out",
        ),
        (["--report_to", "nosuch"], "report_to: expected names of installed packages, got 'nosuch': nosuch is not"),
        (["--temperature", "0"], "error: --temperature: expected a number in (0, inf), got 0.0"),
        (
            ["--with_peer_template", "{answer}"],
            "error: --with_peer_template: expected exactly the fields ['answer', 'demonstration'], and question if wa",
        ),
        (["--max_completion_length", "0"], "--max_completion_length: expected a number in [1, inf), got 0"),
        (["--num_iterations", "2", "--save_steps", "3"], "save_steps: expected a multiple of 2"),
        (["--method", "sdft"], "demonstration"),
        (
            ["--reward", "maths"],
            "reward: expected one of ('number', 'math', 'code', 'reasoning_gym') or module:function",
        ),
        (["--reward", "maths"], " or module:function, the nearest is math, got 'maths'"),
        (["--reward", "[]"], "reward: expected at least one function"),
        (["--model.attention", "nosuch"], "model.attention: expected an attn_implementation that this model can have"),
        (["--lora.r", "0"], "--lora.r: unknown key"),
        (["--model.lora.r", "0"], "model.lora.r: expected greater than or equal to 1, got 0"),
        (["--dropout", "1"], "model.lora.dropout: expected less than 1, got 1"),
        (
            ["--target_modules", "[q_proj, v_prj]"],
            "target_modules: expected modules of the model that LoRA can train, the nearest is v_proj, got 'v_prj'",
        ),
        (["--target_modules", "nosuch"], "target_modules: expected modules of the model that LoRA can train, got 'no"),
        (["--target_modules", "[lm_head]"], "a head with an adapter of its own (LoRA on lm_head"),
        (["--optim", "adamw_torc"], "error: --optim: expected one of adamw_torch, "),
        (["--optim", "lomo"], "optim: expected one that can run here, got 'lomo': You need to install `lomo_optim`"),
        (["--optim", "adamw_torc"], ", the nearest is adamw_torch, got 'adamw_torc'"),
        (["--save_strategy", "sometimes"], "--save_strategy: expected one of no, steps, epoch, best, got 'sometim"),
    ],
)
def test_what_cannot_be_trained_is_one_line(model, words, said, capsys):
    for check in ([], ["--check"]):
        assert main(["train", "run.yaml", *check, *words]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and said in error
    assert "expected at least" not in said or not Path("runs").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["--model.lora.r", "1"],
        ["--dropout", "0.5", "--target_modules", "[q_proj, self_attn.v_proj]"],
        ["--target_modules", ".*mlp.*_proj"],
        ["--model.attention", "eager", "--optim", "sgd", "--lr_scheduler_type", "cosine"],
    ],
)
def test_what_can_be_trained_passes_the_check(model, words):
    before = torch.get_rng_state()
    assert main(["train", "run.yaml", "--check", *words]) == 0
    assert torch.equal(torch.get_rng_state(), before)  # as a run's, which goes on to draw its adapters


@pytest.mark.parametrize(
    ("package", "words", "said"),
    [
        ("flash_attn", ["--model.attention", "flash_attention_2"], "model.attention: expected an attn_implementation"),
        ("vllm", ["--use_vllm", "true"], "use_vllm: expected the package vllm (pip install vllm) for True, got none"),
    ],
)
def test_a_package_that_is_there_passes_the_check_and_a_missing_one_does_not(
    model, monkeypatch, capsys, package, words, said
):
    there = set()
    monkeypatch.setattr("hsd.policy.pretrained.find_spec", lambda name: name if name in there else None)
    monkeypatch.setattr("hsd.train.limits.is_vllm_available", lambda: "vllm" in there)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["train", "run.yaml", "--check", *words]) == 2
    assert said in capsys.readouterr().err
    there.add(package)
    assert main(["train", "run.yaml", "--check", *words]) == 0


def test_a_model_that_continues_no_text_is_refused(model, capsys):
    T5Config(num_layers=1, d_model=8, d_kv=4, d_ff=8, num_heads=2).save_pretrained("model")
    assert main(["train", "run.yaml", "--check"]) == 2
    assert "model.path: expected a causal language model, got 'model', a t5" in capsys.readouterr().err


def test_one_word_switches_the_method(model, here, capsys):
    Path("hsd.yaml").write_text(CONFIG + "  divergence: jsd\n  teacher_success_every: 2\n  policy_coef: 0\n")
    assert main(["train", "hsd.yaml", "--method", "grpo"]) == 0
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "does not use" in line]
    asked = "policy_coef=0.0, divergence='jsd', teacher='fixed', teacher_success_every=2"
    assert said == f"runs/hsd: method grpo does not use {asked}"
    assert yaml.safe_load(Path("runs/hsd/config.yaml").read_text())["train"]["teacher"] == "live"
    Path("grpo.yaml").write_text(
        CONFIG.replace("  teacher: fixed", "  loss_type: grpo\n  epsilon: 0.3\n  method: grpo")
    )
    assert main(["train", "grpo.yaml", "--check", "--method", "hsd"]) == 0
    assert "method hsd does not use epsilon=0.3, loss_type='grpo'" in capsys.readouterr().err
    for words in (
        ["--method_args", "{rounds: 0}"],
        ["--draw_cap", "4"],
        ["--vllm_importance_sampling_correction", "1"],
    ):
        assert main(["train", "run.yaml", "--check", *words]) == 0
        assert f"does not use {words[0][2:]}=" in capsys.readouterr().err
    assert main(["train", "run.yaml", "--check"]) == 0
    assert "does not use" not in capsys.readouterr().err
    assert main(["train", "run.yaml", "--check", "--method_args", "{runds: 0}"]) == 2


def test_what_fsdp_rules_out_is_said_before_a_model_is_loaded(here, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert main(["train", "run.yaml", "--model.path", "nowhere/at/all"]) == 2
    assert "fsdp_version: expected 2, got 1" in capsys.readouterr().err
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert main(["train", "run.yaml", "--model.path", "nowhere/at/all", "--tree_token_budget", "64"]) == 2
    assert "tree_token_budget: expected None under FSDP2" in capsys.readouterr().err
    assert main(["train", "run.yaml", "--model.path", "nowhere/at/all"]) == 2
    assert "nowhere/at/all" in capsys.readouterr().err


def test_a_crash_in_training_keeps_its_traceback_and_one_before_it_is_a_line(model, here, monkeypatch, capsys):
    monkeypatch.syspath_prepend(here)
    (here / "broken_reward_of_a_test.py").write_text(
        "calls = []\n"
        "def f(completions, **kwargs):\n"
        "    calls.append(1)\n"
        "    if len(calls) != 2: raise ValueError('reward broke')\n"
        "    return [0.0] * len(completions)\n"
    )
    words = ["train", "run.yaml", "--max_steps", "2", "--reward", "broken_reward_of_a_test:f"]
    assert main(words) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: reward broke"
    with pytest.raises(RuntimeError, match="training stopped at step 1") as error:
        main(words)
    assert "reward broke" in str(error.value.__cause__)


def test_metrics_reach_tensorboard_through_trl(model, here, monkeypatch):
    """As wandb and trackio do: through TRL's report_to."""
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(here / "board"))
    assert main(["train", "run.yaml", "--report_to", "tensorboard"]) == 0
    seen = {}
    for path in (here / "board").rglob("*tfevents*"):
        data = path.read_bytes()
        while data:  # length, its checksum, the record, its checksum
            (length,) = struct.unpack("<Q", data[:8])
            for value in Event.FromString(data[12 : 12 + length]).summary.value:
                seen[value.tag] = value.simple_value
            data = data[16 + length :]
    (row,) = load_metrics(here / "runs" / "run" / "metrics.jsonl")
    for name in ("hsd/success_rate", "hsd/kl", "completions/mean_length"):
        assert seen[f"train/{name}"] == pytest.approx(row[name], rel=1e-5)


def test_held_out_questions_are_evaluated_and_drawn(model, here, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr("hsd.viewer.report.plot_curves", lambda path, curves, **kwargs: drawn.append((path, curves)))
    words = ["--data.held_out", "2", "--eval_strategy", "steps", "--eval_steps", "1", "--num_generations_eval", "1"]
    kept = ["--save_total_limit", "1", "--disable_tqdm", "false"]
    for steps in (2, 3):
        assert main(["train", "run.yaml", *words, *kept, "--max_steps", str(steps)]) == 0
    out = here / "runs" / "run"
    rows = load_metrics(out / "held_out.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3] and all(row["eval_hsd/success_rate"] == 0.0 for row in rows)
    assert [row["step"] for row in load_metrics(out / "metrics.jsonl")] == [1, 2, 3]  # evaluations are no steps
    path, curves = drawn[-1]
    assert path == Path("runs/run/training.png") and curves["success"]["held-out questions"] == ([1, 2, 3], [0.0] * 3)
    table = (Path(__file__).parents[3] / "docs" / "tutorial.md").read_text().partition("| file | content |")[2]
    told = {
        name for row in table.partition("\n\n")[0].splitlines() for name in re.findall("`(.*?)`", row.split(" | ")[0])
    }
    there = {path.name + "/" * path.is_dir() for path in out.iterdir()}
    # A method that draws writes texts.jsonl; the picture is not drawn here.
    assert {re.sub(r"-\d+/", "-N/", name) for name in there} == told - {"texts.jsonl", "training.png"}
    assert "step 3/3  success on held-out questions 0" in capsys.readouterr().out
    assert main(["train", "run.yaml", "--check", *words[2:]]) == 2
    assert (
        "data.held_out: expected questions for train.eval_strategy to evaluate on, got none" in capsys.readouterr().err
    )


def test_a_question_that_the_tokenizer_does_not_know_is_one_line(model, capsys):
    Path("questions.jsonl").write_text(json.dumps({"prompt": "What?", "answer": "7"}) + "\n")
    assert main(["train", "run.yaml", "--output_dir", "out"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: prompt: expected text that the tokenizer knows, got ['What?', ")


def test_another_run_is_refused_before_its_model_is_made(here, monkeypatch, capsys):
    begin()
    Path("task.yaml").write_text("task: small_world\ntrain: {use_cpu: true, output_dir: out}\n")
    monkeypatch.setattr(small_world, "warm_start", lambda *args, **kwargs: pytest.fail("made a model"))
    assert main(["train", "task.yaml"]) == 2
    assert "out holds a run with" in capsys.readouterr().err


@pytest.mark.parametrize("targets", ["all_linear", ["norm"], ["model"], ["layers", "q_proj"]])
def test_an_error_about_targets_of_lora_is_one_line(targets):
    """PEFT prints the module, which may be the whole model."""
    with pytest.raises(ValueError, match=r"^model\.lora\.target_modules: expected modules .*") as refused:
        with_adapters(qwen3(**SMALLER), Lora(target_modules=targets))
    assert "\n" not in str(refused.value)
