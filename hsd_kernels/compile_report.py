"""Ahead-of-time compile report of the pinned configurations. Needs triton, but no GPU.

    python -m hsd_kernels.compile_report                   # every variant for sm_80, sm_90 and sm_100
    python -m hsd_kernels.compile_report --quick sm_90     # the plainest, in fp32 and bf16, and the largest variant

prints registers, spills and shared memory per kernel variant, and exits with 1 if a pinned configuration spills.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsd_kernels.configs import ARCHITECTURES, RowConfig, row_config


@dataclass(frozen=True)
class Variant:
    kernel: str
    divergence: str = "forward_kl"
    clip: bool = False
    floor: bool = False
    softcap: bool = False
    bias: bool = False
    logits: str = "fp32"

    @property
    def config(self) -> str:
        """The kernel's name in `configs`."""
        return "one_read_softcap" if self.kernel == "one_read" and self.softcap else self.kernel

    def __str__(self) -> str:
        flags = [name for name in ("clip", "floor", "softcap", "bias") if getattr(self, name)]
        return " ".join([self.divergence, *flags, self.logits])


# The first is what a run of defaults launches, the last has everything in it.
_KL: tuple[dict[str, Any], ...] = (
    {},
    {"logits": "bf16"},
    {"bias": True},
    {"softcap": True},
    {"divergence": "reverse_kl"},
)
_ALL: tuple[dict[str, Any], ...] = (
    *_KL,
    {"clip": True},
    {"divergence": "reverse_kl", "clip": True},
    {"divergence": "jsd"},
    {"divergence": "reverse_kl", "floor": True},
    {"divergence": "jsd", "clip": True, "softcap": True, "bias": True},
)
_FORMS = {
    "statistics": _ALL,
    "gradient": _ALL,
    "one_read": (*_KL, {"divergence": "reverse_kl", "softcap": True, "bias": True}),
}
VARIANTS = tuple(Variant(kernel, **form) for kernel, forms in _FORMS.items() for form in forms)
QUICK = tuple(Variant(kernel, **form) for kernel, forms in _FORMS.items() for form in (*forms[:2], forms[-1]))


@dataclass(frozen=True)
class Line:
    variant: Variant
    arch: int
    config: RowConfig
    registers: int
    spill_bytes: int
    shared_bytes: int
    widest_load: int  # bytes of one load of the logits
    instructions: float  # a pair of logits (`_instructions`)

    @property
    def ok(self) -> bool:
        return self.spill_bytes == 0

    def __str__(self) -> str:
        config = f"{self.config.block_v:>5} {self.config.num_warps:>5}"
        usage = f"{self.registers:>9} {self.spill_bytes:>6} {self.shared_bytes:>6} {self.widest_load:>4}"
        usage += f" {self.instructions:>7.1f}"
        return f"{self.variant.kernel:<10} {self.variant!s:<30} sm_{self.arch:<4} {config} {usage}"


VOCABULARY = 151_936  # Qwen3's

HEADER = f"{'kernel':<10} {'variant':<30} {'arch':<7} {'block':>5} {'warps':>5} registers spills shared load  a pair"


def compile_report(
    archs: Sequence[int] = ARCHITECTURES,
    variants: Sequence[Variant] = VARIANTS,
) -> list[Line]:
    """Compiles ``variants`` in their pinned configurations for each architecture. Needs triton, but no GPU,
    and a process in which TRITON_INTERPRET is not set."""
    return [_compile(variant, arch) for arch, variant in itertools.product(archs, variants)]


def _compile(variant: Variant, arch: int) -> Line:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hsd_kernels.rows import one_read
    from hsd_kernels.rows import triton_rows as rows

    config = row_config(variant.config, arch)
    kernel = one_read.one_read_kernel if variant.kernel == "one_read" else getattr(rows, f"{variant.kernel}_kernel")
    parts, slots = one_read.slices(VOCABULARY, config.block_v)
    constants: dict[str, Any] = {
        "DIVERGENCE": rows.DIVERGENCES.index(variant.divergence),
        "HAS_SOFTCAP": variant.softcap,
        "LINEAR": variant.logits == "bf16",
        "NONNEGATIVE": variant.clip and variant.bias,  # in one variant of each kernel that clips
        "WAITS": True,
        "PARTS": parts,
        "SLOTS": slots,
        **config.lanes(VOCABULARY, 2 if variant.logits == "bf16" else 4),
        "BLOCK_V": config.block_v,
    }
    given = {"bias_ptr": variant.bias, "teacher_bias_ptr": variant.bias, "in_scale": variant.softcap}
    given |= {"clip": variant.clip, "log_floor": variant.floor}
    constants |= {name: None for name, is_given in given.items() if not is_given}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: _argument_type(name, variant) for name in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    # What Triton specializes on at run time when V is a multiple of 16. Without it loads are of one element.
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name not in constants and (name == "V" or name.startswith("stride_") or name.endswith("_ptr"))
    }
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs),
        target=GPUTarget("cuda", arch, 32),
        options=dict(config.options),
    )
    usage = _resource_usage(compiled.asm["cubin"])
    loads = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)", compiled.asm["ptx"])
    return Line(
        variant=variant,
        arch=arch,
        config=config,
        registers=usage["REG"],
        spill_bytes=usage["LOCAL"] + usage["STACK"],
        shared_bytes=compiled.metadata.shared,
        widest_load=max(int(count or 1) * int(bits) // 8 for count, bits in loads),
        instructions=_instructions(compiled.asm["cubin"], variant.kernel) * 32 * config.num_warps / config.block_v,
    )


def _argument_type(name: str, variant: Variant) -> str:
    if name in ("xs_ptr", "xt_ptr"):
        return f"*{variant.logits}"
    if name == "target_ptr":
        return "*i64"
    if name == "dz_ptr" or (name == "out_ptr" and variant.kernel == "gradient"):
        return "*bf16"
    if name == "sync_ptr":
        return "*i32"
    if name.endswith("_ptr"):
        return "*fp32"
    return "i32" if name in ("V", "C") or name.startswith("stride_") else "fp32"


def _instructions(cubin: bytes, kernel: str) -> int:
    """SASS instructions that a thread runs for its columns of a block: those of the loops over the blocks of a row. A
    one-read kernel has no such loop: there those that all programs of a row run but for loops, which are the wait and
    what peaked slices need."""
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?!NOP)(.*?);", _cuobjdump(cubin, "-sass"), re.M)
    code = [(int(at, 16), text) for at, text in found]
    jumps = [(at, re.search(r"\bBRA\b.*0x([0-9a-f]+)", text)) for at, text in code]
    loops = [(int(to[1], 16), at) for at, to in jumps if to and int(to[1], 16) < at]
    if kernel != "one_read":
        return sum(any(first <= at <= last for first, last in loops) for at, _ in code)
    end = next(at for at, text in code if "EXIT" in text)  # of all programs of a row but the last
    return sum(at <= end and not any(first <= at <= last < end for first, last in loops) for at, _ in code)


def _resource_usage(cubin: bytes) -> dict[str, int]:
    found = re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", _cuobjdump(cubin, "--dump-resource-usage"))
    return {name: int(value) for name, value in found}


def _cuobjdump(cubin: bytes, what: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(tool), what, file.name], capture_output=True, text=True, check=True).stdout


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Ahead-of-time compile report of the pinned configurations.")
    parser.add_argument("archs", nargs="*", default=[f"sm_{arch}" for arch in ARCHITECTURES], metavar="sm_NN")
    parser.add_argument("--quick", action="store_true", help="three variants of each kernel")
    args = parser.parse_args(argv)
    archs = [int(name.removeprefix("sm_")) for name in args.archs]
    lines = compile_report(archs, QUICK if args.quick else VARIANTS)
    print(HEADER)
    for line in lines:
        print(line)
    spilling = sum(not line.ok for line in lines)
    print(f"{len(lines)} variants compiled, {spilling} spill")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
