"""Gold answers with completions that are right and wrong, a line a gold: `kinds.jsonl` has two sides of each kind of
answer, and a kind that is added gets both; `pairs.jsonl` was written from the kinds alone, without sight of the reader.
What starts with ~ stands in a box."""

import json
from pathlib import Path

import pytest

from hsd.verify import verify_math
from hsd.verify.status import Result, Status, in_order

pytest.importorskip("math_verify")
RIGHT = (Status.CORRECT,)
WRONG = (Status.INCORRECT, Status.NO_ANSWER, Status.TOO_LONG)


@pytest.mark.parametrize(("side", "wanted"), [("right", RIGHT), ("wrong", WRONG)])
@pytest.mark.parametrize(("file", "least"), [("kinds.jsonl", 400), ("pairs.jsonl", 1000)])
def test_pairs(file, least, side, wanted):
    def judge(pair: tuple[str, str]) -> Result:
        gold, text = pair
        return verify_math(f"So it is $\\boxed{{{text[1:]}}}$." if text.startswith("~") else text, gold)

    rows = [json.loads(line) for line in (Path(__file__).parent / file).read_text().splitlines()]
    pairs = [(row["gold"], text) for row in rows for text in row[side]]
    results = in_order(judge, pairs, 2)
    assert len(pairs) > least
    assert not [(pair, result) for pair, result in zip(pairs, results, strict=True) if result.status not in wanted]
