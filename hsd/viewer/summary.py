"""The numbers, words and figures of one credit measurement: a JSON-ready dict, lines of Markdown, PNG files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median_low
from typing import Any

from hsd.hindsight.credit import coverage
from hsd.hindsight.groups import Group, last_user_text
from hsd.progress import counted
from hsd.viewer.measure import WINDOWS, TokenCredit, coverage_by_difficulty, credit_tables
from hsd.viewer.plots import Bin, Profile, plot_coverage, plot_credit_mass, plot_credit_profile, plot_silence

TEACHERS = {"with_peer": "peer + answer", "answer_only": "answer only"}
PROFILE_ROWS = (-8, -4, -2, -1, 0, 1, 2, 4, 8, 16)
EXAMPLES = 3
LEAST_SHARE = 0.05
FIGURES = ("credit_profile.png", "credit_mass.png", "credit_silence.png", "coverage.png")


def summarise(
    measured: Sequence[TokenCredit], groups: Sequence[Group], again: Sequence[Group], tokenizer: Any
) -> dict[str, Any]:
    """All that the words and the figures need, ready for JSON; NaN is null. Shares are of the rollouts with a verdict.

    Args:
        measured: the failing rollouts of ``groups`` that have a peer (`hsd.viewer.measure.failing_with_peer`).
        again: an independent second group for each question (`hsd.viewer.measure.coverage_by_difficulty`).
    """
    size = len(groups[0].rollouts)
    right = sum(len(g.successes) for g in groups)
    judged = right + sum(len(g.failures) for g in groups)
    kept: dict[str, Any] = {
        "questions": len(groups),
        "group_size": size,
        "success": right / max(1, judged),
        "coverage": sum(len(g.failures) for g in groups if g.successes) / max(1, judged),
        "mixed_groups": sum(g.is_mixed for g in groups) / len(groups),
        "failing_with_peer": len(measured),
        "unscored": size * len(groups) - judged,
        "by_difficulty": [asdict(b) for b in coverage_by_difficulty(groups, again)],
    }
    if measured:
        taus = [r.tau for r in measured if r.tau is not None]
        kept["median_tau"] = float(median_low(taus)) if taus else None
        kept["windows"] = WINDOWS
        tables = credit_tables(measured)
        kept["mean_abs"] = {name: table.mean_abs() for name, table in tables.items()}
        kept["rollout_abs"] = {name: [round(a, 6) for a in table.rollout_abs()] for name, table in tables.items()}
        kept["mass"] = {name: table.mass() for name, table in tables.items()}
        kept["diverging"] = {"rollouts": len(taus), "questions": len({r.group for r in measured if r.tau is not None})}
        kept["profile"] = {name: table.profile() for name, table in tables.items()}
        kept["profile_error"] = {name: table.profile_error() for name, table in tables.items()}
        kept["examples"] = [_example(r, groups[r.group], tokenizer) for r in _spread(measured)]
    return _strict(kept)


def lines(credit: dict[str, Any]) -> list[str]:
    """The measurement in Markdown."""
    text = [
        f"{counted(credit['questions'], 'question')} x {counted(credit['group_size'], 'rollout')}: success "
        f"{credit['success']:.3f}, coverage (failing, with a successful peer) {credit['coverage']:.3f} of all rollouts "
        f"(were all questions alike, f({credit['success']:.3f}, {credit['group_size']}) = "
        f"{coverage(credit['success'], credit['group_size']):.3f}), mixed groups {credit['mixed_groups']:.3f}; "
        f"{counted(credit['failing_with_peer'], 'failing rollout')} with a peer."
    ]
    if unscored := credit.get("unscored"):  # a resumed demo may have older numbers
        text[0] += f" Without a verdict and in no share: {unscored} of the rollouts."
    if not credit["failing_with_peer"]:
        return [*text, "No failing rollout has a successful peer: there is no credit profile to show."]
    if credit["median_tau"] is None:
        return [*text, "No failing rollout leaves its peer: there is no credit profile to show."]
    profiles = {name: _profile(credit, name) for name in TEACHERS}
    return [
        *text,
        f"Median divergence position: {credit['median_tau']:.0f}. Rollout-averaged |A|: "
        + ", ".join(f"{credit['mean_abs'][n]:.3f} ({label})" for n, label in TEACHERS.items())
        + " nats.",
        "",
        "| mean \\|A\\| (nats) at t - tau | " + " | ".join(map(str, PROFILE_ROWS)) + " |",
        "|---" * (len(PROFILE_ROWS) + 1) + "|",
        *(
            f"| {label} | "
            + " | ".join(f"{profiles[name][o]:.3f}" if o in profiles[name] else "-" for o in PROFILE_ROWS)
            + " |"
            for name, label in TEACHERS.items()
        ),
        "",
        "| credit mass within w of tau | " + " | ".join(f"w = {w}" for w in credit["windows"]) + " |",
        "|---" * (len(credit["windows"]) + 1) + "|",
        *(
            f"| {label} | " + " | ".join(f"{m:.0%}" for m in credit["mass"][name]) + " |"
            for name, label in TEACHERS.items()
        ),
        "",
        "Failing rollouts, their peer, and where they part (`>>` marks tau; the number is A in nats there):",
        "",
        "```",
        *(line for example in credit["examples"] for line in _example_lines(example)),
        "```",
    ]


def write_figures(folder: Path, credits: Mapping[str, dict[str, Any]]) -> list[Path]:
    """Write the figures that the measurements have data for; their paths. Those of an earlier call are removed.

    ``credits`` has a name for each measurement of the same questions, such as "before training": a panel each.
    """
    profile, mass, silence, covered = (folder / name for name in FIGURES)
    for path in (profile, mass, silence, covered):
        path.unlink(missing_ok=True)
    pictures = []
    if diverging := {name: c for name, c in credits.items() if c.get("median_tau") is not None}:
        titles = {name: _panel(name, **c["diverging"]) for name, c in diverging.items()}
        profiles = {titles[n]: {t: _curve(c, k) for k, t in TEACHERS.items()} for n, c in diverging.items()}
        masses = {titles[n]: {t: c["mass"][k] for k, t in TEACHERS.items()} for n, c in diverging.items()}
        pictures += [profile, mass]
        plot_credit_profile(profile, profiles, title="Where the credit lands (bands: 95 % intervals over questions)")
        plot_credit_mass(mass, masses, WINDOWS, title="Credit near tau")
    if loud := {name: tuple(c["rollout_abs"].values()) for name, c in credits.items() if c["failing_with_peer"]}:
        pictures.append(silence)
        plot_silence(silence, loud, title="How loud the two teachers are")
    first = next(iter(credits.values()))
    if bins := {name: (_bins(c), (c["success"], c["coverage"])) for name, c in credits.items() if c["by_difficulty"]}:
        pictures.append(covered)
        title = f"Failing rollouts with a peer ({counted(first['questions'], 'question')}, two groups each)"
        plot_coverage(covered, bins, first["group_size"], title=title)
    return pictures


def _panel(name: str, rollouts: int, questions: int) -> str:
    told = f"n = {counted(rollouts, 'failing rollout')} of {counted(questions, 'question')}"
    return f"{name}, {told}" if name else told


def _bins(credit: dict[str, Any]) -> list[Bin]:
    return [(b["success"], b["coverage"], _nan(b["error"]), b["groups"]) for b in credit["by_difficulty"]]


def _curve(credit: dict[str, Any], name: str) -> Profile:
    """A mean over fewer than `LEAST_SHARE` of the rollouts has no point: it says more of them than of its offset."""
    offsets, mean_abs, count = credit["profile"][name]
    least = LEAST_SHARE * credit["diverging"]["rollouts"]
    shown = [_nan(a) if n >= least else math.nan for a, n in zip(mean_abs, count, strict=True)]
    return offsets, shown, [_nan(e) for e in credit["profile_error"][name]]


def _nan(value: float | None) -> float:
    return math.nan if value is None else value


def _strict(value: Any) -> Any:
    """NaN (an offset that no rollout reaches) as null: JSON has no NaN."""
    if isinstance(value, dict):
        return {k: _strict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _profile(credit: dict[str, Any], name: str) -> dict[int, float]:
    """Mean |A| by offset, where any rollout reaches it."""
    offsets, mean_abs, _ = credit["profile"][name]
    return {o: a for o, a in zip(offsets, mean_abs, strict=True) if a is not None}


def _example_lines(example: dict[str, Any]) -> list[str]:
    credit = f"A {example['credit']:+.2f}, answer only {example['credit_answer_only']:+.2f}"
    return [
        f"question  {example['question']}   answer {example['answer']}",
        f"rollout   {example['rollout']}   {credit}",
        f"peer      {example['peer']}",
        "",
    ]


def _spread(measured: Sequence[TokenCredit]) -> list[TokenCredit]:
    """A few rollouts that part from their peer, from different questions."""
    first_of_group: dict[int, TokenCredit] = {}
    for r in measured:
        if r.tau is not None:
            first_of_group.setdefault(r.group, r)
    return list(first_of_group.values())[:EXAMPLES]


def _example(r: TokenCredit, group: Group, tokenizer: Any) -> dict[str, Any]:
    assert r.tau is not None and r.peer is not None

    def marked(index: int) -> str:
        ids = list(group.rollouts[index].token_ids)
        left = tokenizer.decode(ids[: r.tau], skip_special_tokens=True)
        return (left + ">>" + tokenizer.decode(ids[r.tau :], skip_special_tokens=True)).replace("\n", "\\n")

    return {
        "question": last_user_text(group.prompt).replace("\n", "\\n"),
        "answer": group.answer,
        "rollout": marked(r.rollout),
        "peer": marked(r.peer),
        "credit": r.credit[r.tau].item(),
        "credit_answer_only": r.answer_only[r.tau].item(),
    }
