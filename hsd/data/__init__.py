"""Questions for training and evaluation: one row form, loaders, decontamination, difficulty and mixing."""

from hsd.data.mix import difficulty, mix
from hsd.data.rows import to_dataset
from hsd.data.sources import SOURCES, load
from hsd.json_files import read_jsonl, write_jsonl

__all__ = ["SOURCES", "difficulty", "load", "mix", "read_jsonl", "to_dataset", "write_jsonl"]
