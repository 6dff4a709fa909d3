"""``hsd doctor``: versions, the kernels and attention backends that a run would use and why, how isolated code runs.
Works without the ``[train]`` extras and names what is missing."""

from __future__ import annotations

import argparse
import json
import os
import platform
import warnings
from collections.abc import Callable
from importlib import metadata
from typing import Any

HELP = "what is installed, which kernels and attention backends will be used and why, how isolated code runs"
PACKAGES = {
    "kernel": ("torch",),
    "trainer": ("transformers", "trl", "accelerate", "datasets", "peft", "math-verify", "sympy", "matplotlib"),
    "optional": (
        *("triton", "vllm", "deepspeed", "liger-kernel", "flash-attn", "gguf"),
        *("trackio", "wandb", "tensorboard"),
    ),
}
Facts = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """0, or 1 if a part is broken (not if it is only missing)."""
    report = examine()
    print(json.dumps(report, indent=2) if args.json else render(report))
    return 1 if _broken(report) else 0


def examine() -> Facts:
    """Every section's facts; a section that raises is ``{"broken": why}`` and does not hide the others."""
    sections: dict[str, Callable[[], Facts]] = {
        "packages": packages,
        "machine": machine,
        "row kernels": row_kernels,
        "matrix products": matrix_products,
        "tree attention": tree_attention,
        "verifiers": verifiers,
    }
    return {name: _tried(section) for name, section in sections.items()}


def packages() -> Facts:
    found: Facts = {}
    for group in PACKAGES.values():
        for name in group:
            try:
                found[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                found[name] = None
    return found


def machine() -> Facts:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: Facts = {"python": platform.python_version(), "system": platform.platform(), "cpu": _cpu(), "cores": cores}
    try:
        import torch
    except ImportError:
        return found | {"gpus": [], "why no gpu": "torch is not installed"}
    found["threads of torch"] = torch.get_num_threads()
    found["gpus"] = [
        f"{torch.cuda.get_device_name(i)} (sm_{''.join(map(str, torch.cuda.get_device_capability(i)))}, "
        f"{torch.cuda.get_device_properties(i).total_memory / 2**30:.0f} GiB)"
        for i in range(torch.cuda.device_count())
    ]
    if not found["gpus"]:
        built = "built without CUDA" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
        found["why no gpu"] = f"torch sees none ({built})"
    return found


def row_kernels() -> Facts:
    """What ``impl="auto"`` takes, by device and dtype of the logits."""
    import torch

    from hsd_kernels import native, rows

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    chosen: Facts = {}
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # a broken library is a line of its own
                module = rows.resolve("auto", torch.device(device), dtype).__name__.rpartition(".")[2]
            name = next(impl for impl, file in rows.MODULES.items() if file == module)
            chosen[f"{device} {str(dtype).removeprefix('torch.')}"] = {"impl": name, "why": _why_rows(device, name)}
    if "cuda" not in devices:
        chosen["cuda"] = {"impl": None, "why": "no GPU; with one of sm_80 or later: triton, else torch"}
    library: Facts = {"built": native.find() is not None}
    try:
        library |= {"instructions": native.VARIANTS[native.facts().fastest], "file": str(native.find())}
    except ValueError:
        library["why"] = f"not built; run `{native.BUILD}`"
    except RuntimeError as error:
        library["broken"] = str(error)
    chosen["C++ library"] = library
    return chosen


def _why_rows(device: str, name: str) -> str:
    import torch

    if device == "cuda":
        capability = 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]
        if name != "triton":
            return f"sm_{capability} is below sm_80, or triton is not installed"
        from hsd_kernels.configs import KERNELS, row_config

        pinned = {kernel: row_config(kernel, capability) for kernel in KERNELS}
        return "; ".join(f"{kernel}: {c.block_v} columns, {c.num_warps} warps" for kernel, c in pinned.items())
    if name == "cpp":
        return "the C++ library is built"
    return "the C++ library is not built, or it does not load"


def matrix_products() -> Facts:
    """Who multiplies bf16 operands on this CPU, by `hsd_kernels.gemm.plan`, and what that follows from."""
    import torch

    from hsd_kernels import gemm

    bf16, a = torch.bfloat16, torch.zeros(2, 2, dtype=torch.bfloat16)
    plans: dict[str, gemm.By] = {
        "logits": gemm.plan("logits", a, a, torch.float32),
        "dH": gemm.plan("dH", a, a, bf16),
        "dW": gemm.plan("dW", a, a, torch.float32),
    }
    found: Facts = {f"cpu bfloat16, {name}": {"impl": by, "why": gemm.BY[by]} for name, by in plans.items()}
    here = gemm.machine()
    return found | {
        "bf16 instructions": here.bf16,
        "C++ products": [name for name in ("tiles", "vdpbf16ps") if getattr(here, name)],
        "MKL's product": here.mkl,
        "cuda bfloat16": "cuBLAS, out_dtype=float32",
    }


def tree_attention() -> Facts:
    """What ``backend="auto"`` takes for the forward pass over a group's prefix tree."""
    import torch

    try:
        from hsd.policy.tree.attention import choose_backend
    except ImportError as error:
        return {"all": {"backend": None, "why": f"{error}: the trainer's extras are not installed"}}

    half, wide = torch.bfloat16, torch.float32
    cases = {  # device, dtype, branches, soft cap, sinks, what the choice follows from
        "cpu, few branches": ("cpu", wide, 1, None, False, "a full mask costs less than gathering"),
        "cpu, many branches": ("cpu", wide, 16, None, False, "each branch gathers the keys on its path only"),
        "cuda float32": ("cuda", wide, 16, None, False, "the kernels for CUDA take half precision only"),
        "cuda bfloat16": ("cuda", half, 16, None, False, "half precision"),
        "cuda bfloat16, soft cap": ("cuda", half, 16, 30.0, False, "varlen has no soft cap"),
        "cuda bfloat16, sinks": ("cuda", half, 16, None, True, "neither kernel has sinks"),
    }
    found: Facts = {}
    for name, (device, dtype, branches, softcap, sinks, why) in cases.items():
        rows = [500] * branches
        backend = choose_backend(device, dtype, rows, rows, sum(rows), softcap, sinks)
        found[name] = {"backend": backend, "why": why}
    if not torch.cuda.is_available():
        found["note"] = "no GPU here: the lines for cuda say what one would use"
    return found


def verifiers() -> Facts:
    from hsd.verify.sandbox import isolation

    without = "text and plain numbers; what needs SymPy gets no reward: math-verify is missing"
    found: Facts = {"math": "math-verify" if packages()["math-verify"] else without}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a weak sandbox is a line here
        here = isolation()
    stopped = {answer: [what for what, stops in here.stops.items() if stops is answer] for answer in (True, False)}
    found |= {"code sandbox": str(here), "level": here.level, "layers": list(here.layers), "stops": stopped[True]}
    return found | ({"does not stop": stopped[False], "remedy": here.remedy} if stopped[False] else {})


def render(report: Facts) -> str:
    lines = []
    for title, section in report.items():
        lines += ["", title]
        if title == "packages" and "broken" not in section:
            lines += _package_lines(section)
            continue
        for name, value in section.items():
            text = ", ".join(map(str, value)) or "none" if isinstance(value, list) else value
            if isinstance(value, dict):
                head = next(iter(value.values()))
                rest = "; ".join(str(v) if k == "why" else f"{k}: {v}" for k, v in list(value.items())[1:])
                text = f"{'-' if head is None else head}{f'  ({rest})' if rest else ''}"
            lines.append(f"  {name:<24} {text}")
    return "\n".join(lines[1:])


def _install_trainer() -> str:
    from hsd_kernels.native import IS_CHECKOUT

    in_checkout = "pip install -c constraints.txt --no-build-isolation -e '.[train]'"
    return in_checkout if IS_CHECKOUT else "pip install 'hsd-kernels[train]'"


def _package_lines(found: Facts) -> list[str]:
    lines = []
    for group, names in PACKAGES.items():
        have = ", ".join(f"{name} {found[name]}" for name in names if found[name])
        lack = ", ".join(name for name in names if not found[name])
        fix = f"; run `{_install_trainer()}`" if group == "trainer" else ""
        lines.append(f"  {group:<24} {have or '-'}{f'  (missing: {lack}{fix})' if lack else ''}")
    return lines


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _tried(section: Callable[[], Facts]) -> Facts:
    try:
        return section()
    except Exception as error:  # the doctor reports what is broken, whatever it is
        return {"broken": f"{type(error).__name__}: {error}"}


def _broken(facts: Facts) -> bool:
    return "broken" in facts or any(_broken(value) for value in facts.values() if isinstance(value, dict))
