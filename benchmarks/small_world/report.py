"""report.md, its pictures and results.json, out of the JSON files of finished runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.small_world import pictures, tables
from benchmarks.small_world.plan import ABLATIONS, MAIN, PILOT, PILOT_RATES
from benchmarks.small_world.queue import Job, result
from benchmarks.small_world.results import final, interval, rows, warm_starts
from benchmarks.timing import environment, header
from hsd.methods import METHODS


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
    (folder / "results.json").write_text(_one_line_a_run(facts))
    parts = {r["run"]["part"] for r in facts["runs"]}
    drawn = pictures.draw(folder, facts) if len(parts) > 1 else []
    text = render(facts, drawn)
    (folder / "report.md").write_text(text)
    return text


def _one_line_a_run(facts: dict[str, Any]) -> str:
    """JSON of which two versions can be compared."""
    items = []
    for name, value in facts.items():
        lines = name in ("warm", "runs")
        text = "[\n" + ",\n".join(map(json.dumps, value)) + "\n]" if lines else json.dumps(value)
        items.append(f"{json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(items) + "\n}\n"


def _flat(found: dict[str, Any]) -> dict[str, Any]:
    return {**found["asked"], **{k: v for k, v in found.items() if k != "asked"}}


def render(facts: dict[str, Any], drawn: Sequence[str]) -> str:
    """The report as Markdown; ``drawn`` are the pictures that there were data for."""
    runs = facts["runs"]
    if len({r["run"]["part"] for r in runs}) == 1:  # a part by itself
        own = (tables.league(runs), tables.chains(runs), *_held(runs))
        return "\n\n".join("\n".join(s) for s in (_head(facts), *own, _cost(facts)) if s) + "\n"
    sections = [
        _head(facts),
        tables.main(facts),
        _picture(drawn, "curves.png"),
        _settings(facts["runs"]),
        tables.league(facts["runs"]),
        _picture(drawn, "league.png"),
        tables.chains(facts["runs"]),
        *_held(facts["runs"]),
        tables.credit(warm_starts(facts)),
        tables.teachers(facts),
        tables.coverage(facts["runs"], warm_starts(facts)),
        _picture(drawn, "coverage.png"),
        *(tables.ablation(facts["runs"], part) for part in ABLATIONS),
        tables.unclipped(facts["runs"]),
        tables.half(facts),
        _picture(drawn, "sweeps.png"),
        _pilot(facts["runs"]),
        tables.slow(facts["runs"]),
        _cost(facts),
    ]
    return "\n\n".join("\n".join(s) for s in sections if s) + "\n"


def _held(runs: Sequence[dict]) -> list[list[str]]:
    return [table(runs, part) for part in tables.HELD for table in (tables.held, tables.probes)]


def _head(facts: dict[str, Any]) -> list[str]:
    scale = (facts["runs"] or facts["warm"] or [{"scale": {}}])[0]["scale"]
    said = [
        "# The small world as an experiment: results",
        "",
        f"Written by `{facts['command']}`: {header(facts['environment'])}. Scale: "
        + ", ".join(f"{k} {v}" for k, v in scale.items())
        + ". What is compared, and what we make of it: benchmarks/small_world/README.md.",
        "",
        "Success is the share of held-out questions answered correctly at temperature 1, one sample each. Intervals "
        "are 95 % (Student's t) over seeds; a seed is a warm start, its training and its held-out questions. Of two "
        "seeds both values are shown, and no interval.",
    ]
    if facts["missing"]:
        said += ["", f"Not run, {len(facts['missing'])}: " + ", ".join(facts["missing"]) + "."]
    return said


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
            used = METHODS[method]
            hidden = set(["loss_type"] if used.has_teacher else shown[1:12])  # what this method does not use
            hidden |= set() if not used.has_teacher or s["policy_coef"] else {"scale_rewards"}
            hidden |= set() if s["teacher"] == "ema" else {"teacher_ema_rate"}
            hidden |= set() if used.draws_peers else {"peer_rule"}
            lines.append(f"| {method} | " + " | ".join("-" if k in hidden else str(s[k]) for k in shown) + " |")
    return lines if len(lines) > 4 else []


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
