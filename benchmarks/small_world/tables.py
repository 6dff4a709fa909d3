"""The report's tables, as lines of Markdown; a table without data is an empty list."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from benchmarks.small_world import paper
from benchmarks.small_world.plan import (
    ABLATIONS,
    BASE_ROW,
    CHAIN_TERMS,
    CHAINS,
    CURES,
    HALF,
    LEAGUE,
    LONG_TEACHERS,
    MAIN,
    SLOW,
    UNCLIPPED,
)
from benchmarks.small_world.results import coverage_bins, curve_mean, final, interval, paired, rows, warm_starts
from hsd.hindsight.credit import coverage_peak

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


def main(facts: dict[str, Any]) -> list[str]:
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
        + " | curve mean | HSD - it, paired | paper, AIME-25 |",
        "|---" * 9 + "|",
    ]
    for method in ranked:
        by_seed = found[method]
        ends = [final(by_seed[s]) for s in sorted(by_seed)]
        hsd = found.get("hsd", {}) if method != "hsd" else {}
        curve = [_at(by_seed, step) for step in steps]
        lines.append(
            f"| {method} | {len(ends)} | {interval(ends)} | {_signed(paired(hsd, by_seed))} | {_each(ends)} | "
            + " / ".join(f"{c:.2f}" for c in curve)
            + f" | {interval([curve_mean(r) for r in by_seed.values()])} | {_signed(paired(hsd, by_seed, curve_mean))}"
            + f" | {paper.METHODS[method]} |"
        )
    order = sorted(found, key=lambda m: -paper.METHODS[m])
    lines += ["", f"Order here: {', '.join(ranked)}. In the paper: {', '.join(order)}."]
    alarms = [
        f"{m}, seed {s}: {text}" for m in ranked for s, r in sorted(found[m].items()) for text in r["alarms"].values()
    ]
    return [*lines, "", "Alarms: " + ("; ".join(alarms) if alarms else "none") + "."]


def league(runs: Sequence[dict]) -> list[str]:
    """All of the family on the same seeds, the methods of the first table among them."""
    found = {m: rows(runs, "main", m) or rows(runs, "league", m) for m in (*MAIN, *LEAGUE)}
    found = {m: by_seed for m, by_seed in found.items() if by_seed}
    if not any(m in LEAGUE for m in found):
        return []
    lines = [
        "## The league",
        "",
        "Ordered by the curve's mean. Credit is the share of |A| within 8 tokens of tau, over the first ten steps. "
        "Distinct: how many different successful rollouts a solved question has among 8.",
        "",
        "| method | seeds | final success | HSD - it, paired | curve mean | HSD - it, paired | pass@8 | distinct "
        "| credit | alarms | CPU s a step |",
        "|---" * 11 + "|",
    ]
    for method in sorted(found, key=lambda m: -interval([curve_mean(r) for r in found[m].values()]).mean):
        by_seed = found[method]
        hsd = found.get("hsd", {}) if method != "hsd" else {}
        mass = [x for r in by_seed.values() for x in r["steps"].get("hsd/credit_mass_8", [])[:10] if x is not None]
        seconds = [r["train_cpu_seconds"] / r["run"]["steps"] for r in by_seed.values()]
        alarms = sum(bool(r["alarms"]) for r in by_seed.values())
        lines.append(
            f"| {method} | {len(by_seed)} | {interval([final(r) for r in by_seed.values()])} | "
            f"{_signed(paired(hsd, by_seed))} | {interval([curve_mean(r) for r in by_seed.values()])} | "
            f"{_signed(paired(hsd, by_seed, curve_mean))} | {_spread(by_seed)} | "
            f"{f'{sum(mass) / len(mass):.2f}' if mass else '-'} | "
            f"{alarms} of {len(by_seed)} | {sum(seconds) / len(seconds):.2f} |"
        )
    return lines


def _spread(by_seed: dict[int, dict]) -> str:
    """ "pass@8 | distinct", where they were measured."""
    found = [r["pass_at_8"] for r in by_seed.values() if "pass_at_8" in r]
    if not found:
        return "- | -"
    return " | ".join(f"{sum(x[name] for x in found) / len(found):.2f}" for name in ("pass", "distinct"))


def chains(runs: Sequence[dict]) -> list[str]:
    """Six summands: more decisions for one reward."""
    found = {m: rows(runs, "chains", m) for m in CHAINS}
    found = {m: by_seed for m, by_seed in found.items() if by_seed}
    if not found:
        return []
    lines = [
        f"## Chains of {CHAIN_TERMS} summands",
        "",
        "| method | seeds | each seed | curve mean | pass@8 | distinct | alarms |",
        "|---" * 7 + "|",
    ]
    for method, by_seed in found.items():
        curve = [curve_mean(r) for r in by_seed.values()]
        alarms = sum(bool(r["alarms"]) for r in by_seed.values())
        ends = _each([final(by_seed[s]) for s in sorted(by_seed)])
        lines.append(
            f"| {method} | {len(by_seed)} | {ends} | {sum(curve) / len(curve):.3f} | {_spread(by_seed)} | {alarms} |"
        )
    return lines


SPANS = (0, 10, 20, 30, 50, 100, 200, 300)
MARKS = (50, 100, 200, 300)
HELD = {"long": LONG_TEACHERS, "cures": CURES}  # part -> its rows


def held(runs: Sequence[dict], part: str) -> list[str]:
    """How long each teacher, or each cure of a live one, holds."""
    found = {name: rows(runs, part, name) for name in HELD[part]}
    found = {name: by_seed for name, by_seed in found.items() if by_seed}
    if not found:
        return []
    steps = max(r["run"]["steps"] for by_seed in found.values() for r in by_seed.values())
    marks = [m for m in MARKS if m <= steps] or [steps]
    title, said = f"Teachers over {steps} steps", "HSD with each kind of teacher"
    if part == "cures":
        title = f"Cures of a live teacher over {steps} steps"
        said = "HSD with a live teacher, `cures.py`, no reference policy and no other copy of the weights"
    lines = [
        f"## {title}",
        "",
        f"{said}; success of the rollouts, mean of the ten steps that end at each, seed by seed.",
        "",
        "| run | seeds | " + " | ".join(f"step {m}" for m in marks) + " | final | alarms |",
        "|---" * (len(marks) + 4) + "|",
    ]
    for name, by_seed in found.items():
        seeds = sorted(by_seed)
        cells = [" ".join(_until(by_seed[s], m) for s in seeds) for m in marks]
        first = {s: next(iter(by_seed[s]["alarms"].values()), None) for s in seeds}
        alarms = "; ".join(f"seed {s}, {text}" for s, text in first.items() if text) or "none"
        ends = _each([final(by_seed[s]) for s in seeds])
        lines.append(f"| {name} | {' '.join(map(str, seeds))} | " + " | ".join([*cells, ends, alarms]) + " |")
    return lines


def _until(run: dict, step: int) -> str:
    near = [x for x in run["steps"]["hsd/success_rate"][max(0, step - 10) : step] if x is not None]
    return f"{sum(near) / len(near):.2f}" if near else "-"


def probes(runs: Sequence[dict], part: str) -> list[str]:
    """What the weights say in the teacher's context, while the student is trained."""
    found = {name: rows(runs, part, name) for name in HELD[part]}
    found = {name: [by_seed[s].get("probes", []) for s in sorted(by_seed)] for name, by_seed in found.items()}
    if not any(measured for each in found.values() for measured in each):
        return []
    lines = [
        f"## Does the teacher's own distribution move? ({part})",
        "",
        "On fixed failing rollouts of the warm start (`probes.py`), whatever weights teach: s is what the run's "
        "weights say behind the question, t what they say behind question and context. `common` is the cosine of their "
        "movements (mean), `closed` and `evaded` are the changes of KL(t || s) by the student's and by the teacher's "
        "movement (sums), the others KL at the end of the span, in nats a token. Seed by seed.",
        "",
        "| run | steps | common | closed | evaded | KL(t \\|\\| s) | KL(t_0 \\|\\| t) | KL(t_0 \\|\\| s) |",
        "|---" * 8 + "|",
    ]
    for name, each in found.items():
        for low, high in pairwise(SPANS):
            spans = [[r for r in measured if low < r["step"] <= high] for measured in each]
            spans = [span for span in spans if span]
            if spans:
                cells = [" ".join(f"{sum(r['common'] for r in span) / len(span):.2f}" for span in spans)]
                cells += [_each([sum(r[what] for r in span) for span in spans]) for what in ("closed", "evaded")]
                cells += [_each([span[-1][what] for span in spans]) for what in ("gap", "drift", "left")]
                lines.append(f"| {name} | {low} to {high} | " + " | ".join(cells) + " |")
    return lines


def _at(by_seed: dict[int, dict], step: int) -> float:
    values = [dict(map(tuple, r["curve"]))[step] for r in by_seed.values()]
    return sum(values) / len(values)


def credit(warm: Sequence[dict]) -> list[str]:
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


def teachers(facts: dict[str, Any]) -> list[str]:
    """What each teacher can do itself; the same of the weaker ones that the runs of "half" have."""
    lines = [
        "## How good the teachers are",
        "",
        "Of the warm starts, on the same groups: success of a teacher that writes the solution itself, and what it "
        "does with a failing rollout cut after tau: the share of continuations that go on from the rollout's own "
        "numbers to the end, and of those that also add rightly. The student's greedy success is what it would have if "
        "it never slipped.",
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
    if len(lines) == 6:
        return []
    hsd = rows(facts["runs"], "main", "hsd")
    lines += ["", "| seed | success before | greedy before | peer teacher | HSD, final |", "|---|---|---|---|---|"]
    for w in sorted(warm_starts(facts), key=lambda w: w["seed"]):
        end = f"{final(hsd[w['seed']]):.3f}" if w["seed"] in hsd else ""
        told = w["teacher_success"]["with_peer"]
        lines.append(f"| {w['seed']} | {w['final']['mean']:.3f} | {w['greedy']:.3f} | {told:.3f} | {end} |")
    return lines


def unclipped(runs: Sequence[dict]) -> list[str]:
    lines = [
        "## OPSD without its clip",
        "",
        "Mean per-token divergence from the teacher (nats; with the clip it is the clipped one) in the last five "
        "steps, and final success, same seeds.",
        "",
        "| method | seeds | clip 0.05: divergence | success | no clip: divergence | success |",
        "|---" * 6 + "|",
    ]
    for method in UNCLIPPED:
        found = [rows(runs, part, method) for part in ("main", "unclipped")]
        seeds = sorted(found[0].keys() & found[1].keys())
        cells = []
        for by_seed in found:
            kls = [sum(by_seed[s]["steps"]["hsd/kl"][-5:]) / 5 for s in seeds]
            cells += [" ".join(f"{kl:.4f}" for kl in kls), _each([final(by_seed[s]) for s in seeds])]
        if seeds:
            lines.append(f"| {method} | {', '.join(map(str, seeds))} | " + " | ".join(cells) + " |")
    return lines if len(lines) > 6 else []


def slow(runs: Sequence[dict]) -> list[str]:
    lines = [
        "## A third of the learning rate",
        "",
        "Final success of each seed, same steps.",
        "",
        "| method | seeds | 3e-4 | 1e-4 | difference, paired |",
        "|---|---|---|---|---|",
    ]
    for method in SLOW:
        main_runs, slow_runs = rows(runs, "main", method), rows(runs, "slow", method)
        seeds = sorted(main_runs.keys() & slow_runs.keys())
        if seeds:
            cells = [_each([final(by_seed[s]) for s in seeds]) for by_seed in (main_runs, slow_runs)]
            gap = _signed(paired(slow_runs, main_runs))
            lines.append(f"| {method} | {', '.join(map(str, seeds))} | {cells[0]} | {cells[1]} | {gap} |")
    return lines if len(lines) > 6 else []


def half(facts: dict[str, Any]) -> list[str]:
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


def coverage(runs: Sequence[dict], warm: Sequence[dict]) -> list[str]:
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


def ablation(runs: Sequence[dict], part: str) -> list[str]:
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
