"""Other graders for bench_verifiers.py: pairs of completion and gold to verdicts, or a text that says why not."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import multiprocessing
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

Pairs = list[tuple[str, str]]
Grader = Callable[[Pairs], list[bool | None]]
SECONDS = 5
_FILES = {  # loaded as files: the packages around them import ray, vllm and the like
    "verl 0.9.1, math_reward": "verl/utils/reward_score/math_reward.py",
    "verl 0.9.1, math_dapo": "verl/utils/reward_score/math_dapo.py",
    "verl 0.9.1, gsm8k flexible": "verl/utils/reward_score/gsm8k.py",
    "lm-eval 0.4.13, aime": "lm_eval/tasks/aime/utils.py",
    "lm-eval 0.4.13, minerva_math": "lm_eval/tasks/minerva_math/utils.py",
}


def graders(folder: Path | None) -> dict[str, Grader | str]:
    found: dict[str, Grader | str] = {"math-verify 0.9.0": _in_a_process(_math_verify)}
    for name, path in _FILES.items():
        if folder is None or not (folder / path).exists():
            found[name] = "not installed: give --peers"
            continue
        try:
            found[name] = _in_a_process(_of_file(folder / path))
        except Exception as error:
            found[name] = f"does not load: {type(error).__name__} {str(error)[:150]}".replace("\n", " ")
    return found


def _math_verify(text: str, gold: str) -> bool:
    from math_verify import parse, verify

    return bool(
        verify(
            parse(f"${gold}$", parsing_timeout=SECONDS), parse(text, parsing_timeout=SECONDS), timeout_seconds=SECONDS
        )
    )


def _of_file(path: Path) -> Callable[[str, str], bool]:
    spec = importlib.util.spec_from_file_location(f"peer_{path.parent.name}_{path.stem}", path)
    assert spec and spec.loader
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if "aime" in str(path):
        return lambda text, gold: module.process_results({"answer": gold}, [text])["exact_match"] == 1
    if "minerva" in str(path):
        return lambda text, gold: bool(
            module.is_equiv(module.normalize_final_answer(module.get_unnormalized_answer(text)), gold)
        )
    if path.stem == "gsm8k":
        return lambda text, gold: module.compute_score(text, gold, method="flexible") == 1.0
    if path.stem == "math_dapo":
        return lambda text, gold: module.compute_score(text, gold)["acc"]
    return lambda text, gold: module.compute_score(text, gold) == 1.0


def _in_a_process(grade: Callable[[str, str], bool]) -> Grader:
    """One grader on all pairs in a fork, with SIGALRM: theirs need the main thread. An exception is a rejection."""

    def run(pairs: Pairs) -> list[bool | None]:
        here, there = multiprocessing.Pipe(False)

        def work() -> None:
            logging.disable(logging.CRITICAL)
            verdicts = []
            for text, gold in pairs:
                signal.signal(signal.SIGALRM, _late)
                signal.alarm(3 * SECONDS)
                try:
                    with contextlib.redirect_stdout(io.StringIO()):
                        verdicts.append(bool(grade(text, gold)))
                except BaseException:
                    verdicts.append(False)
                signal.alarm(0)
            there.send(verdicts)

        process = multiprocessing.get_context("fork").Process(target=work)
        process.start()
        there.close()
        try:
            return here.recv()
        finally:
            process.join()

    return run


def _late(*_: object) -> None:
    raise TimeoutError
