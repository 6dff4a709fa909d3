"""Verifiers: reward functions for any TRL trainer, and the judgements behind them, each with a status."""

from hsd.verify.code import code_reward, code_reward_with, verify_code
from hsd.verify.generators import reasoning_gym_reward, reasoning_gym_success
from hsd.verify.math import choice_reward, math_reward, math_reward_with, verify_choice, verify_math
from hsd.verify.numbers import final_answer, last_number, number_reward, numbers_equal
from hsd.verify.sandbox import Isolation, Limits, isolation
from hsd.verify.status import Result, Status

__all__ = [
    "Isolation",
    "Limits",
    "Result",
    "Status",
    "choice_reward",
    "code_reward",
    "code_reward_with",
    "final_answer",
    "isolation",
    "last_number",
    "math_reward",
    "math_reward_with",
    "number_reward",
    "numbers_equal",
    "reasoning_gym_reward",
    "reasoning_gym_success",
    "verify_choice",
    "verify_code",
    "verify_math",
]
