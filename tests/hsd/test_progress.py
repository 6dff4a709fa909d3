"""What a long job prints about itself."""

from itertools import count

import pytest
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging

from hsd import progress


@pytest.mark.parametrize(("n", "said"), [(0, "0 steps"), (1, "1 step"), (2, "2 steps")])
def test_one_is_singular(n, said):
    assert progress.counted(n, "step") == said and progress.counted(1, "process", "es") == "1 process"


def lines(monkeypatch, capsys, calls: list[tuple[float, int, int]]) -> list[str]:
    """What a counter prints for calls at (seconds, done, total)."""
    clock = iter([0.0, *(seconds for seconds, _, _ in calls)])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    show = progress.counter("sampled")
    for _, done, total in calls:
        show(done, total)
    return capsys.readouterr().out.splitlines()


def test_a_counter_says_how_long_the_rest_takes(monkeypatch, capsys):
    calls = [(float(s), done, 10) for s, done in zip(count(1), range(1, 11))]
    assert lines(monkeypatch, capsys, calls) == [
        "  sampled: 2 of 10, 2 s, 8 s left",
        "  sampled: 4 of 10, 4 s, 6 s left",
        "  sampled: 6 of 10, 6 s, 4 s left",
        "  sampled: 8 of 10, 8 s, 2 s left",
        "  sampled: 10 of 10, 10 s",
    ]


def test_work_of_an_earlier_part_does_not_count_into_the_rate(monkeypatch, capsys):
    assert (
        lines(monkeypatch, capsys, [(1.0, 501, 600), (11.0, 511, 600)])[-1] == "  sampled: 511 of 600, 11 s, 89 s left"
    )


def test_a_first_call_has_no_rate(monkeypatch, capsys):
    assert lines(monkeypatch, capsys, [(5.0, 256, 512)]) == ["  sampled: 256 of 512, 5 s"]
    assert lines(monkeypatch, capsys, [(1.0, 512, 512)]) == ["  sampled: 512 of 512, 1 s"]


@pytest.mark.parametrize("downloads", [True, False])
def test_bars_of_weights_go_and_those_of_downloads_stay(downloads):
    shown = are_progress_bars_disabled(), logging.is_progress_bar_enabled()
    try:
        (enable_progress_bars if downloads else disable_progress_bars)()
        progress.hide_bars()
        assert not logging.is_progress_bar_enabled() and are_progress_bars_disabled() != downloads
    finally:
        (disable_progress_bars if shown[0] else enable_progress_bars)()
        if shown[1]:
            logging.enable_progress_bar()
