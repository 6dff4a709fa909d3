"""What the model is asked, per kind of question: the only place with such wording."""

from __future__ import annotations

import re

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
PROGRAM = (
    "Write a Python program that reads the input from stdin and writes the answer to stdout. "
    "Put the whole program into one ```python block."
)
STARTER = "Complete this Python code. Put the whole code into one ```python block.\n\n```python\n{code}\n```"
NAMED = "Write a Python function named `{name}`. Put the whole code into one ```python block."
FUNCTION = (
    "Complete this Python function. Repeat everything that is given, imports and helper functions included, "
    "and put the whole code into one ```python block.\n\n```python\n{code}\n```"
)

# Instructions that published data sets carry at an end of the question itself (the files of MATH-500 and AIME that
# evaluation suites pass around do); a question has them once, in our words.
_CARRIED = re.compile(
    r"\s*(?:Please reason|Let'?s think) step by step,? and (?:put|output) (?:your|the) final answer within "
    r"\\boxed\{\}\.?\s*",
    re.IGNORECASE,
)

Messages = list[dict[str, str]]


def bare_question(text: str) -> str:
    """The question without a boxed instruction at its beginning or end."""
    text = text.strip()
    for match in list(_CARRIED.finditer(text)):
        if match.start() == 0 or match.end() == len(text):
            text = text[: match.start()] + text[match.end() :]
            break
    return text.strip()


def math_prompt(question: str) -> Messages:
    return _user(f"{question}\n\n{BOXED}")


def program_prompt(question: str, starter_code: str = "", function: str | None = None) -> Messages:
    """A contest problem: the completion of starter code, a function by its name, or a program over stdin and stdout."""
    if starter_code.strip():
        return _user(f"{question}\n\n{STARTER.format(code=starter_code)}")
    return _user(f"{question}\n\n{NAMED.format(name=function) if function else PROGRAM}")


def function_prompt(code: str) -> Messages:
    """A function given by its signature and docstring, as in HumanEval."""
    return _user(FUNCTION.format(code=code))


def _user(content: str) -> Messages:
    return [{"role": "user", "content": content}]
