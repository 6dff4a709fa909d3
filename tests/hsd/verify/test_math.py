import os
import signal
import threading
import time

import pytest

from hsd.verify import math as module
from hsd.verify import sympy_pool
from hsd.verify.math import math_reward, math_reward_with, verify_choice, verify_math
from hsd.verify.status import Status

pytest.importorskip("math_verify")


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        (r"so \boxed{\dfrac{1}{2}}", "0.5"),
        (r"\boxed{0.5}", r"\frac{1}{2}"),
        (r"\boxed{(x+1)^2}", "x^2 + 2x + 1"),
        (r"\boxed{\$1,234.50}", "1234.5"),
        (r"it is 1,234 dollars.", "1234"),
        (r"1/2", "0.5"),
        (r"The answer is $\left( 3, \tfrac{\pi}{2} \right)$.", r"(3, \frac{\pi}{2})"),
        (r"\boxed{[1, \infty)}", r"[1,\infty)"),
        (r"\boxed{east}", r"\text{East}"),
        (r"\boxed{5}", r"We get \boxed{5}."),
        (r"\boxed{72}", "48/2 = 24\n#### 72"),
        (r"\boxed{9} or rather \boxed{7}", "7"),
    ],
)
def test_equal(text, gold):
    assert verify_math(text, gold).status is Status.CORRECT


@pytest.mark.parametrize(
    ("text", "gold", "status"),
    [
        (r"\boxed{7} or rather \boxed{9}", "7", Status.INCORRECT),
        (r"\boxed{7}, \boxed{8", "8", Status.NO_ANSWER),
        (r"\boxed{123456789012345678901234567890}", "123456789012345678901234567891", Status.INCORRECT),
        (r"\boxed{1, 2, 3}", "3", Status.INCORRECT),
        (r"\boxed{[1, 2)}", "[1, 2]", Status.INCORRECT),
        (r"\boxed{nylevE}", r"\text{Evelyn}", Status.INCORRECT),  # a product of letters commutes
        (r"\boxed{5x}", "5", Status.INCORRECT),
        (r"\boxed{1/0}", "1", Status.INCORRECT),
        (r"\boxed{" + "x+" * 501 + "}", "1", Status.TOO_LONG),
        ("", "5", Status.NO_ANSWER),
        ("5", "", Status.VERIFIER_FAILED),
        ("5", r"\boxed{}", Status.VERIFIER_FAILED),
    ],
)
def test_not_equal(text, gold, status):
    assert verify_math(text, gold).status is status


def test_a_timeout_is_the_answers_and_the_next_one_is_judged():
    start = time.monotonic()
    assert verify_math(r"\boxed{1000000000!}", "2x", timeout=2.0).status is Status.TIMEOUT
    assert time.monotonic() - start < 60  # the first call starts the child
    assert verify_math(r"\boxed{x + x}", "2x").status is Status.CORRECT


def test_off_the_main_thread_with_a_signal_handler_of_the_callers():
    """math-verify's own limit raises ValueError here, or takes the caller's SIGALRM."""
    calls = []
    previous = signal.signal(signal.SIGALRM, lambda *_: calls.append(1))
    try:
        results = []
        thread = threading.Thread(target=lambda: results.append(verify_math(r"\boxed{2x}", "x+x")))
        thread.start()
        thread.join()
        assert results[0].status is Status.CORRECT and not calls
    finally:
        signal.signal(signal.SIGALRM, previous)


@pytest.mark.parametrize(
    ("reply", "status"),
    [
        ({"error": "TypeError"}, Status.INCORRECT),  # compared as text, and the spellings differ
        ({"ended": "timeout"}, Status.TIMEOUT),
        ({"ended": "died"}, Status.CRASHED),
        ({"ended": "killed"}, Status.VERIFIER_FAILED),  # the system's out-of-memory killer
        ({"ended": "busy"}, Status.VERIFIER_FAILED),
        ({"lost": "the server ended"}, Status.VERIFIER_FAILED),
    ],
)
def test_what_sympy_did_not_answer(monkeypatch, reply, status):
    class Broken:
        def ask(self, *_):
            return reply

    monkeypatch.setattr(module, "SERVERS", Broken())
    assert verify_math(r"\boxed{x^3}", "x^2").status is status
    assert verify_math(r"\boxed{x^2}", "x^2").status is Status.CORRECT


def test_a_fork_that_is_killed_from_outside_says_nothing_about_the_answer():
    assert verify_math(r"\boxed{x+x}", "2x").status is Status.CORRECT
    server = sympy_pool.SERVERS.idle[-1]
    with open(f"/proc/{server.process.pid}/task/{server.process.pid}/children") as file:
        os.kill(int(file.read().split()[0]), signal.SIGKILL)
    assert verify_math(r"\boxed{x+x}", "2x").status is Status.VERIFIER_FAILED
    assert verify_math(r"\boxed{x+x}", "2x").status is Status.CORRECT


def test_no_child_process_no_silent_zero(monkeypatch, tmp_path):
    monkeypatch.setattr(sympy_pool, "SERVER", tmp_path / "absent.py")
    monkeypatch.setattr(module, "SERVERS", sympy_pool._Servers())
    with pytest.warns(UserWarning, match="expected the child process to start"):
        assert math_reward([r"\boxed{x+x}"], ["2x"]) == [None]


def test_a_child_that_was_killed_is_replaced():
    assert verify_math(r"\boxed{x+x}", "2x").status is Status.CORRECT
    for server in sympy_pool.SERVERS.idle:
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
    assert verify_math(r"\boxed{x+x}", "2x").status is Status.CORRECT


def test_reward_keeps_the_order_reads_chats_and_reports():
    seen = {}
    columns = {"log_extra": seen.__setitem__, "log_metric": seen.__setitem__, "prompts": []}
    chat = [{"role": "assistant", "content": r"\boxed{x+x}"}]
    completions = [r"\boxed{3}", chat, "no", r"\boxed{\frac24}", "def f(): pass"]
    tests = [None, None, None, None, {"asserts": ["f()"]}]
    answers = ["3", "2x", "1", "0.5", "the reference solution"]
    assert math_reward(completions, answers, tests=tests, **columns) == [1.0, 1.0, 0.0, 1.0, None]
    assert seen["math_status"] == ["correct", "correct", "incorrect", "correct", None]
    assert seen["math_verifier_failed"] == 0.0


def test_a_column_is_no_option():
    columns = {name: [name] for name in ("timeout", "tolerance", "workers", "prompts")}
    assert math_reward([r"\boxed{3.14}"], [r"\pi"], **columns) == [0.0]
    assert math_reward_with(tolerance=1e-2)([r"\boxed{3.14}"], [r"\pi"], **columns) == [1.0]


def test_reward_names_what_is_wrong():
    with pytest.raises(ValueError, match="answer: expected 2 entries, got 1"):
        math_reward(["1", "2"], ["1"])
    with pytest.raises(TypeError, match="completions: expected strings"):
        math_reward([12], ["12"])  # type: ignore[list-item]


def test_integers_over_4300_digits():
    for gold in (10**5000, "1" + "0" * 5000):
        assert verify_math("1" + "0" * 5000, gold).status is Status.CORRECT
        assert verify_math("1" + "0" * 4999 + "1", gold).status is Status.INCORRECT
    assert verify_math("1" + "0" * 999, "1e999").status is Status.CORRECT


def test_a_tolerance_is_an_option():
    assert verify_math(r"\boxed{3.14}", r"\pi").status is Status.INCORRECT
    assert verify_math(r"\boxed{3.14}", r"\pi", tolerance=1e-2).status is Status.CORRECT
    assert verify_math("99", "100", tolerance=0.02).status is Status.CORRECT
    assert verify_math("97", "100", tolerance=0.02).status is Status.INCORRECT


@pytest.mark.parametrize(
    ("text", "gold", "status"),
    [
        ("The answer is C.", "C", Status.CORRECT),
        ("so I choose option (B)", "B", Status.CORRECT),
        (r"\boxed{\text{(D) none}}", "D", Status.CORRECT),
        ("(A) 3", r"\textbf{(A)}\ 4", Status.INCORRECT),
        ("The answer is A or B.", "A", Status.NO_ANSWER),
        ("Answer: D", "C", Status.INCORRECT),
        ("no idea", "C", Status.NO_ANSWER),
        ("C", "12", Status.VERIFIER_FAILED),
    ],
)
def test_a_choice(text, gold, status):
    assert verify_choice(text, gold).status is status
