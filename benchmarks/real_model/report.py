"""The report of what is finished: tables and a picture, from the runs' files."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.real_model.plan import PLANS, Row
from benchmarks.small_world.results import interval
from hsd.evaluate.interval import share, with_interval

FORMS = ("the sum, then its value", "a number alone", "other words")
SHORT = 10  # tokens; with its end
# What the demo is shown beside: the reward alone, the answer alone, another question's peer, and HSD itself.
BESIDE = ("hsd JSD 1 to 0 + policy", "hsd 1 to 0 + policy", "grpo", "hsd fixed", "opsd", "hsd unpaired")
TITLES = {"additions": "additions", "chain_sum": "chains of three numbers"}


def form_of(reply: str) -> str:
    """What a reply is made of, whether it is right or wrong; the sum counts where the reply opens with it."""
    text = reply.strip()
    if re.match(r"\d+\s*\+\s*\d+\s*(=|is|equals)\s*\d", text):
        return FORMS[0]
    return FORMS[1] if re.fullmatch(r"\d+\W*", text) else FORMS[2]


def forms(replies: Sequence[dict[str, Any]]) -> dict[str, tuple[float, float | None]]:
    """Of each form its share of the replies, and the success rate inside it; None where there is no such reply."""
    found = {}
    for form in FORMS:
        rewards = [r["reward"] for r in replies if form_of(r["reply"]) == form]
        found[form] = (len(rewards) / len(replies), sum(rewards) / len(rewards) if rewards else None)
    return found


def among_short(replies: Sequence[dict[str, Any]]) -> tuple[float | None, int]:
    """Success among replies that ended within `SHORT` tokens, and how many they are: gains that are not brevity's."""
    rewards = [r["reward"] for r in replies if r["ended"] and r["tokens"] <= SHORT]
    return (sum(rewards) / len(rewards) if rewards else None), len(rewards)


def load(folder: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """{row: {seed: run}}; a run of the plan, or the start."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for path in sorted(folder.glob("*-seed*.json")):
        run = json.loads(path.read_text())
        found.setdefault(run["asked"]["name"], {})[run["asked"]["seed"]] = run
    return found


def write(folder: Path, task: str = "additions") -> str:
    """``folder``/report.md and curves.png; where they are."""
    runs, plan = load(folder), PLANS[task]
    names = [name for name in ("start", *(row.name for row in plan)) if name in runs]
    trained = [run for by_seed in runs.values() for run in by_seed.values() if "steps" in run]
    if not runs:
        return f"{folder}: no run is finished"
    held_out = next(iter(next(iter(runs.values())).values()))["held_out"]
    option = "" if task == "additions" else f" --task {task}"
    parts = [
        f"# SmolLM2-135M-Instruct on {TITLES[task]}",
        f"Made by `python -m benchmarks.real_model{option} --report` from the files beside it. Held out:"
        f" {held_out['questions']} questions x {held_out['samples']} replies a seed, temperature 0.6. A seed draws the"
        " questions' split and order and the sampling; the model is the same."
        + " Seconds are wall seconds on a GPU that several runs shared; they order nothing."
        * any("wall_seconds" in run for run in trained),
        success_table(runs, names),
    ]
    if paired := paired_table(runs, names):
        parts.append("## Minus GRPO on the same seed\n\nMean and 95 % interval over seeds (Student's t).\n\n" + paired)
    if task == "additions":
        about = "## What the replies are made of\n\nAll seeds together: share of the replies, success inside."
        parts += [about, form_table(runs, names)]
    parts += [
        "## What was expected before the run, and found",
        expected_table(runs, plan),
        "## Steps\n\n" + steps_table(runs, plan),
        "![success of the rollouts against steps and seconds](curves.png)",
        "Rows of the plan that were not run: "
        + (", ".join(row.name for row in plan if row.name not in runs) or "none")
        + ".",
    ]
    (folder / "report.md").write_text("\n\n".join(parts) + "\n")
    if trained:
        plot(folder / "curves.png", runs, plan)
    beside = [row for row in plan if row.name in BESIDE and row.name in runs]
    if len(beside) > 1:
        plot(folder / "beside.png", runs, beside)
    return f"{folder / 'report.md'}: {sum(map(len, runs.values()))} runs"


def seconds(run: dict[str, Any]) -> list[float]:
    """Of each step: CPU seconds, or wall seconds where a GPU ran it."""
    return run.get("cpu_seconds") or run["wall_seconds"]


def success_table(runs: dict[str, dict[int, dict[str, Any]]], names: Sequence[str]) -> str:
    rows = []
    for name in names:
        by_seed = runs[name]
        seeds = " ".join(
            f"{s}: {with_interval(*(r['held_out'][key] for key in ('mean', 'low', 'high')))}"
            for s, r in sorted(by_seed.items())
        )
        every = [reply for r in by_seed.values() for reply in r["replies"]]
        short, n = among_short(every)
        rows.append(
            [
                name,
                pooled(by_seed),
                str(interval([r["held_out"]["mean"] for r in by_seed.values()])),
                seeds,
                "" if short is None else f"{short:.3f} of {n}",
                f"{sum(r['held_out']['mean_length'] for r in by_seed.values()) / len(by_seed):.1f}",
            ]
        )
    head = [
        "run",
        "success, all seeds",
        "mean ± over seeds",
        "each seed",
        f"among replies of <= {SHORT} tokens",
        "tokens",
    ]
    return table(head, rows)


def pooled(by_seed: dict[int, dict[str, Any]]) -> str:
    """Success over the questions of all seeds, with the interval over questions."""
    grid = []
    for run in by_seed.values():
        rewards, n = [r["reward"] for r in run["replies"]], run["held_out"]["samples"]
        grid += [rewards[at : at + n] for at in range(0, len(rewards), n)]
    found = share(grid)
    return with_interval(found.mean, found.low, found.high)


def paired_table(runs: dict[str, dict[int, dict[str, Any]]], names: Sequence[str]) -> str:
    """Differences of the rows that share two seeds or more with "grpo"; empty where there is none."""
    rows = []
    for name in names:
        seeds = sorted(runs[name].keys() & runs.get("grpo", {}).keys()) if name not in ("start", "grpo") else []
        if len(seeds) < 2:
            continue
        pairs = [(runs[name][seed], runs["grpo"][seed]) for seed in seeds]
        success = interval([ours["held_out"]["mean"] - theirs["held_out"]["mean"] for ours, theirs in pairs])
        rollouts = interval([of_rollouts(ours) - of_rollouts(theirs) for ours, theirs in pairs])
        rows.append([name, str(len(seeds)), str(success), str(rollouts)])
    return table(["run", "seeds", "held-out success", "mean success of all rollouts"], rows) if rows else ""


def of_rollouts(run: dict[str, Any]) -> float:
    """Mean over the steps: how fast it learns and where it ends, in one number."""
    rates = run["steps"]["hsd/success_rate"]
    return sum(rates) / len(rates)


def form_table(runs: dict[str, dict[int, dict[str, Any]]], names: Sequence[str]) -> str:
    rows = []
    for name in names:
        found = forms([reply for run in runs[name].values() for reply in run["replies"]])
        cells = [f"{100 * s:.0f} %" + ("" if rate is None else f", {rate:.2f}") for s, rate in found.values()]
        rows.append([name, *cells])
    return table(["run", *FORMS], rows)


def expected_table(runs: dict[str, dict[int, dict[str, Any]]], plan: Sequence[Row]) -> str:
    rows = []
    for row in plan:
        if row.name in runs:
            found = ", ".join(f"{r['held_out']['mean']:.3f}" for _, r in sorted(runs[row.name].items()))
            rows.append([row.name, row.expected, found])
    return table(["run", "expected", "found, each seed"], rows)


def steps_table(runs: dict[str, dict[int, dict[str, Any]]], plan: Sequence[Row]) -> str:
    """The median seconds of a step, wall seconds by part, median tau, and the teacher's own success in the run."""
    rows = []
    for row in plan:
        for seed, run in sorted(runs.get(row.name, {}).items()):
            steps = run["steps"]
            parts = [
                f"{name} {median(filled(steps[key])):.2f}"
                for name in ("sampling", "update", "optimizer")
                if filled(steps.get(key := f"time/{name}_s", []))
            ]
            shown = [f"{x:.2f}" for x in filled(steps.get("hsd/teacher_success", []))]
            means = [f"{x:.2f}" for x in by_span(steps["hsd/success_rate"])]
            taus = filled(steps.get("hsd/tau", []))
            alarm = "; ".join(run["alarms"].values())
            rows.append(
                [
                    row.name,
                    str(seed),
                    " ".join(means),
                    " ".join(shown) or "not measured",
                    f"{median(taus):.0f}" if taus else "",
                    f"{median(seconds(run)):.1f}",
                    ", ".join(parts),
                    alarm or "none",
                ]
            )
    head = [
        "run",
        "seed",
        "success of the rollouts, means of four steps or a tenth",
        "teacher's own, at steps 1, 6, 11, ...",
    ]
    return table([*head, "tau", "s a step", "wall s a step", "alarms"], rows)


def filled(values: Sequence[float | None]) -> list[float]:
    return [v for v in values if v is not None]


def span(count: int) -> int:
    """The steps of one mean: four, or a tenth of a longer run."""
    return max(4, count // 10)


def by_span(values: Sequence[float]) -> list[float]:
    """Means; the last one takes what is left over."""
    n, count = span(len(values)), max(1, len(values) // span(len(values)))
    parts = [values[n * k : n * (k + 1) if k < count - 1 else None] for k in range(count)]
    return [sum(part) / len(part) for part in parts]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def plot(path: Path, runs: dict[str, dict[int, dict[str, Any]]], plan: Sequence[Row]) -> None:
    """Success of the rollouts, means of `span` steps and of all seeds, against steps and seconds. No question comes
    twice, so that every point is of questions that were not trained on."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    fig, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    styles = ["-", "--", "-.", ":"]
    for i, row in enumerate(row for row in plan if row.name in runs):
        found = list(runs[row.name].values())
        curves = [by_span(run["steps"]["hsd/success_rate"]) for run in found]
        n = span(len(found[0]["steps"]["hsd/success_rate"]))
        mean = [sum(points) / len(points) for points in zip(*curves, strict=True)]
        steps = [n * (at + 1) - (n - 1) / 2 for at in range(len(mean))]
        each = sum(median(seconds(run)) for run in found) / len(found)
        style = {"linestyle": styles[i // 10], "marker": "o", "markersize": 3, "color": f"C{i % 10}"}
        label = f"{row.name} ({len(found)})"
        axes[0].plot(steps, mean, label=label, **style)
        axes[1].plot([each * s for s in steps], mean, **style)
    axes[0].set_xlabel("optimizer steps")
    axes[1].set_xlabel("seconds, one thread")
    axes[0].set_ylabel("success of the rollouts")
    axes[0].set_ylim(0, 1)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="center left", bbox_to_anchor=(0.74, 0.5), fontsize=8)
    fig.tight_layout(rect=(0, 0, 0.74, 1))
    fig.savefig(path, dpi=110)
    pyplot.close(fig)
