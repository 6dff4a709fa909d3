"""Fused self-distillation losses: head projection, log-softmax and per-token KL without full logits."""

from hsd_kernels.api import HSDKLOutput, fused_hsd_kl
from hsd_kernels.divergence import RowStats
from hsd_kernels.module import FusedHSDKL
from hsd_kernels.sharded import gathered

__all__ = ["FusedHSDKL", "HSDKLOutput", "RowStats", "fused_hsd_kl", "gathered"]
