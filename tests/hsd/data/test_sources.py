"""Row converters on rows as the hub repositories document them, and on the real files where they are."""

import base64
import json
import os
import pickle
import re
import zlib
from pathlib import Path

import pytest

from hsd.data import SOURCES, load, to_dataset
from hsd.data.code_sources import private_tests
from hsd.data.math_sources import Unusable, last_boxed
from hsd.data.prompts import BOXED, bare_question
from hsd.data.rows import check_row, fingerprint
from hsd.data.sources import convert_row, load_source
from hsd.hindsight.groups import last_user_text
from hsd.json_files import write_jsonl

SHARED = Path(os.environ.get("HSD_SHARED_DATA", Path(__file__).parents[3].parent / "shared" / "data"))

GSM8K = {
    "question": "Ann has 3 boxes of 410 pens and finds 4 more. How many pens has she?",
    "answer": "Boxes hold 3*410=<<3*410=1230>>1230 pens.\nIn all <<1230+4=1234>>1,234.\n#### 1,234",
}
MATH = {
    "problem": "What is $\\frac{1}{2}+\\frac{1}{6}$?",
    "level": "Level 2",
    "type": "Algebra",
    "solution": "Not $\\boxed{1}$: it is $\\boxed{\\frac{2}{3}}$.",
}
MATH_500 = {
    "problem": "Find $\\{x\\}$.",
    "solution": "$\\boxed{4}$",
    "answer": "4",
    "subject": "Algebra",
    "level": 3,
    "unique_id": "test/algebra/7.json",
}
NUMINA = {
    "problem": "Solve $x^2=4$.",
    "solution": "...",
    "answer": "\\pm 2",
    "problem_type": "Algebra",
    "question_type": "math-word-problem",
    "problem_is_valid": "Yes",
    "solution_is_valid": "Yes",
    "source": "olympiads",
    "synthetic": False,
}
APPS = {
    "problem_id": 12,
    "question": "Add the two numbers of a line.",
    "solutions": json.dumps(["print(sum(map(int, input().split())))\n", "pass"]),
    "input_output": json.dumps({"inputs": ["1 2\n", ["3", "4"]], "outputs": ["3\n", ["7"]]}),
    "difficulty": "interview",
    "url": "https://example.org/12",
    "starter_code": "",
}
PUBLIC = [{"input": "[1, 2]\n3", "output": "[3]", "testtype": "functional"}]
PRIVATE = [{"input": "[4]\n0", "output": "[]", "testtype": "functional"}]


def packed(tests: list) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


LCB = {
    "question_title": "Pairs",
    "question_content": "Find the pairs.",
    "platform": "leetcode",
    "question_id": "2845",
    "contest_id": "weekly-1",
    "contest_date": "2024-08-17T00:00:00",
    "starter_code": "class Solution:\n    def pairs(self, a: List[int], k: int) -> List[int]:\n        ",
    "difficulty": "easy",
    "public_test_cases": json.dumps(PUBLIC),
    "private_test_cases": packed(PRIVATE),
    "metadata": json.dumps({"func_name": "pairs"}),
}


def converted(raw: dict) -> dict:
    return check_row(convert_row(raw))


def test_gsm8k():
    row = converted(GSM8K)
    assert row["answer"] == "1234"  # no comma: "1,234" is a pair to some verifiers
    assert row["prompt"] == [{"role": "user", "content": f"{GSM8K['question']}\n\n{BOXED}"}]
    assert row["question"] == GSM8K["question"]
    assert row["solution"] == "Boxes hold 3*410=1230 pens.\nIn all 1,234."
    assert row["kind"] == "math"
    assert converted({"question": "x?", "answer": "\\frac{1}{2}"})["answer"] == "\\frac{1}{2}"


def test_math_takes_the_last_box_unless_there_is_an_answer():
    row = converted(MATH)
    assert (row["answer"], row["level"], row["solution"]) == ("\\frac{2}{3}", "2", MATH["solution"])
    row = converted(MATH_500)
    assert (row["answer"], row["level"], row["id"]) == ("4", "3", "test/algebra/7.json")
    with pytest.raises(Unusable, match="no answer"):
        convert_row(MATH | {"solution": "no box"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{a} then \\boxed{ b }.", "b"),
        ("$\\boxed 7$", "7"),
        ("\\fbox{3}", "3"),
        ("\\boxed{\\{1\\}}", "\\{1\\}"),
        ("\\boxed{1", None),
        ("7", None),
    ],
)
def test_last_boxed(text, expected):
    assert last_boxed(text) == expected


def test_numina():
    assert converted(NUMINA)["answer"] == "\\pm 2"
    assert converted(NUMINA)["level"] == "olympiads"
    cot = {"source": "aops", "problem": "1+1?", "solution": "So \\boxed{2}.", "messages": []}
    assert converted(cot)["answer"] == "2"
    for change, reason in (
        ({"answer": "proof"}, "a proof"),
        ({"question_type": "proof"}, "a proof"),
        ({"answer": "notfound"}, "no answer"),
        ({"answer": None}, "no answer"),
        ({"solution_is_valid": "Incomplete"}, "marked invalid"),
    ):
        with pytest.raises(Unusable, match=reason):
            convert_row(NUMINA | change)


@pytest.mark.parametrize(
    ("body", "question", "answer", "text", "expected"),
    [
        ("Ed has 2 cats", "How many?", "145.0", "Ed has 2 cats. How many?", "145"),
        ("If Ed has 2 cats, ", "how many?", 2.5, "If Ed has 2 cats, how many?", "2.5"),
        ("Ed has 2 cats.", "How many?", -3.0, "Ed has 2 cats. How many?", "-3"),
    ],
)
def test_svamp(body, question, answer, text, expected):
    row = converted({"ID": "chal-1", "Body": body, "Question": question, "Answer": answer, "Type": "Sum"})
    assert (row["question"], row["answer"], row["id"], row["level"]) == (text, expected, "chal-1", "Sum")


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (None, Unusable, "no answer"),
        (float("nan"), Unusable, "no answer"),
        (" ", Unusable, "no answer"),
        ([], (Unusable, TypeError), "no answer|answer: expected"),
        ([["2"]], TypeError, r"answer: expected a string or a number, got \[\[?'2'\]"),
        (True, TypeError, "answer: expected a string or a number, got True"),
    ],
)
def test_what_is_no_answer(answer, error, message):
    svamp = {"Body": "Ed has 2 cats", "Question": "How many?", "Answer": answer}
    for raw in ({"question": "x?", "answer": answer}, {"problem": "x?", "answer": answer}, svamp):
        with pytest.raises(error, match=message):
            convert_row(raw)
    with pytest.raises(Unusable, match="no finite answer"):
        convert_row(svamp | {"Answer": "inf"})
    assert converted({"question": "x?", "answer": 7})["answer"] == "7"
    with pytest.raises(Unusable, match="no finite answer"):
        convert_row({"question": "x?", "answer": float("-inf")})
    for blank in ("", " ", BOXED, None):
        with pytest.raises(Unusable, match="no question"):
            convert_row({"question": blank, "answer": "7"})
    with pytest.raises(TypeError, match=r"question: expected a string, got \['x'\]"):
        convert_row({"question": ["x"], "answer": "7"})


def test_humaneval():
    raw = {
        "task_id": "HumanEval/0",
        "prompt": 'def one():\n    """Gives 1."""\n',
        "canonical_solution": "    return 1\n",
        "entry_point": "one",
        "test": "def check(candidate):\n    assert candidate() == 1\n",
    }
    row = converted(raw)
    assert json.loads(row["tests"]) == {k: raw[k] for k in ("test", "entry_point", "prompt")}
    assert row["answer"] == '```python\ndef one():\n    """Gives 1."""\n    return 1\n```'
    assert (row["kind"], row["id"]) == ("code", "HumanEval/0")
    assert "return 1" not in last_user_text(row["prompt"]) and raw["prompt"].strip() in last_user_text(row["prompt"])


def test_apps():
    row = converted(APPS)
    assert json.loads(row["tests"]) == json.loads(APPS["input_output"])
    assert row["answer"] == "```python\nprint(sum(map(int, input().split())))\n```"
    assert (row["level"], row["id"], row["kind"]) == ("interview", "12", "code")
    assert "stdin" in last_user_text(row["prompt"])
    for empty in ("", json.dumps({"inputs": [], "outputs": []})):
        with pytest.raises(Unusable, match="no tests"):
            convert_row(APPS | {"input_output": empty})
    assert converted(APPS | {"solutions": ""})["answer"] == ""


def test_apps_functions_and_their_huge_integers():
    cases = '{"fn_name": "grow", "inputs": [[2]], "outputs": [[' + "9" * 5000 + "]]}"  # Python stops at 4,300 digits
    row = converted(APPS | {"input_output": cases, "starter_code": "def grow(n):\n\t"})
    assert row["tests"] == cases
    assert "def grow(n):" in last_user_text(row["prompt"]) and "stdin" not in last_user_text(row["prompt"])
    assert "`grow`" in last_user_text(converted(APPS | {"input_output": cases, "starter_code": ""})["prompt"])


def test_livecodebench():
    row = converted(LCB)
    expected = {"inputs": ["[1, 2]\n3", "[4]\n0"], "outputs": ["[3]", "[]"], "fn_name": "pairs"}
    assert json.loads(row["tests"]) == expected
    assert (row["date"], row["level"], row["id"], row["answer"]) == ("2024-08-17", "easy", "2845", "")
    assert "class Solution:" in last_user_text(row["prompt"])
    stdin = [{"input": "1\n", "output": "2\n", "testtype": "stdin"}]
    row = converted(
        LCB | {"public_test_cases": json.dumps(stdin), "private_test_cases": "[]", "starter_code": "", "metadata": "{}"}
    )
    assert json.loads(row["tests"]) == {"inputs": ["1\n"], "outputs": ["2\n"]}
    with pytest.raises(Unusable, match="no tests"):
        convert_row(LCB | {"public_test_cases": "[]", "private_test_cases": ""})


def test_private_tests_plain_packed_and_hostile():
    assert private_tests(json.dumps(PRIVATE)) == private_tests(packed(PRIVATE)) == PRIVATE

    class Evil:
        def __reduce__(self):
            return os.system, ("true",)

    evil = base64.b64encode(zlib.compress(pickle.dumps(Evil()))).decode()
    with pytest.raises(pickle.UnpicklingError, match="expected a pickled string"):
        private_tests(evil)


def test_a_question_has_the_instruction_once():
    carried = "What is 2+2?\nPlease reason step by step, and put your final answer within \\boxed{}."
    assert bare_question(carried) == "What is 2+2?"
    assert bare_question(f"{BOXED} What is 2+2?") == "What is 2+2?"
    assert bare_question("Put your final answer in a box, in \\boxed{} form.").endswith("form.")
    row = converted({"problem": carried, "answer": "4"})
    assert last_user_text(row["prompt"]).count("boxed") == 1 and row["question"] == "What is 2+2?"


def test_ready_rows_and_their_checks():
    row = converted({"prompt": "1+1=", "answer": "2", "mine": 3})
    assert row == {"prompt": "1+1=", "answer": "2", "mine": 3, "kind": "math"}
    for answer, expected in (("", ""), (None, ""), ([], ""), ("x", "x")):  # a program's may be missing
        row = converted({"prompt": "f", "answer": answer, "tests": "{}"})
        assert (row["kind"], row["answer"]) == ("code", expected)
    for change, error, message in (
        ({"answer": {"a": 2}}, TypeError, "answer: expected a string"),
        ({"answer": "", "kind": "math"}, Unusable, "no answer"),
        ({"answer": None}, Unusable, "no answer"),
        ({"prompt": " "}, Unusable, "no question"),
        ({"tests": ["x"]}, TypeError, "tests: expected a string"),
        ({"prompt": [{"role": "assistant", "content": "x"}]}, TypeError, "prompt: expected"),
        ({"prompt": []}, TypeError, "prompt: expected"),
        ({"prompt": [{"content": "x"}, {"role": "user", "content": "y"}]}, TypeError, "prompt: expected"),
        ({"prompt": ["x", {"role": "user", "content": "y"}]}, TypeError, "prompt: expected"),
        ({"kind": "poetry"}, ValueError, "kind: expected"),
    ):
        with pytest.raises(error, match=message):
            convert_row({"prompt": "1+1=", "answer": "2"} | change)
    assert converted({"prompt": "1+1=", "answer": 2, "tests": None}) == {
        "prompt": "1+1=",
        "answer": "2",
        "kind": "math",
    }
    assert converted({"prompt": "1+1=", "answer": ["2", 2, "two"]})["answer"] == ["2", "two"]
    said = "columns: expected 'question' and 'answer', or 'prompt' and 'answer', or .*, got 'the_label', 'text'"
    with pytest.raises(ValueError, match=said):
        convert_row({"text": "x", "the_label": 1})  # what may be an answer stands first


VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [{"role": "user", "content": "How many? Output the final answer after ####."}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "72"},
    "extra_info": {"split": "train", "index": 5, "question": "How many?", "answer": "36 + 36 = 72\n#### 72"},
}


def test_verl():
    row = converted(VERL)
    assert row == {
        "prompt": VERL["prompt"],
        "answer": "72",
        "question": "How many?",
        "solution": "36 + 36 = 72\n#### 72",
        "source": "openai/gsm8k",
        "id": "5",
        "kind": "math",
    }
    bare = converted({"prompt": "2+2?", "reward_model": json.dumps({"ground_truth": 4})})  # as a CSV cell has it
    assert (bare["prompt"], bare["answer"], bare["question"]) == ("2+2?", "4", "2+2?")
    several = converted(VERL | {"reward_model": {"ground_truth": ["72", "72.0"]}})
    assert several["answer"] == ["72", "72.0"]
    tests = json.dumps({"inputs": ["1\n"], "outputs": ["2\n"]})
    for truth in (tests, json.loads(tests)):
        row = converted(VERL | {"reward_model": {"ground_truth": truth}, "extra_info": None})
        assert (row["kind"], row["tests"], row["answer"]) == ("code", tests, "")
    for change, error, said in (
        ({"reward_model": {"style": "model"}}, Unusable, "no answer"),
        ({"reward_model": {"ground_truth": None}}, Unusable, "no answer"),
        ({"reward_model": "72"}, TypeError, "reward_model, extra_info: expected mappings"),
        ({"prompt": []}, TypeError, "prompt: expected"),
        ({"prompt": None}, ValueError, "row: expected a column 'prompt'"),
    ):
        with pytest.raises(error, match=said):
            convert_row(VERL | change)
    assert (
        converted(VERL | {"reward_model": {"ground_truth": "[1, 2]"}})["answer"] == "[1, 2]"
    )  # an answer that is JSON


def test_several_accepted_answers_make_the_column_one_of_lists(tmp_path):
    write_jsonl(tmp_path / "x.jsonl", [{"question": "a?", "answer": ["1", "one"]}, {"question": "b?", "answer": "2"}])
    rows = load(str(tmp_path / "x.jsonl"))
    assert [r["answer"] for r in rows] == [["1", "one"], ["2"]]
    assert to_dataset(rows)["answer"][:] == [["1", "one"], ["2"]]
    write_jsonl(tmp_path / "again.jsonl", rows)
    assert [r["answer"] for r in load(str(tmp_path / "again.jsonl"))] == [["1", "one"], ["2"]]


def test_columns_with_a_trainers_own_names_are_left_out_and_said(tmp_path):
    row = {"prompt": "1+1=", "answer": "2", "completions": ["x"], "prompts": "y", "mine": 1}
    write_jsonl(tmp_path / "x.jsonl", [row])
    loaded = load_source(str(tmp_path / "x.jsonl"))
    assert loaded.rows[0].keys() == {"prompt", "answer", "kind", "source", "id", "mine"}
    assert "without the column 'completions': a trainer uses this name itself" in str(loaded)
    assert "'prompts'" in str(loaded) and "mine" not in str(loaded)


def test_files_and_errors(tmp_path):
    path = tmp_path / "mixed.jsonl"
    assert write_jsonl(path, [GSM8K, MATH, NUMINA | {"answer": "proof"}, APPS]) == 4
    loaded = load_source(str(path))
    assert [r["id"] for r in loaded.rows] == ["0", "1", "12"]
    assert {r["source"] for r in loaded.rows} == {"mixed.jsonl"}
    assert (loaded.name, loaded.total, loaded.unusable) == ("mixed.jsonl", 4, {"a proof": 1})
    assert str(loaded) == "mixed.jsonl: 3 of 4 rows, 1 left out: a proof"
    assert (len(load(str(path), limit=2)), load_source(str(path), limit=2).total) == (2, 4)
    write_jsonl(tmp_path / "rows.jsonl.gz", loaded.rows)
    assert load(str(tmp_path / "rows.jsonl.gz")) == loaded.rows
    assert fingerprint(loaded.rows) != fingerprint(loaded.rows[::-1])
    path.write_text('{"question": "x", "answer": "1"}\n[]\n')
    with pytest.raises(ValueError, match="line 2: expected a JSON object"):
        load(str(path))
    path.write_text('{"question": "x", "answer": "1"}\n\n{"problem": "x"}\n')
    with pytest.raises(ValueError, match=r"mixed.jsonl, row 2: columns: expected 'question' and 'answer', .*'problem'"):
        load(str(path))
    for name, message in (("gsm9k", "expected a file, one of gsm8k"), ("gsm8k:dev", "expected a split of gsm8k")):
        with pytest.raises(ValueError, match=message):
            load(name)
    with pytest.raises(ValueError, match="split: expected None for a file"):
        load(str(path), "train")
    with pytest.raises(ValueError, match=r"^split: expected 'train', as in 'gsm8k:train', or None, got 'test'"):
        load("gsm8k:train", "test")
    with pytest.raises(ValueError, match="limit"):
        load(str(path), limit=0)


@pytest.mark.parametrize(
    "row",
    [
        APPS | {"solutions": '[{"code": "x"}]'},
        APPS | {"input_output": "[1]"},
        LCB | {"private_test_cases": base64.b64encode(b"no zlib").decode()},
        LCB | {"private_test_cases": base64.b64encode(zlib.compress(b"no pickle")).decode()},
        LCB | {"private_test_cases": base64.b64encode(zlib.compress(b"")).decode()},
        LCB | {"public_test_cases": '["x"]'},
        {"question": 3, "answer": "4"},
    ],
)
def test_a_row_that_cannot_be_read_is_named(tmp_path, row):
    write_jsonl(tmp_path / "x.jsonl", [GSM8K, row])
    with pytest.raises(ValueError, match=r"^x.jsonl, row 2: "):
        load(str(tmp_path / "x.jsonl"))


def test_hub_names(monkeypatch, tmp_path):
    """What is asked of the hub, which cannot be reached from here."""
    asked = []

    def load_dataset(repo, config, split):
        asked.append((repo, config, split))
        return {"openai/gsm8k": [GSM8K], "EleutherAI/hendrycks_math": [MATH]}[repo]

    def download(repo, file, repo_type):
        asked.append((repo, file, repo_type))
        return str(tmp_path / file)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert load_source("GSM8K").name == "openai/gsm8k main test"
    assert load_source("openai/gsm8k:train").name == load_source("gsm8k", "train").name == "openai/gsm8k main train"
    assert asked == [("openai/gsm8k", "main", "test")] + 2 * [("openai/gsm8k", "main", "train")]
    assert load_source("gsm8k:train", "train").name == "openai/gsm8k main train"
    asked.clear()
    assert len(load("math")) == 7  # subjects
    assert asked[0] == ("EleutherAI/hendrycks_math", "algebra", "test")
    asked.clear()
    for n in ("", 2, 3):
        write_jsonl(tmp_path / f"test{n}.jsonl", [LCB | {"question_id": f"q{n}"}])
    loaded = load_source("livecodebench:release_v3")
    assert [r["id"] for r in loaded.rows] == ["q", "q2", "q3"]
    assert loaded.name == "livecodebench/code_generation_lite release_v3"
    assert asked[0] == ("livecodebench/code_generation_lite", "test.jsonl", "dataset")
    assert SOURCES["livecodebench"].files["release_v5"][-1] == "test5.jsonl"


def test_a_dataset_for_the_trainer():
    dataset = to_dataset([converted(GSM8K), converted(APPS)])
    assert {"prompt", "answer", "tests", "kind"} <= set(dataset.column_names)
    assert dataset[0]["tests"] is None and dataset[1]["prompt"] == converted(APPS)["prompt"]
    with pytest.raises(ValueError, match="all prompts"):
        to_dataset([converted(GSM8K), {"prompt": "text", "answer": "1"}])


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is absent")
@pytest.mark.parametrize(
    ("file", "count"),
    [
        ("gsm8k_train.jsonl", 7473),
        ("gsm8k_test.jsonl", 1319),
        ("svamp_test.jsonl", 1000),
        ("math500.jsonl", 500),
        ("aime24.jsonl", 30),
        ("aime25.jsonl", 30),
        ("HumanEval.jsonl.gz", 164),
    ],
)
def test_the_real_files(file, count):
    loaded = load_source(str(SHARED / file))
    assert (len(loaded.rows), loaded.total) == (count, count)
    for row in map(check_row, loaded.rows):
        assert row["question"] and row["answer"]
        assert last_user_text(row["prompt"]).count(BOXED) == (row["kind"] == "math")
        if "gsm8k" in file or "svamp" in file:
            assert re.fullmatch(r"-?\d+", row["answer"])
            assert "<<" not in row.get("solution", "")
