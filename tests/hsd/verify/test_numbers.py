import time

import pytest

from hsd.verify import final_answer, last_number, number_reward, numbers_equal


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3 * 4 = 12.", "12"),
        ("#### 18", "18"),
        ("first 7, then 18.0", "18"),
        ("costs $1,234.50.", "1234.5"),
        ("2,000,000 people", "2000000"),
        ("12,34", "34"),
        ("1,2,3", "3"),
        ("= -5", "-5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("\u22127", "-7"),
        ("7-5", "5"),
        ("7 - 5", "5"),
        ("-0.00", "0"),
        ("007", "7"),
        (".50", "0.5"),
        ("chapter.5", "5"),
        ("\\boxed{-18}", "-18"),
        ("**42**", "42"),
        ("9" * 50, "9" * 50),
        ("twelve", None),
        ("", None),
        ("\u0663", None),  # an Arabic-Indic three
    ],
)
def test_last_number(text, expected):
    assert last_number(text) == expected


def test_last_number_is_linear_in_the_text():
    start = time.process_time()
    last_number("1," * 100_000 + "-$" * 100_000 + "9" * 100_000)
    assert time.process_time() - start < 2


def test_numbers_equal_compares_values():
    assert numbers_equal("18", "18.0") and numbers_equal("1,234", "1234") and numbers_equal("-0", "0")
    assert not numbers_equal("18", "-18") and not numbers_equal("18", "180")
    assert not numbers_equal(None, None) and not numbers_equal("5", None) and not numbers_equal("none", "none")
    assert not numbers_equal("1" * 40 + "1", "1" * 40 + "2")  # beyond the precision of a float


def test_final_answer():
    assert final_answer("48/2 = <<48/2=24>>24 clips\n#### 72") == "72"
    assert final_answer("#### 1\nno, #### 1,234 ") == "1,234"
    assert final_answer("so it is 9.0") == "9"


@pytest.mark.parametrize("text", ["", "no idea", "there were 5 ####", "5 #### none"])
def test_final_answer_without_a_number(text):
    with pytest.raises(ValueError, match="text: expected an answer that holds a number"):
        final_answer(text)


def test_number_reward_reads_strings_and_chats():
    chat = [{"role": "user", "content": "6"}, {"role": "assistant", "content": "3 * 4 = 12"}]
    completions = ["it is 12.", chat, [chat[-1]], "12 or 13", ""]
    assert number_reward(completions, ["12", "work #### 12", 12, "12", "12"], prompts=[]) == [1, 1, 1, 0, 0]


def test_number_reward_names_what_is_wrong():
    with pytest.raises(ValueError, match="answer: expected 2 entries, got 1"):
        number_reward(["1", "2"], ["1"])
    for completion in (None, 12, [], [{"role": "assistant"}], ["12"]):
        with pytest.raises(TypeError, match="completions: expected strings or lists of messages"):
            number_reward([completion], ["12"])  # type: ignore[list-item]
