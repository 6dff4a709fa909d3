"""Questions for training and evaluation: one row form, loaders, decontamination, difficulty and mixing."""

from hsd.data.mix import difficulty, mix
from hsd.data.rows import read_jsonl, to_dataset, write_jsonl
from hsd.data.sources import SOURCES, load

__all__ = ["SOURCES", "difficulty", "load", "mix", "read_jsonl", "to_dataset", "write_jsonl"]
