"""A benchmark from questions to table: seeds, resume, statuses, and the commands that do it."""

import argparse
import json
import os
import random
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_runs import SMALLER, qwen3

from hsd.cli import data as cli_data
from hsd.cli import eval as cli_eval
from hsd.cli.__main__ import main
from hsd.data import load
from hsd.data.sources import Loaded
from hsd.evaluate.benchmark import Request, evaluate, judge
from hsd.evaluate.engines import Engine
from hsd.evaluate.sampling import Sampling
from hsd.evaluate.table import markdown
from hsd.json_files import read_jsonl, write_jsonl
from hsd.tasks import small_world

TOKENIZER = small_world.build_tokenizer()
EOS, DIGITS = TOKENIZER.eos_token_id, [TOKENIZER.convert_tokens_to_ids(str(d)) for d in range(10)]
ROWS = [{"prompt": f"{i}+1=", "answer": str((i + 1) % 10), "id": f"q{i}", "kind": "math"} for i in range(7)]
DATA = Loaded(ROWS, "sums test", 20, {"a proof": 2})
SAMPLING = Sampling(max_new_tokens=3, batch_size=4)


class Killed(Exception):
    pass


def engine(calls: list | None = None, die_at: int | None = None) -> Engine:
    """Random digits, a function of the seed alone; every fifth rollout is cut."""
    calls = [] if calls is None else calls

    def generate(prompt_ids, sampling, seed):
        if len(calls) == die_at:
            raise Killed
        calls.append((len(prompt_ids), seed))
        rng = random.Random(seed)
        return [[rng.choice(DIGITS)] + ([EOS] if rng.random() < 0.8 else [DIGITS[0]]) for _ in prompt_ids]

    return Engine("stand-in", TOKENIZER, [EOS], generate)


def first_digit(completions, answer, log_extra, **columns):
    """Right if the first digit is the answer; fails on a 9, as a verifier may."""
    texts = list(completions)
    log_extra("math_status", ["verifier_failed" if t[0] == "9" else "judged" for t in texts])
    return [None if t[0] == "9" else float(t[0] == a) for t, a in zip(texts, answer, strict=True)]


def run(folder: Path, *, samples: int = 3, rewards=None, **kwargs):
    asked = {"sampling": SAMPLING, "samples": samples, "seed": 5}
    asked |= {f.name: kwargs.pop(f.name) for f in fields(Request) if f.name in kwargs}
    settings = {"engine": engine(), "model": "m", "data": DATA} | kwargs
    return evaluate(rewards=rewards or {"math": first_digit}, folder=folder, request=Request(**asked), **settings)


def test_the_result(tmp_path):
    calls: list = []
    result = run(tmp_path, engine=engine(calls))
    records = list(read_jsonl(tmp_path / "samples.jsonl"))
    assert [(r["row"], r["sample"]) for r in records] == [(i, j) for i in range(7) for j in range(3)]
    assert [n for n, _ in calls] == [4, 4, 4, 4, 4, 1] and len({seed for _, seed in calls}) == 6
    for record in records:
        expected = None if record["completion"][0] == "9" else float(record["completion"][0] == record["answer"])
        assert record["reward"] == expected
        assert record["status"] == ("verifier_failed" if expected is None else "judged")
        assert record["truncated"] is (record["length"] == 2 and len(record["completion"]) == 2)
    failures = sum(r["reward"] is None for r in records)
    assert result["verifier_failures"] == failures > 0
    assert result["statuses"] == {"verifier_failed": failures, "judged": 21 - failures}
    assert result["truncated"] == pytest.approx(sum(r["truncated"] for r in records) / 21) and result["truncated"] > 0
    assert result["mean_length"] == 2
    assert (result["subset"], result["rows"], result["rows_of_the_subset"]) == ("sums test", 7, 20)
    assert result["rows_unusable"] == {"a proof": 2} and result["verifiers"] == {"math": "first_digit"}
    assert json.loads((tmp_path / "result.json").read_text()) == json.loads(json.dumps(result))
    table = markdown([result])
    assert f"| sums test | 7 of 20 | 3 | {result['pass@1']:.3f} [" in table and "pass@2: " in table
    assert f"{failures} of 21 (pass@1 {result['pass@1_bounds'][0]:.3f} if wrong" in table
    assert "scored by first_digit" in table and "temperature 1, top-p 1" in table


@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("torn", ["", '{"row": 1, "sam', '{"row": 99}\n{"row'])
def test_a_killed_evaluation_ends_as_an_uninterrupted_one(tmp_path, after, torn):
    whole = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "cut", engine=engine(die_at=after))
    with open(tmp_path / "cut" / "samples.jsonl", "a") as file:
        file.write(torn)  # killed in the middle of a line, or of a batch
    calls: list = []
    assert run(tmp_path / "cut", engine=engine(calls)) == whole
    assert len(calls) == 6 - after  # what was done is not done again
    samples = [(tmp_path / name / "samples.jsonl").read_bytes() for name in ("whole", "cut")]
    assert samples[0] == samples[1]
    assert run(tmp_path / "cut", engine=engine(die_at=0)) == whole  # a finished one asks for nothing


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"seed": 6}, "seed"),
        ({"samples": 2}, "samples"),
        ({"model": "other"}, "model"),
        ({"sampling": Sampling(4, batch_size=4)}, "sampling"),
        ({"data": Loaded([ROWS[0] | {"answer": "3"}, *ROWS[1:]], "sums test", 20, {"a proof": 2})}, "fingerprint"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs"),
        ({"rewards": {"math": lambda **kwargs: []}}, "verifiers"),
    ],
)
def test_other_settings_do_not_go_into_the_same_folder(tmp_path, change, key):
    run(tmp_path)
    with pytest.raises(ValueError, match=f"holds an evaluation with other settings .*{key}: "):
        run(tmp_path, **change)


@pytest.mark.parametrize("lines", ["", '{"row": 0, "sam'])
def test_an_evaluation_that_has_not_begun_may_be_corrected(tmp_path, lines):
    with pytest.raises(Killed):
        run(tmp_path, engine=engine(die_at=0))
    (tmp_path / "samples.jsonl").write_text(lines)
    assert run(tmp_path, seed=6)["seed"] == 6


@pytest.mark.parametrize(
    "change", [{"row": 1}, {"sample": "0"}, {"completion": None}, {"reward": "1"}, {"status": {}}, {"truncated": 0}]
)
def test_samples_of_something_else_are_refused(tmp_path, change):
    run(tmp_path)
    records = list(read_jsonl(tmp_path / "samples.jsonl"))
    write_jsonl(tmp_path / "samples.jsonl", [records[0] | change, *records[1:]])
    with pytest.raises(ValueError, match=r"samples.jsonl: expected sample 0 of row 0 as number 1, got"):
        run(tmp_path)
    write_jsonl(tmp_path / "samples.jsonl", [*records, records[-1] | {"row": 7, "sample": 0}])
    with pytest.raises(ValueError, match=r"samples.jsonl: expected .* as number 22, got"):
        run(tmp_path)


def test_samples_without_their_settings_are_refused(tmp_path):
    run(tmp_path)
    before = (tmp_path / "samples.jsonl").read_bytes()
    (tmp_path / "settings.json").unlink()
    for change in ({}, {"seed": 6}, {"judge_again": True}):
        with pytest.raises(ValueError, match=r"out: .* holds samples without the settings.json they were made with"):
            run(tmp_path, **change)
    assert (tmp_path / "samples.jsonl").read_bytes() == before


def test_settings_that_cannot_be_read_are_named(tmp_path):
    run(tmp_path)
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"settings.json: expected a JSON object, got '{'"):
        run(tmp_path)


def test_a_model_written_anew_is_another_model(tmp_path):
    weights = tmp_path / "model" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"1")
    run(tmp_path / "out", model=str(weights.parent))
    run(tmp_path / "out", model=str(weights.parent))
    os.utime(weights, (1, 1))
    with pytest.raises(ValueError, match="model_modified"):
        run(tmp_path / "out", model=str(weights.parent))


def test_judging_again_samples_nothing_twice(tmp_path):
    def nothing_fails(completions, answer, **columns):
        return [float(c[0] == a) for c, a in zip(completions, answer, strict=True)]

    expected = run(tmp_path / "new", rewards={"math": nothing_fails})
    with pytest.raises(Killed):
        run(tmp_path / "old", engine=engine(die_at=4))
    calls: list = []
    again = {"rewards": {"math": nothing_fails}, "judge_again": True}
    assert run(tmp_path / "old", engine=engine(calls), **again) == expected
    assert len(calls) == 2
    assert run(tmp_path / "old", engine=engine(die_at=0), rewards={"math": nothing_fails}) == expected
    samples = [(tmp_path / name / "samples.jsonl").read_bytes() for name in ("new", "old")]
    assert samples[0] == samples[1]
    with pytest.raises(ValueError, match="seed: 5 there, 6 now"):
        run(tmp_path / "old", seed=6, **again)


def test_each_kind_has_its_verifier(tmp_path):
    rows = [ROWS[0], {"prompt": "9+", "answer": "", "tests": '{"inputs": []}', "kind": "code"}, ROWS[1]]
    seen = {}

    def code(tests, completions, prompts, **columns):
        seen["code"] = (tests, prompts)
        return [1.0] * len(completions)

    def math(answer, **columns):
        seen["math"] = answer
        return [0.0] * len(answer)

    data = Loaded(rows, "mixed", 3, {})
    result = run(tmp_path / "a", data=data, rewards={"math": math, "code": code}, samples=1)
    assert seen == {"code": (['{"inputs": []}'], ["9+"]), "math": ["1", "2"]}
    assert result["pass@1"] == pytest.approx(1 / 3) and result["statuses"] == {}
    with pytest.raises(ValueError, match=r"expected a function for the kinds \['code'\]"):
        run(tmp_path / "b", data=data)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_reward_function_scores_each_sample(tmp_path, count):
    with pytest.raises(ValueError, match=rf"^rewards\['math'\]: expected 2 scores, got {count}$"):
        judge(ROWS[:2], ["1", "2"], {"math": lambda **columns: [1.0] * count})
    assert judge(ROWS[:2], ["1", "2"], {"math": lambda **columns: [1.0] * 2}) == [(1.0, None)] * 2


def test_greedy_has_one_sample(tmp_path):
    with pytest.raises(ValueError, match="1 at temperature 0"):
        run(tmp_path, sampling=Sampling(3, temperature=0.0))
    result = run(tmp_path, sampling=Sampling(3, temperature=0.0), samples=1)
    assert "greedy" in markdown([result])


def test_prompts_are_chats_where_the_tokenizer_has_a_template(tmp_path):
    chat = [{"prompt": [{"role": "user", "content": "1+1="}], "answer": "2", "kind": "math"}]
    seen = []

    def generate(prompt_ids, sampling, seed):
        seen.extend(prompt_ids)
        return [[EOS] for _ in prompt_ids]

    def reward(completions, **columns):
        return [0.0] * len(completions)

    data = Loaded(chat, "one", 1, {})
    text = run(tmp_path / "a", engine=Engine("x", TOKENIZER, [EOS], generate), data=data, rewards={"math": reward})
    assert text["prompt_form"] == "text" and list(seen[0]) == TOKENIZER("1+1=")["input_ids"]
    tokenizer = small_world.build_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}{{ sign }}"
    kwargs = {"chat_template_kwargs": {"sign": "+"}, "rewards": {"math": reward}, "data": data}
    result = run(tmp_path / "b", engine=Engine("x", tokenizer, [EOS], generate), **kwargs)
    assert result["prompt_form"] == "chat" and list(seen[-1]) == TOKENIZER("1+1=+")["input_ids"]


def parse(module, *argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    assert isinstance(module.HELP, str)
    return parser.parse_args(argv)


def test_hsd_eval(tmp_path, monkeypatch, capsys):
    write_jsonl(tmp_path / "sums.jsonl", [{"prompt": f"{i}+1=", "answer": f"{i + 1}"} for i in range(6)])
    write_jsonl(tmp_path / "more.jsonl", [{"prompt": "5+1=", "answer": "6"}])
    monkeypatch.setattr("hsd.evaluate.engines.load_engine", lambda name, model, dtype: engine())
    argv = ["--model", "m", "--data", str(tmp_path / "sums.jsonl"), str(tmp_path / "more.jsonl"), "--limit", "4"]
    argv += ["--max-new-tokens", "3", "--reward", "number", "--out", str(tmp_path / "out")]
    assert cli_eval.run(parse(cli_eval, *argv)) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(r["subset"], r["rows"], r["rows_of_the_subset"]) for r in results] == [
        ("sums.jsonl", 4, 6),
        ("more.jsonl", 1, 1),
    ]
    assert results[0]["verifiers"] == {"math": "number_reward"}
    table = (tmp_path / "out" / "results.md").read_text()
    assert table in capsys.readouterr().out and table.count("\n| ") == 3
    assert (tmp_path / "out" / "sums" / "samples.jsonl").exists()
    assert cli_eval.slug("openai/gsm8k main test") == "openai-gsm8k-main-test"
    assert cli_eval.slug("HumanEval.jsonl.gz") == "HumanEval"


def test_hsd_eval_says_what_is_wrong_before_it_loads_a_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hsd.evaluate.engines.load_engine", lambda *args: pytest.fail("loaded a model"))
    with pytest.raises(ValueError, match="expected a file, one of gsm8k"):
        cli_eval.run(parse(cli_eval, "--model", "m", "--data", "nonsense", "--out", str(tmp_path)))
    for name in ("a", "a.b"):
        write_jsonl(tmp_path / name / "x.jsonl", [{"prompt": "5+1=", "answer": "6"}])
    good = ["--model", "m", "--data", str(tmp_path / "a" / "x.jsonl"), "--out", str(tmp_path / "out")]
    for words, said in (
        (["--samples", "0"], "samples: expected a positive number"),
        (["--limit", "0"], "^--limit: expected a positive number of questions, got 0"),
        (["--seed", str(2**60)], "seed: expected"),
        (["--max-new-tokens", "0"], "max_new_tokens: expected"),
        (
            ["--data", *(str(tmp_path / n / "x.jsonl") for n in ("a", "a.b"))],
            "--data: expected one data set for .*/x, ",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            cli_eval.run(parse(cli_eval, *good, *words))
    for words in (["--dtype", "flaot32"], ["--chat-template-kwargs", "[1]"], ["--chat-template-kwargs", "{"]):
        assert main(["eval", *good, *words]) == 2
        assert f"argument {words[0]}: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="vllm is not installed"):
        cli_eval.run(parse(cli_eval, "--model", "m", "--data", "svamp", "--engine", "vllm", "--out", str(tmp_path)))


def test_hsd_data_from_raw_rows_to_a_training_file(tmp_path, capsys):
    files = SimpleNamespace(**{n: tmp_path / f"{n}.jsonl" for n in ("raw", "code", "eval", "clean", "bins", "mixed")})
    questions = [f"Bo has {i} red and {i + 3} green apples, how many in all?" for i in range(10)]
    write_jsonl(files.raw, [{"question": q, "answer": f"#### {2 * i + 3}"} for i, q in enumerate(questions)])
    write_jsonl(files.eval, [{"problem": questions[4], "answer": "11"}])
    write_jsonl(
        files.code,
        [
            {
                "prompt": "p",
                "answer": "",
                "tests": "{}",
                "kind": "code",
                "level": "easy" if i % 2 else "hard",
                "date": f"2024-0{i + 1}-01",
            }
            for i in range(8)
        ],
    )
    report = tmp_path / "report.json"
    argv = ["decontaminate", str(files.raw), "--against", str(files.eval), "--out", str(files.clean)]
    assert cli_data.run(parse(cli_data, *argv, "--report", str(report))) == 0
    assert "exact_stem: 1 removed" in capsys.readouterr().out
    kept = list(read_jsonl(files.clean))
    assert len(kept) == 9 and questions[4] not in [r["question"] for r in kept]
    assert json.loads(report.read_text())["pairs"][0]["against_text"] == questions[4]

    rows = load(str(files.clean))
    samples = [{"row": i, "id": r["id"], "answer": r["answer"], "reward": float(i < 3)} for i, r in enumerate(rows)]
    write_jsonl(tmp_path / "samples.jsonl", samples)
    argv = ["bins", str(files.clean), "--samples", str(tmp_path / "samples.jsonl"), "--out", str(files.bins)]
    assert cli_data.run(parse(cli_data, *argv)) == 0
    assert capsys.readouterr().out.strip() == "easy: 3, hard: 6"

    argv = ["prepare", str(files.code), "--level", "easy", "--since", "2024-03-01", "--before", "2024-08-01"]
    assert cli_data.run(parse(cli_data, *argv, "--out", str(tmp_path / "some.jsonl"))) == 0
    assert [r["date"] for r in read_jsonl(tmp_path / "some.jsonl")] == ["2024-04-01", "2024-06-01"]
    with pytest.raises(ValueError, match="date: the rows of raw"):
        cli_data.run(parse(cli_data, "prepare", str(files.raw), "--since", "2024-01-01", "--out", "x"))

    argv = ["mix", str(files.bins), str(files.code), "--ratio", "4:1", "--out", str(files.mixed)]
    assert cli_data.run(parse(cli_data, *argv)) == 0
    kinds = [r["kind"] for r in load(str(files.mixed))]
    assert kinds.count("math") == 9 and kinds.count("code") == 2
    with pytest.raises(ValueError, match="expected integers such as 4:1"):
        cli_data.run(parse(cli_data, "mix", str(files.raw), "--ratio", "4:x", "--out", "x"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prepare", "DATA", "--limit", "0"], "--limit: expected a positive number"),
        (["prepare", "DATA", "--limit", "-2"], "--limit: expected a positive number"),
        (["prepare", "DATA", "--since", "soon"], "--since: expected a day such as 2024-08-01, got 'soon'"),
        (["prepare", "DATA", "--before", "2024-13-01"], "--before: expected a day"),
        (["prepare", "DATA", "--level", "hard"], "expected to leave a row of q.jsonl, got none"),
        (["prepare", "DATA", "--since", "2025-01-01"], "expected to leave a row of q.jsonl, got none"),
        (["mix", "DATA", "--ratio", "1", "--length", "0"], "--length: expected a positive number"),
        (["decontaminate", "DATA", "--against", "DATA", "--report", "OUT"], "--report: expected another file"),
        (["decontaminate", "DATA", "--against", "DATA", "--report", "HERE"], "--report: expected a file"),
        (["decontaminate", "DATA", "--against", "DATA", "--out", "HERE", "--report", "R"], "--out: expected a file"),
    ],
)
def test_hsd_data_leaves_no_file_where_it_has_nothing_to_write(tmp_path, words, said):
    row = {"prompt": "p", "answer": "1", "level": "easy", "date": "2024-08-01"}
    paths = {"DATA": tmp_path / "q.jsonl", "OUT": tmp_path / "out.jsonl", "HERE": tmp_path}
    write_jsonl(paths["DATA"], [row])
    words = [str(paths.get(word, word)) for word in words]
    words += [] if "--out" in words else ["--out", str(paths["OUT"])]
    with pytest.raises(ValueError, match=said):
        cli_data.run(parse(cli_data, *words))
    assert [p.name for p in tmp_path.iterdir()] == ["q.jsonl"]


def test_a_report_is_whole_or_absent(tmp_path):
    row = {"prompt": "a lone surrogate \ud800", "answer": "1"}  # which UTF-8 cannot hold
    (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "report.json").write_text("before")
    words = ["decontaminate", str(tmp_path / "q.jsonl"), "--against", str(tmp_path / "q.jsonl")]
    with pytest.raises(UnicodeEncodeError):
        cli_data.run(parse(cli_data, *words, "--out", str(tmp_path / "o"), "--report", str(tmp_path / "report.json")))
    assert (tmp_path / "report.json").read_text() == "before"
    assert not list(tmp_path.glob("*.part"))


def test_hsd_eval_of_a_run_takes_all_from_it(tmp_path, monkeypatch, capsys):
    """Model, held-out questions, reward, success, sampling; a reward of one's own, called as in training. The model's
    card gets the result without the folder's name, which may hold a comma."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("own_reward_of_eval.py").write_text(
        "def f(completions, prompts, completion_ids, answer, **columns):\n"
        "    assert all(isinstance(c, str) for c in completions) and all(len(i) <= 3 for i in completion_ids)\n"
        "    return [0.5 for _ in completions]\n"
        "def g(completions, answer, **columns):\n"
        "    return [None for _ in completions]\n"
    )
    write_jsonl(Path("q.jsonl"), [{"prompt": f"{i}+1=", "answer": f"{i + 1}"} for i in range(6)])
    qwen3(0, **SMALLER).save_pretrained("my, run/model")
    TOKENIZER.save_pretrained("my, run/model")
    Path("my, run/config.yaml").write_text(
        "model: {path: gone}\ndata: {path: q.jsonl, held_out: 4}\nreward: own_reward_of_eval:f\n"
        "train: {max_completion_length: 3, temperature: 0.7, success_reward: 0.5, bf16: false, use_cpu: true,\n"
        "  with_peer_template: '[{answer};{demonstration}]', answer_only_template: '[{answer};]'}\n"
    )
    Path("my, run/model/README.md").write_text("# card\n")
    for named in ("my, run", "my, run/model"):
        assert main(["eval", named, "--samples", "2"]) == 0
    (result,) = json.loads(Path("my, run/eval-0/results.json").read_text())
    assert (result["rows"], result["samples"], result["pass@1"]) == (4, 2, 1.0)
    assert result["model"] == "my, run/model" and set(result["verifiers"].values()) == {"f"}
    assert (result["sampling"]["max_new_tokens"], result["sampling"]["temperature"]) == (3, 0.7)
    assert "held-out questions" in capsys.readouterr().out
    card = Path("my, run/model/README.md").read_text()
    assert card.startswith("# card\n\n## Success\n\ntransformers") and "| 1.000 [" in card and "my, run" not in card
    words = ["--data", "q.jsonl", "--reward", "own_reward_of_eval:g", "--out", "other"]
    assert main(["eval", "my, run", *words, "--limit", "3"]) == 0
    (result,) = json.loads(Path("other/results.json").read_text())
    assert (result["rows"], result["verifier_failures"]) == (3, 3)
    assert main(["eval", "--model", "my, run/model", *words, "--max-new-tokens", "3"]) == 2  # not --limit 3
    assert main(["eval", "--model", "my, run/model", "--out", "x"]) == 2
    assert "--data: expected a value, or a run" in capsys.readouterr().err
