"""`Task`: a model, its questions and their verifier."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from hsd.evaluate import RewardFn, Sampling, Success, end_token_ids, sample, score, success
from hsd.hindsight.context import ContextTemplate
from hsd.hindsight.groups import last_user_text, least_success
from hsd.policy.pretrained import load
from hsd.progress import Progress

Question = dict[str, Any]  # prompt, answer, and whatever else a reward function takes


class Policy(NamedTuple):
    model: Any  # transformers' causal LM
    tokenizer: Any

    def on_accelerator(self) -> Policy:
        """Moved to the GPU where there is one."""
        import torch

        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        return self


@dataclass(frozen=True)
class Task:
    """A policy's questions and verifier, and the settings that a run of it begins with.

    Args:
        title: heading of reports.
        model: makes or fetches the initial policy where it is missing; returns its folder or hub id.
        questions: the questions to train on.
        held_out: questions to evaluate on, never trained on; empty where there are none.
        rewards: TRL reward functions.
        template: words of the privileged context.
        sampling: of the rollouts, in training and in evaluation (``batch_size`` in evaluation only).
        train: fields of `hsd.HSDConfig` that differ from its defaults.
        eval_samples: rollouts of each held-out question in an evaluation.
        credit_questions: number of held-out questions whose credit is measured.
        reward_weights: one for each reward function; None is 1 each.
        success_reward: a rollout whose weighted reward reaches this is a success.
        threads: of torch, where OMP_NUM_THREADS says nothing. Those of a small model wait for each other.
    """

    title: str
    model: Callable[[], str]
    questions: Sequence[Question]
    held_out: Sequence[Question]
    rewards: Sequence[RewardFn]
    template: ContextTemplate
    sampling: Sampling
    train: Mapping[str, Any] = field(default_factory=dict)
    eval_samples: int = 1
    credit_questions: int = 64
    reward_weights: Sequence[float] | None = None
    success_reward: float = 1.0
    threads: int | None = None

    @property
    def config(self) -> dict[str, Any]:
        """What the task says about `hsd.HSDConfig`."""
        s = self.sampling
        own = {"max_completion_length": s.max_new_tokens, "temperature": s.temperature, "top_p": s.top_p}
        return own | dict(self.train)

    @property
    def evaluated(self) -> Sequence[Question]:
        """The held-out questions, or those of training where none are held out."""
        return self.held_out or self.questions

    def reward(self, **columns: Any) -> list[float | None]:
        """The weighted sum of the rewards, which training compares with ``success_reward``; None without a verdict."""
        return _weighted(self.rewards, self.reward_weights, columns)


def success_of(rewards: Sequence[RewardFn], weights: Sequence[float] | None = None, least: float = 1.0) -> RewardFn:
    """A reward function with the name of ``rewards``: 1.0 where their weighted sum reaches ``least``, but for fp32's
    rounding as in training, else 0.0; None without any verdict."""

    def successes(**columns: Any) -> list[float | None]:
        return [None if r is None else float(r >= least_success(least)) for r in _weighted(rewards, weights, columns)]

    successes.__name__ = " + ".join(getattr(reward, "__name__", "?") for reward in rewards)
    return successes


def _weighted(
    rewards: Sequence[RewardFn], weights: Sequence[float] | None, columns: Mapping[str, Any]
) -> list[float | None]:
    """A verdict that failed (None, NaN) is left out of the sum; None where no other is left."""
    verdicts = [
        [None if r is None or math.isnan(r) else w * r for r in reward(**columns)]
        for reward, w in zip(rewards, weights or [1.0] * len(rewards), strict=True)
    ]
    judged = [[r for r in of_one if r is not None] for of_one in zip(*verdicts, strict=True)]
    return [sum(of_one) if of_one else None for of_one in judged]


def load_policy(path: str, dtype: str = "float32", attention: str | None = None) -> Policy:
    """`hsd.policy.pretrained.load`, as a policy."""
    return Policy(*load(path, dtype, attention))


class Evaluation(NamedTuple):
    success: Success
    replies: list[dict[str, Any]]  # question, answer, reply, reward of each rollout


def evaluate(task: Task, policy: Policy, seed: int, progress: Progress | None = None) -> Evaluation:
    """``policy`` on the questions of `Task.evaluated`, ``eval_samples`` rollouts each.

    A rollout without any verdict is no success.
    """
    asked = [q for q in task.evaluated for _ in range(task.eval_samples)]
    rollouts = sample(*policy, [q["prompt"] for q in asked], task.sampling, seed=seed, progress=progress)
    rewards = score(policy.tokenizer, asked, rollouts, task.reward)
    texts = policy.tokenizer.batch_decode(rollouts, skip_special_tokens=True)
    replies = [
        {"question": last_user_text(q["prompt"]), "answer": q["answer"], "reply": text, "reward": reward}
        for q, text, reward in zip(asked, texts, rewards, strict=True)
    ]
    reached = [float(reward is not None and reward >= least_success(task.success_reward)) for reward in rewards]
    return Evaluation(success(reached, rollouts, task.eval_samples, end_token_ids(*policy)), replies)
