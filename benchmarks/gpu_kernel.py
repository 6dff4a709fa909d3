"""Part b: the fused loss beside its peers on one card, in turns with the bare GEMMs of the same work.

Every ratio is to products that ran between the contender's own calls: 4U with outputs in bf16, 3U and 2U where the head
is frozen and where nothing is trained. The same products with dW in fp32 are a row of their own. The gate comes first;
memory is above inputs and gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import workloads
from contenders import CONTENDERS, NEEDS, YARDSTICKS, Loss, bare_gemms, cross_entropy, fused, step
from suite import Recorder, Row, in_turns, markdown, missing, ms, synchronize, timed
from torch import Tensor

from hsd_kernels import Divergence

GATE_SHAPE = (96, 64, 1000)
GATE = 0.2  # relative L1 against fp64, bf16 inputs: is it the same function at all?
FLOOR_ROWS = {"cuda": (2048, 4096, 8192), "cpu": (32, 64)}
MAIN = {"cuda": [(8192, 4096, 151_936), (32_768, 4096, 151_936)], "cpu": [GATE_SHAPE, (64, 32, 256)]}
ANCHORS = {"cuda": [(n, 4096, 128_256) for n in (1024, 4096, 8192)], "cpu": [(48, 32, 320)]}
REPEATS = {"cuda": 5, "cpu": 1}


@dataclass(frozen=True)
class Work:
    """What a contender does of forward and backward: which gradients, and so which floor."""

    units: int = 4  # of 2 N D V FLOPs
    hidden: bool = True
    head: bool = True

    @property
    def backward(self) -> str:
        return " ".join(name for name, wanted in (("dH", self.hidden), ("dW", self.head)) if wanted)


ALL, FROZEN, NOTHING = Work(), Work(3, head=False), Work(2, hidden=False, head=False)
LABELS = Work(3)  # cross-entropy: no teacher
CLIPPED = Divergence(clip=0.05)  # OPSD's


def ours(**options: Any) -> Loss:
    return lambda *tensors: fused(*tensors, **options)


def with_stats(*tensors: Tensor) -> Tensor:
    return fused(*tensors, return_stats=True).loss


OURS: dict[str, tuple[Loss, Work]] = {
    "hsd_kernels": (CONTENDERS["hsd_kernels"], ALL),
    "hsd_kernels, 512 MiB": (ours(memory_bytes=512 << 20), ALL),
    "hsd_kernels, 1 GiB": (ours(memory_bytes=1 << 30), ALL),
    "hsd_kernels, 4.6 GiB": (ours(memory_bytes=round(4.6 * 2**30)), ALL),
    "hsd_kernels, linear bf16": (CONTENDERS["hsd_kernels, linear bf16"], ALL),
    "hsd_kernels, linear bf16, 4.6 GiB": (ours(logits_dtype=torch.bfloat16, memory_bytes=round(4.6 * 2**30)), ALL),
    "hsd_kernels, reverse KL": (ours(divergence="reverse_kl"), ALL),
    "hsd_kernels, JSD": (ours(divergence="jsd"), ALL),
    "hsd_kernels, clip": (ours(divergence=CLIPPED), ALL),
    "hsd_kernels, head frozen": (CONTENDERS["hsd_kernels"], FROZEN),
    "hsd_kernels, no gradient": (with_stats, NOTHING),
    "hsd_kernels, torch rows": (ours(impl="torch"), ALL),
}
PEERS: dict[str, tuple[Loss, Work]] = {
    **{
        name: (CONTENDERS[name], ALL)
        for name in (
            "naive full logits",
            "naive, torch.compile",
            "TRL chunked",
            "Liger chunked",
            "Liger Triton JSD",
            "FLA fused KL",
        )
    },
    **{name: (loss, LABELS) for name, loss in YARDSTICKS.items()},
}
# At N = 32,768 and at the anchors' shape only what the page compares there.
LARGE = ("hsd_kernels", "hsd_kernels, 4.6 GiB", "hsd_kernels, linear bf16", "TRL chunked")
LARGE += ("hsd_kernels, linear bf16, 4.6 GiB", "hsd_kernels, head frozen", "hsd_kernels, no gradient", "Liger chunked")
ANCHORED = ("hsd_kernels", "hsd_kernels, 4.6 GiB", "hsd_kernels, linear bf16", "TRL chunked", "Liger chunked")
ANCHORED += ("Liger Triton JSD", "naive full logits", "CCE cross-entropy")
COMPILED = "naive, torch.compile"
OTHER_FUNCTION = {"hsd_kernels, reverse KL": "reverse_kl", "hsd_kernels, JSD": "jsd", "hsd_kernels, clip": CLIPPED}


def run(recorder: Recorder) -> None:
    device = recorder.device
    if not recorder.wants("kernel"):
        return
    red = {name: gate(recorder, name, *given) for name, given in (OURS | PEERS).items() if name != COMPILED}
    main, *large = MAIN[device]
    everyone = tuple(name for name in OURS | PEERS if name != COMPILED)
    plan = [(main, everyone), *((shape, LARGE) for shape in large), *((shape, ANCHORED) for shape in ANCHORS[device])]
    plan.append((main, (COMPILED,)))  # last: it may compile for a minute
    for shape, names in plan:
        tensors: list[workloads.Workload] = []
        rows = floor_rows(recorder, shape, tensors)
        for name in names:
            key = {"shape": shape, "contender": name}
            if name not in red:
                red[name] = gate(recorder, name, *(OURS | PEERS)[name])
            if red[name] is not None:
                recorder.skip("kernel", key, red[name] or "")
                continue
            measured = functools.partial(measure, *(OURS | PEERS)[name], tensors, shape, rows, device)
            recorder.row("kernel", key, measured, seconds=90)


def gate(recorder: Recorder, name: str, loss: Loss, work: Work) -> str | None:
    """Why ``name`` gets no time, or None."""
    from hsd_kernels.reference import hsd_kl

    device = recorder.device
    absent = missing(*NEEDS.get(name, ()))
    if absent is None and device == "cpu" and name in ("Liger Triton JSD", "FLA fused KL", *YARDSTICKS):
        absent = "needs a GPU"
    if absent is not None:
        return absent

    def law(*tensors: Tensor) -> Tensor:
        if work is LABELS:
            return cross_entropy(*tensors)
        return hsd_kl(*tensors, divergence=OTHER_FUNCTION.get(name, "forward_kl"))

    def compare() -> Row:
        small = workloads.gaussian(GATE_SHAPE, torch.bfloat16, device, seed=1)
        if work is NOTHING:
            student, teacher, weight = (t.double().cpu() for t in small)
            want, found = [law(student, teacher, weight)], [loss(*small)]
        else:
            want = list(step(law, *(t.double().cpu() for t in small)))
            found = list(step(loss, *small))
        pairs = zip(found, want, strict=True)
        errors = [((a.double().cpu() - b).abs().sum() / b.abs().sum()).item() for a, b in pairs]
        row: Row = {"errors": errors}
        return row if max(errors) < GATE else row | {"failed": f"gate: relative error {max(errors):.2g} against fp64"}

    return recorder.row("gate", {"contender": name}, compare, seconds=120).get("failed")


def floor_rows(recorder: Recorder, shape: tuple[int, int, int], tensors: list[workloads.Workload]) -> int:
    """The fastest chunk of the bare GEMMs at this shape, of both dtypes of dW; fills ``tensors`` if asked for."""
    device = recorder.device
    rows = [r for r in FLOOR_ROWS[device] if r <= max(shape[0], min(FLOOR_ROWS[device]))]

    def scan() -> Row:
        given = ready(tensors, shape, device)
        found: Row = {}
        for kind, wide in (("bf16", False), ("fp32", True)):
            times = {r: timed(bare_gemms(*given, r, wide_dw=wide), device, 2)["median"] for r in rows}
            best = min(times, key=lambda r: times[r])
            found |= {f"{kind} dW": times[best], f"{kind} rows": best, f"{kind} all": times}
        return found

    return recorder.row("bare", {"shape": shape}, scan).get("bf16 rows", rows[0])


def ready(tensors: list[workloads.Workload], shape: tuple[int, int, int], device: str) -> workloads.Workload:
    if not tensors:
        tensors.append(workloads.gaussian(shape, torch.bfloat16, device))
    return tensors[0]


def measure(
    loss: Loss, work: Work, tensors: list[workloads.Workload], shape: tuple[int, int, int], rows: int, device: str
) -> Row:
    student, teacher, weight = ready(tensors, shape, device)
    leaves = [student.detach().requires_grad_(work.hidden), weight.detach().requires_grad_(work.head)]

    def clear() -> None:
        for leaf in leaves:
            leaf.grad = None

    def call() -> None:
        clear()
        value = loss(leaves[0], teacher, leaves[1])
        if value.requires_grad:
            value.backward()

    peak = peak_above(call, clear, device)
    gradients = sum(leaf.nbytes for leaf in leaves if leaf.requires_grad)
    bare = bare_gemms(student, teacher, weight, rows, backward=work.backward)
    if work is LABELS:  # the same products without the teacher's: two thirds of them are the student's own
        bare = bare_gemms(student[: len(student) // 2], teacher[len(student) // 2 :], weight, rows)
    ours, floor = in_turns(call, bare, device, REPEATS[device])
    scale = 1.5 if work is LABELS else 1.0  # half the tokens at 4U are two thirds of 3U
    floor = {k: v * scale for k, v in floor.items()}
    row = ours | {"floor": floor["median"], "ratio": ours["median"] / floor["median"], "units": work.units}
    return row | {"extra_bytes": None if peak is None else peak - gradients}


def peak_above(call: Callable[[], Any], clear: Callable[[], Any], device: str) -> int | None:
    """Peak of the second call above what is allocated before it, gradients included, of CUDA's allocator."""
    call(), clear()
    if device != "cuda":
        return None
    synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    synchronize(device)
    return torch.cuda.max_memory_allocated() - before


def table(rows: list[Row]) -> str:
    """A table for each shape; the gate's errors, of loss / dH / dW, stand in the first."""
    gates = {r["contender"]: r.get("errors", []) for r in rows if r["table"] == "gate"}
    kernel = [r for r in rows if r["table"] == "kernel"]
    tables = []
    for shape in dict.fromkeys(tuple(r["shape"]) for r in kernel):
        cells = []
        for r in [r for r in rows if r["table"] == "bare" and tuple(r["shape"]) == shape and "failed" not in r]:
            for kind in ("bf16", "fp32"):
                name = f"bare GEMMs (4U), {kind} dW, chunks of {r[f'{kind} rows']}"
                cells.append([name, ms(r[f"{kind} dW"]), "", "", "", ""])
        for r in [r for r in kernel if tuple(r["shape"]) == shape]:
            errors = "" if tables else " / ".join(f"{e:.1e}" for e in gates.get(r["contender"], []))
            if "failed" in r:
                cells.append([r["contender"], f"failed: {r['failed']}", "", "", "", errors])
                continue
            spread = f"{ms(r['p20'])} to {ms(r['p80'])}"
            extra = "" if r["extra_bytes"] is None else f"{r['extra_bytes'] / 1e9:.2f}"
            cells.append([r["contender"], ms(r["median"]), spread, f"{r['ratio']:.2f} of {r['units']}U", extra, errors])
        header = [f"N, D, V = {', '.join(map(str, shape))}", "ms", "p20 to p80", "x GEMMs", "GB above", "errors"]
        tables.append(markdown(header, cells))
    return "\n\n".join(tables)
