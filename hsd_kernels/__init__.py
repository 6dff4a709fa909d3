"""Fused self-distillation losses: head projection, log-softmax and per-token KL without full logits."""

from hsd_kernels.api import HSDKLOutput, fused_hsd_kl
from hsd_kernels.divergence import Divergence
from hsd_kernels.head import Head
from hsd_kernels.module import FusedHSDKL
from hsd_kernels.row_stats import RowStats
from hsd_kernels.sharded import gathered
from hsd_kernels.token_loss import TokenLossOutput, fused_token_logps, fused_token_loss

__all__ = [
    "Divergence",
    "FusedHSDKL",
    "HSDKLOutput",
    "Head",
    "RowStats",
    "TokenLossOutput",
    "fused_hsd_kl",
    "fused_token_logps",
    "fused_token_loss",
    "gathered",
]
