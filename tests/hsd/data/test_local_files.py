"""Local files: what is read, JSON Lines, CSV and Parquet alike, and how a file that is something else is named."""

import csv
import gzip

import pyarrow
import pyarrow.parquet
import pytest

from hsd.data import load
from hsd.data.sources import load_source
from hsd.json_files import read_jsonl, write_jsonl

ROWS = [{"question": 'How\u2028many, "really"?', "answer": "1,234"}, {"question": "And\nhere \u00e9?", "answer": "2"}]


def as_jsonl(path, rows):
    write_jsonl(path, rows)


def as_csv(path, rows, delimiter=",", encoding="utf-8"):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def as_parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("x.jsonl", as_jsonl),
        ("x.jsonl.gz", as_jsonl),
        ("x.csv", as_csv),
        ("x.CSV", as_csv),
        ("x.csv.gz", as_csv),
        ("x.csv", lambda path, rows: as_csv(path, rows, encoding="utf-8-sig")),
        ("x.tsv", lambda path, rows: as_csv(path, rows, "\t")),
        ("x.parquet", as_parquet),
    ],
)
def test_the_same_rows_whatever_the_file(tmp_path, name, write):
    write(tmp_path / name, ROWS)
    loaded = load_source(str(tmp_path / name))
    assert [(r["question"], r["answer"]) for r in loaded.rows] == [(r["question"], r["answer"]) for r in ROWS]
    assert loaded.name == name and {r["source"] for r in loaded.rows} == {name}


def test_parquet_keeps_messages_and_absent_values(tmp_path):
    prompt = [{"role": "user", "content": "1+1?"}]
    rows = [{"prompt": prompt, "answer": "2", "tests": None}, {"prompt": prompt, "answer": "", "tests": "{}"}]
    as_parquet(tmp_path / "x.parquet", rows)
    math, code = load(str(tmp_path / "x.parquet"))
    assert math["prompt"] == prompt and (math["kind"], code["kind"]) == ("math", "code") and "tests" not in math


def test_a_cell_may_be_long_and_a_row_blank(tmp_path):
    (tmp_path / "x.csv").write_text(" question ,answer\n\n" + "x" * 300_000 + ",2\n")
    assert len(load(str(tmp_path / "x.csv"))[0]["question"]) == 300_000


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.csv", b"question,answer\na,1\nb\n", "x.csv, line 3: expected 2 cells, got 1"),
        ("x.csv", b"question,answer\na,1,2\n", "x.csv, line 2: expected 2 cells, got 3"),
        ("x.csv", b"question,question\na,1\n", "x.csv: expected a first line with a name for each column"),
        ("x.csv", b'question,answer\n"a,1\n', "x.csv, line 2: expected CSV, got"),
        (
            "x.csv",
            b"question;answer\na;1\n",
            "x.csv, row 1: columns: expected .*'question;answer'",
        ),
        ("x.csv", b"question,answer\n\xe9,1\n", r"x.csv: expected UTF-8, got the byte 0xe9 .*in Latin-1 it is 'é'"),
        ("x.csv", "question,answer\na,1\n".encode("utf-16"), "x.csv: expected UTF-8, got what looks like UTF-16"),
        ("x.csv", b"", "x.csv: expected at least one usable row, got none of 0$"),
        ("x.csv.gz", b"question,answer\n", "x.csv.gz: expected a whole gzip file"),
        ("x.parquet", b"question,answer\na,1\n", "x.parquet: expected a Parquet file, got"),
        ("x.jsonl", b'[{"question": "a", "answer": "1"}]', "line 1: expected a JSON object, got a JSON array"),
        ("x.json", b'{\n "question": "a"\n}', "line 1: expected a JSON object, got the first line of a JSON object"),
        ("x.jsonl", b"{", "line 1: expected a JSON object, got '{'"),
        (
            "x.json",
            b'[\n {"question": "a", "answer": "1"}\n]',
            "line 1: expected a JSON object, got a JSON array",
        ),
        (
            "x.jsonl",
            '{"question": "a", "answer": "1"}'.encode("utf-16"),
            "line 1: expected UTF-8, got .* UTF-16",
        ),
        (
            "x.jsonl",
            '{"question": "a", "answer": "1"}'.encode("utf-16-le"),
            "line 1: expected UTF-8, got .* UTF-16",
        ),
    ],
)
def test_what_is_something_else_is_named(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        load(str(tmp_path / name))


@pytest.mark.parametrize("name", ["absent.jsonl", "absent.csv.gz", "./absent", "absent/x.parquet", "~/absent"])
def test_a_file_that_is_not_there(name):
    with pytest.raises(ValueError, match=rf"data: expected a file, got {name}, which is not there"):
        load(name)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ValueError, match="which is a folder"):
        load(str(tmp_path))


@pytest.mark.parametrize("digits", [4300, 4301, 20_000])
def test_an_integer_of_any_length(tmp_path, digits):
    (tmp_path / "x.jsonl").write_text('{"question": "x?", "answer": ' + "9" * digits + "}\n")
    assert load(str(tmp_path / "x.jsonl"))[0]["answer"] == "9" * digits


GOOD = b'{"question": "x?", "answer": "1"}\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", GOOD + b'{"question": "\xe9?", "answer": "1"}\n'),
        ("x.jsonl", GOOD + b"[" * 100_000),
        ("x.jsonl.gz", gzip.compress(GOOD)[:-8]),
        ("x.jsonl.gz", gzip.compress(GOOD) + b"trailing"),
    ],
    ids=["latin-1", "deep", "cut", "trailing"],
)
def test_a_line_that_cannot_be_read_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}, line 2: expected "):
        load(str(tmp_path / name))


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD)
    assert load(str(tmp_path / "x.jsonl"))[0]["question"] == "x?"


def test_jsonl_is_whole_or_absent(tmp_path):
    def rows():
        yield {"a": 1}
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        write_jsonl(tmp_path / "x.jsonl", rows())
    assert not list(tmp_path.iterdir())
    write_jsonl(tmp_path / "x.jsonl.gz", [{"a": "é"}])
    assert gzip.open(tmp_path / "x.jsonl.gz", "rt", encoding="utf-8").read() == '{"a": "é"}\n'
    assert list(read_jsonl(tmp_path / "x.jsonl.gz")) == [{"a": "é"}]
