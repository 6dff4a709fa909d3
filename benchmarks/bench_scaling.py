"""Time and memory against N, V and D, ours beside full logits, eager and compiled, and the bare GEMMs, with the plot.

    python benchmarks/bench_scaling.py [--device cpu|cuda] [--dtype bfloat16] [--json PATH]

One size is varied at a time around a centre: V from 32k to 256k, N from 256 to 65,536 and D from 512 to 8,192 on a GPU,
to 4,096 and 2,048 on a CPU, which takes minutes. PATH gets a .png beside it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from bench_kernel import FLOOR
from timing import environment, header, in_processes, save

KERNEL = str(Path(__file__).with_name("bench_kernel.py"))
NAMES = (FLOOR, "hsd_kernels", "naive full logits", "naive, torch.compile")
PLANS = {
    "cuda": {
        "centre": (8192, 4096, 151936),
        "N": (256, 1024, 4096, 16384, 65536),
        "D": (512, 1024, 2048, 4096, 8192),
        "V": (32768, 65536, 151936, 262144),
    },
    "cpu": {
        "centre": (1024, 512, 32768),
        "N": (256, 1024, 4096),
        "D": (256, 512, 1024, 2048),
        "V": (32768, 65536, 151936, 262144),
    },
    "toy": {"centre": (64, 64, 4096), "N": (32, 64), "D": (64, 128), "V": (4096, 8192)},
}


def shapes(plan: dict[str, tuple[int, ...]]) -> list[tuple[str, tuple[int, int, int]]]:
    """(which size is varied, shape) in order."""
    centre = plan["centre"]
    found = []
    for at, axis in enumerate("NDV"):
        for size in plan[axis]:
            shape = list(centre)
            shape[at] = size
            found.append((axis, (shape[0], shape[1], shape[2])))
    return found


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| varied | N, D, V | contender | median s | x GEMMs | peak MiB |", "|---|---|---|---|---|---|"]
    floors = {(r["axis"], tuple(r["shape"])): r.get("median") for r in rows if r["contender"] == FLOOR}
    for r in rows:
        start = f"| {r['axis']} | {', '.join(map(str, r['shape']))} | {r['contender']} | "
        floor = floors[r["axis"], tuple(r["shape"])]
        if "failed" in r:
            lines.append(start + f"failed: {r['failed']} | | |")
        else:
            ratio = f"{r['median'] / floor:.2f}" if floor else ""
            lines.append(start + f"{r['median']:.3g} | {ratio} | {r['peak_bytes'] / 2**20:.0f} |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(11, 6), sharey="row", constrained_layout=True)
    for column, axis in enumerate("NDV"):
        for name in NAMES:
            found = [r for r in rows if r["axis"] == axis and r["contender"] == name and "median" in r]
            x = [r["shape"]["NDV".index(axis)] for r in found]
            axes[0][column].loglog(x, [r["median"] for r in found], "o-", label=name)
            axes[1][column].loglog(x, [max(r["peak_bytes"], 1) / 2**20 for r in found], "o-", label=name)
        sizes = sorted({r["shape"]["NDV".index(axis)] for r in rows if r["axis"] == axis})
        for panel in axes[:, column]:
            panel.set_xticks(sizes, [f"{n:,}" for n in sizes])
            panel.minorticks_off()
        axes[1][column].set_xlabel({"N": "tokens N", "D": "hidden size D", "V": "vocabulary V"}[axis])
    axes[0][0].set_ylabel("forward + backward (s)")
    axes[1][0].set_ylabel("peak memory above inputs (MiB)")
    axes[0][0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--plan", choices=tuple(PLANS), help="sizes, the device's without it; toy is a dry run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    facts = environment(args.device) | {"dtype": args.dtype}
    print(header(facts))
    plan = shapes(PLANS[args.plan or args.device])
    rows = []
    for name in NAMES:
        job = {"contender": name, "dtype": args.dtype, "device": args.device}
        job |= {"workload": "gaussian", "repeats": args.repeats}
        rows += in_processes(KERNEL, [job | {"axis": axis, "shape": shape} for axis, shape in plan])
        rows.sort(key=lambda r: plan.index((r["axis"], r["shape"])))
        if args.json:  # after each contender: a run that is cut off leaves what it has
            save(args.json, facts, rows, table(rows))
    print(table(rows))
    if args.json:
        plot(rows, args.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
