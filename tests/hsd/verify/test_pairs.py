"""Gold answers with completions that are right and wrong, written from the kinds alone, without sight of the reader:
`pairs.jsonl`. What starts with ~ stands in a box."""

import json
from pathlib import Path

import pytest

from hsd.verify import verify_math
from hsd.verify.status import Result, Status, in_order

pytest.importorskip("math_verify")
ROWS = [json.loads(line) for line in (Path(__file__).parent / "pairs.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("side", ["right", "wrong"])
def test_pairs(side):
    def judge(pair: tuple[str, str]) -> Result:
        gold, text = pair
        return verify_math(f"So it is $\\boxed{{{text[1:]}}}$." if text.startswith("~") else text, gold)

    pairs = [(row["gold"], text) for row in ROWS for text in row[side]]
    results = in_order(judge, pairs, 2)
    wanted = (Status.CORRECT,) if side == "right" else (Status.INCORRECT, Status.NO_ANSWER, Status.TOO_LONG)
    assert len(pairs) > 1000
    assert not [(pair, result) for pair, result in zip(pairs, results, strict=True) if result.status not in wanted]
