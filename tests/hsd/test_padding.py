import pytest

from hsd.padding import padded


@pytest.mark.parametrize(
    ("side", "ids", "mask"),
    [
        ("right", [[5, 6, 7], [8, 9, 9], [9, 9, 9]], [[1, 1, 1], [1, 0, 0], [0, 0, 0]]),
        ("left", [[5, 6, 7], [9, 9, 8], [9, 9, 9]], [[1, 1, 1], [0, 0, 1], [0, 0, 0]]),
    ],
)
def test_ids_and_mask(side, ids, mask):
    got = padded([[5, 6, 7], (8,), []], 9, side)
    assert [t.tolist() for t in got] == [ids, mask]
    assert all(str(t.dtype) == "torch.int64" for t in got)
