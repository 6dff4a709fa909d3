"""report.md, its pictures and results.json, out of the JSON files of finished runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.small_world import paper, pictures
from benchmarks.small_world.plan import ABLATIONS, BASE_ROW, HALF, MAIN, PILOT, PILOT_RATES
from benchmarks.small_world.queue import Job, result
from benchmarks.small_world.results import coverage_bins, curve_mean, final, interval, paired, rows, warm_starts
from benchmarks.timing import environment, header
from hsd.credit import coverage_peak

TEACHERS = {"with_peer": "peer + answer", "answer_only": "answer only"}
TITLES = {
    "teacher": "Teacher kind",
    "fallback": "Fallback of a rollout without a peer",
    "policy_coef": "HSD plus the GRPO advantage",
    "G": "Group size, 64 rollouts a step",
    "reference_coef": "Reference coefficient (beta)",
    "peer_rule": "Peer rule",
    "divergence": "Divergence",
}


def write(out: Path, folder: Path, jobs: Sequence[Job], command: str) -> str:
    """Gather what is finished in ``out`` into ``folder``: results.json, pictures, report.md. Returns the report."""
    found = {job.key: result(out, job) for job in jobs}
    facts: dict[str, Any] = {
        "command": command,
        "environment": environment("cpu"),
        "missing": [key for key, value in found.items() if value is None],
        "warm": [_flat(v) for v in found.values() if v is not None and "run" not in v["asked"]],
        "runs": [_flat(v) for v in found.values() if v is not None and "run" in v["asked"]],
    }
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(facts | {"warm": [], "runs": []})[:-1]]
    for name in ("warm", "runs"):  # one line a run: differences between two versions can be read
        lines += [f', "{name}": [', ",\n".join(json.dumps(row) for row in facts[name]), "]"]
    whole = "\n".join(lines).replace(', "warm": [], "runs": []', "", 1) + "\n}\n"
    (folder / "results.json").write_text(whole)
    drawn = pictures.draw(folder, facts)
    text = render(facts, drawn)
    (folder / "report.md").write_text(text)
    return text


def _flat(found: dict[str, Any]) -> dict[str, Any]:
    return {**found["asked"], **{k: v for k, v in found.items() if k != "asked"}}


def render(facts: dict[str, Any], drawn: Sequence[str]) -> str:
    """The report as Markdown; ``drawn`` are the pictures that there were data for."""
    sections = [
        _head(facts),
        _main(facts),
        _picture(drawn, "curves.png"),
        _settings(facts["runs"]),
        _credit(warm_starts(facts)),
        _teachers(facts),
        _coverage(facts["runs"], warm_starts(facts)),
        _picture(drawn, "coverage.png"),
        *(_ablation(facts["runs"], part) for part in ABLATIONS),
        _half(facts),
        _picture(drawn, "sweeps.png"),
        _pilot(facts["runs"]),
        _cost(facts),
    ]
    return "\n\n".join("\n".join(s) for s in sections if s) + "\n"


def _head(facts: dict[str, Any]) -> list[str]:
    scale = (facts["runs"] or facts["warm"] or [{"scale": {}}])[0]["scale"]
    said = [
        "# The small world as an experiment: results",
        "",
        f"Written by `{facts['command']}`: {header(facts['environment'])}. Scale: "
        + ", ".join(f"{k} {v}" for k, v in scale.items())
        + ". What is compared, and what we make of it: [README](../README.md).",
        "",
        "Success is the share of held-out questions answered correctly at temperature 1, one sample each. Intervals "
        "are 95 % (Student's t) over seeds; a seed is a warm start, its training and its held-out questions. Of two "
        "seeds both values are shown, and no interval.",
    ]
    if facts["missing"]:
        said += ["", f"Not run, {len(facts['missing'])}: " + ", ".join(facts["missing"]) + "."]
    return said


def _main(facts: dict[str, Any]) -> list[str]:
    runs = facts["runs"]
    found = {m: rows(runs, "main", m) for m in MAIN}
    found = {m: by_seed for m, by_seed in found.items() if by_seed}
    if not found:
        return []
    steps = [step for step, _ in next(iter(found["hsd"].values()))["curve"]] if "hsd" in found else []
    start = interval([w["final"]["mean"] for w in warm_starts(facts)])
    ranked = sorted(found, key=lambda m: -interval([final(r) for r in found[m].values()]).mean)
    lines = [
        "## Methods",
        "",
        f"From warm starts with success {start} on the same questions. `curve` is success on the validation questions.",
        "",
        "| method | seeds | final success | HSD - it, paired | each seed | curve at step "
        + " / ".join(map(str, steps))
        + " | curve mean | paper, AIME-25 |",
        "|---" * 8 + "|",
    ]
    for method in ranked:
        by_seed = found[method]
        ends = [final(by_seed[s]) for s in sorted(by_seed)]
        gap = paired(found.get("hsd", {}), by_seed) if method != "hsd" else None
        curve = [_at(by_seed, step) for step in steps]
        lines.append(
            f"| {method} | {len(ends)} | {interval(ends)} | {_signed(gap)} | {_each(ends)} | "
            + " / ".join(f"{c:.2f}" for c in curve)
            + f" | {interval([curve_mean(r) for r in by_seed.values()])} | {paper.METHODS[method]} |"
        )
    order = sorted(found, key=lambda m: -paper.METHODS[m])
    lines += ["", f"Order here: {', '.join(ranked)}. In the paper: {', '.join(order)}."]
    alarms = [
        f"{m}, seed {s}: {text}" for m in ranked for s, r in sorted(found[m].items()) for text in r["alarms"].values()
    ]
    return [*lines, "", "Alarms: " + ("; ".join(alarms) if alarms else "none") + "."]


def _at(by_seed: dict[int, dict], step: int) -> float:
    values = [dict(map(tuple, r["curve"]))[step] for r in by_seed.values()]
    return sum(values) / len(values)


def _settings(runs: Sequence[dict]) -> list[str]:
    shown = (
        "learning_rate teacher teacher_ema_rate show_answer peer_rule fallback divergence kl_clip loss_mean "
        "divergence_coef policy_coef reference_coef loss_type scale_rewards"
    ).split()
    lines = ["## What was used", "", "| method | " + " | ".join(shown) + " |", "|---" * (len(shown) + 1) + "|"]
    for method in MAIN:
        by_seed = rows(runs, "main", method)
        if by_seed:
            s = next(iter(by_seed.values()))["settings"]
            trl = method in ("grpo", "dr_grpo", "dapo")
            hidden = shown[1:12] if trl else ["loss_type", "scale_rewards"] if not s["policy_coef"] else ["loss_type"]
            if s["teacher"] != "ema":
                hidden = [*hidden, "teacher_ema_rate"]
            lines.append(f"| {method} | " + " | ".join("-" if k in hidden else str(s[k]) for k in shown) + " |")
    return lines if len(lines) > 4 else []


def _credit(warm: Sequence[dict]) -> list[str]:
    credits = [w["credit"] for w in warm if "mass" in w["credit"]]
    if not credits:
        return []
    windows = credits[0]["windows"]
    failing = sum(c["failing_with_peer"] for c in credits)
    taus = ", ".join(f"{c['median_tau']:.0f}" for c in credits)
    lines = [
        "## Where the credit lands",
        "",
        f"Before training, {failing} failing rollouts with a peer, G = 8, {len(credits)} warm starts; median tau "
        f"{taus} of about 36 tokens. Share of |A| within w tokens of tau, percent; the paper's rows are Qwen3-8B's.",
        "",
        "| teacher | " + " | ".join(f"w = {w}" for w in windows) + " | mean \\|A\\|, nats | \\|A\\| at tau, nats |",
        "|---" * (len(windows) + 3) + "|",
    ]
    for name, label in TEACHERS.items():
        mass = [_percent([c["mass"][name][i] for c in credits]) for i in range(len(windows))]
        rest = [str(interval([c[k][name] for c in credits])) for k in ("mean_abs", "at_tau")]
        lines.append(f"| {label} | " + " | ".join([*mass, *rest]) + " |")
    for name, mass in paper.CREDIT_MASS.items():
        lines.append(f"| paper, {name} | " + " | ".join(str(mass[w]) for w in windows) + " | | |")
    return lines


def _teachers(facts: dict[str, Any]) -> list[str]:
    """What each teacher can do itself; the same of the weaker ones that the runs of "half" have."""
    lines = [
        "## How good the teachers are",
        "",
        "Of the warm starts, on the same groups: success of a teacher that writes the solution itself, and what it "
        "does with a failing rollout cut after tau: the share of continuations that go on from the rollout's own "
        "numbers to the end, and of those that also add rightly.",
        "",
        "| warm start | context | success | after tau: goes on | adds rightly |",
        "|---|---|---|---|---|",
    ]
    for part in ("main", "half"):
        warm = [w for w in warm_starts(facts, part) if w["after_tau"]]
        for name, label in {**TEACHERS, "alone": "none (the student)"}.items():
            if warm:
                own = [w["final"]["mean"] if name == "alone" else w["teacher_success"][name] for w in warm]
                after = [interval([w["after_tau"][name][i] for w in warm]) for i in (0, 1)]
                lines.append(
                    f"| {warm[0]['warm_steps']} steps, {len(warm)} seeds | {label} | {interval(own)} | {after[0]} | "
                    f"{after[1]} |"
                )
    return lines if len(lines) > 6 else []


def _half(facts: dict[str, Any]) -> list[str]:
    """The same methods from warm starts with worse teachers."""
    lines = [
        "## Warm starts of half the steps",
        "",
        "Final success minus that of the warm start, same questions, same seeds.",
        "",
        "| method | seeds | from the half | from the whole |",
        "|---|---|---|---|",
    ]
    starts = {part: {w["seed"]: w["final"]["mean"] for w in warm_starts(facts, part)} for part in ("half", "main")}
    for method in HALF:
        found = {part: rows(facts["runs"], part, method) for part in ("half", "main")}
        seeds = sorted(found["half"].keys() & found["main"].keys())
        if seeds:
            gains = [
                " ".join(f"{final(found[part][s]) - starts[part][s]:+.3f}" for s in seeds) for part in ("half", "main")
            ]
            lines.append(f"| {method} | {', '.join(map(str, seeds))} | {gains[0]} | {gains[1]} |")
    return lines if len(lines) > 6 else []


def _percent(shares: Sequence[float]) -> str:
    i = interval([100 * s for s in shares])
    return f"{i.mean:.0f}" if i.half is None or i.n < 3 else f"{i.mean:.0f} ± {i.half:.0f}"


def _coverage(runs: Sequence[dict], warm: Sequence[dict]) -> list[str]:
    lines = [
        "## Coverage",
        "",
        "Share of a step's rollouts that fail and have a successful peer, by the step's success p; f = (1 - p) "
        "(1 - (1 - p)^(G - 1)) at each step's p, then averaged as the measured one is.",
        "",
        "| G | p | measured | f(p, G) | steps |",
        "|---|---|---|---|---|",
    ]
    for size in (4, 8, 16):
        for p, measured, formula, n in coverage_bins(runs, size):
            lines.append(f"| {size} | {p:.2f} | {measured:.3f} | {formula:.3f} | {n} |")
    if len(lines) == 6:
        return []
    peaks = ", ".join("G = {}: p* {:.3f}, f* {:.3f}".format(g, *coverage_peak(g)) for g in (4, 8, 16))
    lines += ["", f"Peaks of the formula: {peaks}."]
    before = [w["credit"] for w in warm]
    if before:
        p, c, f = (interval([b[k] for b in before]) for k in ("success", "coverage", "formula"))
        lines += [f"Before training, G = 8, held out: success {p}, coverage {c}, f {f}."]
    return lines


def _ablation(runs: Sequence[dict], part: str) -> list[str]:
    base = rows(runs, "main", "hsd")
    found = {name: rows(runs, part, name) for name in ABLATIONS[part]}
    found = {name: by_seed for name, by_seed in found.items() if by_seed}
    if not found or not base:
        return []
    seeds = sorted({s for by_seed in found.values() for s in by_seed} & base.keys())
    printed = paper.ABLATIONS.get(part, {})
    lines = [
        f"## {TITLES[part]}",
        "",
        f"`{part}`, HSD otherwise as in the main table, seeds {', '.join(map(str, seeds))}.",
        "",
        f"| {part} | final success | each seed | minus {BASE_ROW[part]}, paired | curve mean | coverage, mean "
        "of steps | alarms | paper, AIME-25 |",
        "|---" * 8 + "|",
    ]
    everything = {BASE_ROW[part]: {s: base[s] for s in seeds}, **found}
    for name in sorted(everything, key=_number_first):
        by_seed = everything[name]
        ends = [final(by_seed[s]) for s in sorted(by_seed)]
        gap = paired(by_seed, base) if name != BASE_ROW[part] else None
        covered = [x for r in by_seed.values() for x in r["steps"]["hsd/coverage"]]
        alarms = "; ".join(t for s in sorted(by_seed) for t in by_seed[s]["alarms"].values()) or "none"
        lines.append(
            f"| {name} | {interval(ends)} | {_each(ends)} | {_signed(gap)} | "
            f"{interval([curve_mean(r) for r in by_seed.values()])} | {sum(covered) / len(covered):.3f} | {alarms} | "
            f"{printed.get(name, '')} |"
        )
    return lines


def _pilot(runs: Sequence[dict]) -> list[str]:
    lines = [
        "## Pilot of the learning rate",
        "",
        "Seed 0, short runs; success on the validation questions at their end, none of which is a final one.",
        "",
        "| method | " + " | ".join(f"{rate:g}" for rate in PILOT_RATES) + " |",
        "|---" * (len(PILOT_RATES) + 1) + "|",
    ]
    for name in PILOT:
        cells = [rows(runs, "pilot", f"{name} {rate:g}").get(0) for rate in PILOT_RATES]
        if any(cells):
            lines.append(f"| {name} | " + " | ".join("-" if c is None else f"{final(c):.3f}" for c in cells) + " |")
    return lines if len(lines) > 6 else []


def _cost(facts: dict[str, Any]) -> list[str]:
    spent = {"warm starts": (len(facts["warm"]), sum(w["cpu_seconds"] for w in facts["warm"]))}
    for run in facts["runs"]:
        part = run["run"]["part"]
        name = part if part in ("main", "pilot") else "ablations"
        n, seconds = spent.get(name, (0, 0.0))
        spent[name] = n + 1, seconds + run["cpu_seconds"]
    total = sum(seconds for _, seconds in spent.values())
    lines = [
        "## Cost",
        "",
        "CPU seconds of the runs' processes, one thread each (imports, paid once, left out).",
        "",
        "| part | runs | CPU s | CPU s a run |",
        "|---|---|---|---|",
        *(f"| {name} | {n} | {seconds:.0f} | {seconds / n:.0f} |" for name, (n, seconds) in spent.items() if n),
        "",
        f"In all {total:.0f} CPU s: {total / 120:.0f} minutes on two cores that do nothing else.",
    ]
    steps = []
    for method in MAIN:
        by_seed = rows(facts["runs"], "main", method).values()
        if by_seed:
            each = [r["train_cpu_seconds"] / r["run"]["steps"] for r in by_seed]
            steps.append(f"{method} {interval(each).mean:.2f}")
    return [*lines, f"CPU s a training step, rollouts included: {', '.join(steps)}."] if steps else lines


def _picture(drawn: Sequence[str], name: str) -> list[str]:
    return [f"![{name.removesuffix('.png')}]({name})"] if name in drawn else []


def _signed(gap: Any) -> str:
    if gap is None:
        return ""
    return ("+" if gap.mean >= 0 else "") + str(gap)


def _each(values: Sequence[float]) -> str:
    return " ".join(f"{v:.3f}" for v in values)


def _number_first(name: str) -> tuple[float, str]:
    try:
        return float(name), ""
    except ValueError:
        return float("inf"), name
