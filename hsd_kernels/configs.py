"""Pinned launch configurations of the Triton kernels. Tests and training launch what is pinned here; nothing is tuned
at run time. compile_report.py compiles and counts them."""

from __future__ import annotations

from dataclasses import dataclass

ARCHITECTURES = (80, 90, 100)
KERNELS = ("statistics", "gradient", "one_read", "one_read_softcap")


@dataclass(frozen=True)
class RowConfig:
    block_v: int  # columns a program reads of each row per iteration
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int | bool]:
        """Triton's launch options. Fusing x * y + z is its default up to 3.9 only, so it is asked for."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}

    def lanes(self, itemsize: int) -> int:
        """Columns side by side: one 16-byte load per thread, so that a reduction over the rest of the block
        stays within the thread. With half of that the compile report has more registers for bf16 logits."""
        return min(self.block_v, 16 // itemsize * 32 * self.num_warps)


# From the compile report, not from timings: 64 registers for the one-read statistics of fp32 logits keep
# 32 warps on an SM, 4096 columns need 86 (sm_90), and 1024 at 4 warps spill in the JSD.
PINNED = {
    ("statistics", 80): RowConfig(block_v=2048, num_warps=8, num_stages=1),
    ("statistics", 90): RowConfig(block_v=2048, num_warps=8, num_stages=1),
    ("statistics", 100): RowConfig(block_v=2048, num_warps=8, num_stages=1),
    ("gradient", 80): RowConfig(block_v=2048, num_warps=8, num_stages=1),
    ("gradient", 90): RowConfig(block_v=2048, num_warps=8, num_stages=1),
    ("gradient", 100): RowConfig(block_v=2048, num_warps=8, num_stages=1),
    ("one_read", 80): RowConfig(block_v=2048, num_warps=2, num_stages=1),
    ("one_read", 90): RowConfig(block_v=2048, num_warps=2, num_stages=1),
    ("one_read", 100): RowConfig(block_v=2048, num_warps=2, num_stages=1),
    # The derivative of a soft cap is more to hold. 32 columns a thread spill.
    ("one_read_softcap", 80): RowConfig(block_v=2048, num_warps=4, num_stages=1),
    ("one_read_softcap", 90): RowConfig(block_v=2048, num_warps=4, num_stages=1),
    ("one_read_softcap", 100): RowConfig(block_v=2048, num_warps=4, num_stages=1),
}


def row_config(kernel: str, capability: int) -> RowConfig:
    """The pinned configuration of the nearest architecture not above ``capability`` (10 * major + minor)."""
    if kernel not in KERNELS:
        raise ValueError(f"kernel: expected one of {KERNELS}, got {kernel!r}")
    below = [arch for arch in ARCHITECTURES if arch <= capability]
    if not below:
        raise ValueError(f"capability: expected at least {min(ARCHITECTURES)}, got {capability}")
    return PINNED[kernel, max(below)]
