"""Hindsight Self-Distillation (arXiv 2606.15576): the method as pure functions, and a thin trainer on TRL."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hsd.train.config import HSDConfig
    from hsd.train.trainer import HSDTrainer

__all__ = ["HSDConfig", "HSDTrainer"]


def __getattr__(name: str) -> Any:
    """The trainer is imported when it is asked for: the pure functions need neither TRL nor transformers."""
    if name == "HSDConfig":
        from hsd.train.config import HSDConfig

        return HSDConfig
    if name == "HSDTrainer":
        from hsd.train.trainer import HSDTrainer

        return HSDTrainer
    raise AttributeError(f"module 'hsd' has no attribute {name!r}")
