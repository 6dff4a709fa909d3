"""Sampling and scoring outside of training: benchmarks with pass@k, and the demo's success on held-out questions."""

from hsd.evaluate.sampling import Sampling, end_token_ids, sample
from hsd.evaluate.success import RewardFn, Success, score, success

__all__ = ["RewardFn", "Sampling", "Success", "end_token_ids", "sample", "score", "success"]
