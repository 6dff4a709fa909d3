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

    def lanes(self, vocab: int, itemsize: int) -> dict[str, int]:
        """Launch constants of the statistics: WIDTH columns of a lane are one 16-byte load, each thread has a lane, and
        a lane has at most IN_LANE columns of a row."""
        width = min(self.block_v, 16 // itemsize)
        lanes = min(self.block_v // width, 32 * self.num_warps)
        loads = -(-vocab // (lanes * width))
        return {"WIDTH": width, "LANES": lanes, "IN_LANE": width << (loads - 1).bit_length()}


# From the compile report, not from timings: 40 registers for the statistics of a KL keep 48 warps on an SM; 4096
# columns take 64 registers and one instruction a pair less (sm_90).
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
