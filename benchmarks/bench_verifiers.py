"""What the verifiers accept, reject and survive: gold answers, made variants of them beside other graders, HumanEval
and its mutants, 1,000 hostile inputs, verdicts a second.

    python benchmarks/bench_verifiers.py [--only gold|variants|humaneval|hostile|speed] [--peers FOLDER]

Other graders: math-verify, and verl's and lm-eval's from FOLDER, filled by
`pip install --no-deps --target FOLDER verl lm-eval`.

Data: GSM8K, MATH-500, AIME and HumanEval in $HSD_SHARED_DATA, or in shared/data beside it. About 20 minutes on
two cores. The hostile part runs in a "strong" sandbox only. The cases are in `verifier_cases.py`, `hostile_inputs.py`.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import os
import platform
import resource
import subprocess
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hostile_inputs import Hostile, hostile_answers, hostile_programs
from verifier_cases import EQUIVALENT, UNNOTICED, math_forms, mutants, number_forms, wrong_number_forms
from verifier_peers import graders
from verifier_variants import KINDS, Pair, expressions, variants

from hsd.verify import Limits, Result, Status, isolation, verify_code, verify_math
from hsd.verify.code import code_reward_with
from hsd.verify.math import SERVERS, math_reward_with
from hsd.verify.status import in_order

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("HSD_SHARED_DATA", ROOT.parent / "shared" / "data"))
HOSTILE_SECONDS = 2.0
Facts = dict[str, Any]


def rows(name: str) -> list[Facts]:
    opened = gzip.open(DATA / name, "rt") if name.endswith(".gz") else open(DATA / name)
    with opened as file:
        return [json.loads(line) for line in file]


# -- gold answers -----------------------------------------------------------------------------------------------------


def gold_answers(workers: int) -> Facts:
    numbers = [n for split in ("test", "train") for n in _gsm8k(split)]
    aime = [str(row["answer"]) for year in (24, 25) for row in rows(f"aime{year}.jsonl")]
    answers = [row["answer"] for row in rows("math500.jsonl")]
    others = [
        (gold, answers[i - 1])
        for i, gold in enumerate(answers)
        if gold.rpartition("=")[2] != answers[i - 1].rpartition("=")[2]
    ]
    return {
        "GSM8K": _forms(numbers, number_forms, Status.CORRECT, workers),
        "GSM8K, wrong": _forms(numbers, wrong_number_forms, Status.INCORRECT, workers),
        "AIME": _forms(aime, number_forms, Status.CORRECT, workers),
        "AIME, wrong": _forms(aime, wrong_number_forms, Status.INCORRECT, workers),
        "MATH-500": _forms(answers, math_forms, Status.CORRECT, workers),
        "MATH-500, another's answer": _judge(
            [(gold, "boxed", rf"\boxed{{{other}}}") for gold, other in others], Status.INCORRECT, workers
        ),
        "MATH-500, SymPy alone": _sympy_alone(answers, workers),
    }


def _gsm8k(split: str) -> list[str]:
    return [row["answer"].rpartition("####")[2].strip() for row in rows(f"gsm8k_{split}.jsonl")]


def _forms(golds: Sequence[str], forms: Callable[[str], dict[str, str]], wanted: Status, workers: int) -> Facts:
    return _judge([(gold, name, text) for gold in golds for name, text in forms(gold).items()], wanted, workers)


def _judge(cases: list[tuple[str, str, str]], wanted: Status, workers: int) -> Facts:
    results = in_order(lambda case: verify_math(case[2], case[0]), cases, workers)
    forms: dict[str, Counter] = defaultdict(Counter)
    exceptions = []
    for (gold, name, text), result in zip(cases, results, strict=True):
        forms[name][str(result.status)] += 1
        if result.status is not wanted:
            exceptions.append({"gold": gold, "form": name, "text": text, "status": str(result.status)})
    return {"wanted": str(wanted), "forms": {name: dict(count) for name, count in forms.items()}, "not": exceptions}


def _sympy_alone(answers: list[str], workers: int) -> Facts:
    """Golds that math-verify does not find equal to themselves: these rest on the comparison of text."""

    def judge(gold: str) -> Result:
        reply = SERVERS.ask(gold, gold, 5.0)
        return Result(Status.CORRECT if reply.get("equal") else Status.INCORRECT, str(reply))

    results = in_order(judge, answers, workers)
    named = [{"gold": g, "form": "SymPy", "text": g, "status": r.detail} for g, r in zip(answers, results, strict=True)]
    kept = [case for case, r in zip(named, results, strict=True) if r.status is not Status.CORRECT]
    return {"wanted": "correct", "forms": {"boxed": dict(Counter(str(r.status) for r in results))}, "not": kept}


# -- made variants ----------------------------------------------------------------------------------------------------


def made_variants(workers: int, peers: Path | None) -> Facts:
    """Every grader on the same pairs: of GSM8K every 180th answer, of AIME every tenth, of MATH-500 every fourth."""
    numbers = [number.replace(",", "") for number in _gsm8k("test")[::180]]
    numbers += [str(row["answer"]) for name in ("aime24.jsonl", "aime25.jsonl") for row in rows(name)[::10]]
    pairs = [p for n in dict.fromkeys(numbers) if n.isdigit() and int(n) > 1 for p in variants(int(n))]
    answers = [row["answer"] for row in rows("math500.jsonl")]
    differ = [(a, b) for a, b in itertools.pairwise(answers) if a.rpartition("=")[2] != b.rpartition("=")[2]]
    pairs += [p for gold, other in differ[::4] for p in expressions(gold, other)]
    results = in_order(lambda p: verify_math(p.text, p.gold), pairs, workers)
    verdicts: dict[str, list[bool | None] | str] = {"this library": [r.status is Status.CORRECT for r in results]}
    for name, grade in graders(peers).items():
        verdicts[name] = grade if isinstance(grade, str) else grade([(p.text, p.gold) for p in pairs])
    missed = [
        {"kind": p.kind, "form": p.form, "gold": p.gold, "text": p.text, "right": p.right, "status": str(r.status)}
        for p, r in zip(pairs, results, strict=True)
        if (r.status is Status.CORRECT) is not p.right or r.status is Status.VERIFIER_FAILED
    ]
    table = {name: v if isinstance(v, str) else _accepted(pairs, v) for name, v in verdicts.items()}
    ours = verdicts["this library"]
    assert isinstance(ours, list)
    forms: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for p, verdict in zip(pairs, ours, strict=True):
        count = forms[f"{p.kind} | {p.form} | {'right' if p.right else 'wrong'}"]
        count[0] += 1
        count[1] += bool(verdict) is p.right
    return {"pairs": len(pairs), "graders": table, "forms": dict(forms), "missed": missed}


def _accepted(pairs: list[Pair], verdicts: list[bool | None]) -> dict[str, list[int]]:
    """By kind: right ones, of these accepted; wrong ones, of these rejected."""
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for p, verdict in zip(pairs, verdicts, strict=True):
        at = 0 if p.right else 2
        found[p.kind][at] += 1
        found[p.kind][at + 1] += bool(verdict) is p.right
    return dict(found)


# -- HumanEval --------------------------------------------------------------------------------------------------------


def human_eval(workers: int) -> Facts:
    problems = rows("HumanEval.jsonl.gz")
    cases = []
    for row in problems:
        parts = (row["prompt"], row["canonical_solution"])
        cases.append((row, "canonical: continues the prompt", parts[1]))
        cases.append((row, "canonical: whole, in a fence", f"Here it is:\n```python\n{''.join(parts)}\n```\nDone."))
        made = mutants(*parts, row["entry_point"])
        cases += [(row, kind, f"```python\n{program}\n```") for kind, program in made.items()]

    def judge(case: tuple[Facts, str, str]) -> Result:
        row, kind, text = case
        return verify_code(text, row, limits=Limits(timeout=2.0 if kind == "infinite loop" else 10.0))

    results = in_order(judge, cases, workers)
    kinds: dict[str, Counter] = defaultdict(Counter)
    survivors = []
    for (row, kind, _), result in zip(cases, results, strict=True):
        kinds[kind][str(result.status)] += 1
        if result.status is Status.CORRECT and not kind.startswith("canonical"):
            at = (row["task_id"], kind)
            verdict = "equivalent" if at in EQUIVALENT else "not noticed by the tests" if at in UNNOTICED else "?"
            why = EQUIVALENT.get(at) or UNNOTICED.get(at) or "not looked at yet"
            survivors.append({"problem": at[0], "kind": kind, "verdict": verdict, "why": why})
    return {"problems": len(problems), "kinds": {k: dict(c) for k, c in kinds.items()}, "survivors": survivors}


# -- hostile inputs ---------------------------------------------------------------------------------------------------


def hostile(workers: int) -> Facts:
    if isolation().level != "strong":
        raise SystemExit(f"hostile programs: expected a strong sandbox, got {isolation()}")
    with tempfile.TemporaryDirectory() as folder:
        canary = Path(folder) / "canary"
        canary.write_text("sings")
        canary.chmod(0o666)
        cases = [*hostile_answers(), *hostile_programs(str(canary), os.getpid())]
        SERVERS.close()  # of the parts before: ended meanwhile, they would count as a change
        before = _state(canary)
        peak_before = _peak_mib()
        start = time.monotonic()
        judged = in_order(_hostile_case, cases, workers)
        seconds = time.monotonic() - start
        SERVERS.close()
        time.sleep(0.5)
        after = _state(canary)
    kinds: dict[str, Counter] = defaultdict(Counter)
    worst: dict[str, float] = defaultdict(float)
    passed = []
    for case, result in zip(cases, judged, strict=True):
        name = f"{'answer' if case.gold else 'program'}: {case.kind}"
        took, detail = result.detail.split(" ", 1)
        kinds[name][str(result.status)] += 1
        worst[name] = max(worst[name], float(took))
        if result.status in (Status.CORRECT, Status.VERIFIER_FAILED):
            passed.append(
                {"kind": name, "gold": case.gold, "text": case.text[:300], "detail": detail[:300]}
                | {"status": str(result.status)}
            )
    return {
        "limit in seconds": HOSTILE_SECONDS,
        "inputs": len(cases),
        "seconds": round(seconds, 1),
        "worst seconds of one": round(max(worst.values()), 2),
        "parent's peak memory in MiB, before": peak_before,
        "parent's peak memory in MiB, after": _peak_mib(),
        "largest child in MiB": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024),
        "leftover processes": after["processes"],
        "unchanged": {name: before[name] == after[name] for name in before},
        "statuses": dict(sum(kinds.values(), Counter())),
        "kinds": {name: {"statuses": dict(c), "worst seconds": round(worst[name], 2)} for name, c in kinds.items()},
        "correct or failed": passed,
    }


def _hostile_case(case: Hostile) -> Result:
    start = time.monotonic()
    if case.gold:
        result = verify_math(case.text, case.gold, timeout=HOSTILE_SECONDS)
    else:
        secret = {"inputs": ["1\n"], "outputs": ["8281"]}
        if case.form == "function":
            secret = {"asserts": ["assert f(1) == 8281", "assert len(str(f(2))) == 4 and f(2) == 8282"]}
        limits = Limits(timeout=HOSTILE_SECONDS, memory=1 << 29, output=1 << 20)
        result = verify_code(case.text, secret, limits=limits)
    return Result(result.status, f"{time.monotonic() - start:.3f} {result.detail}")


def _state(canary: Path) -> Facts:
    """What hostile programs may have changed about this process and this machine."""
    return {
        "canary": canary.read_text() if canary.exists() else "gone",
        "files beside it": sorted(os.listdir(canary.parent)),
        "files in /tmp and /dev/shm": sorted(p for d in ("/tmp", "/dev/shm") for p in os.listdir(d) if "hsd-" in p),
        "limit of open files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "priority": os.getpriority(os.PRIO_PROCESS, 0),
        "cores": sorted(os.sched_getaffinity(0)),
        "open files": len(os.listdir("/proc/self/fd")),
        "processes": _sandboxes(),
    }


def _sandboxes() -> list[str]:
    """Command lines of processes, of anyone, that run a script of the verifiers for this process, and its zombies."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            stat = Path(f"/proc/{name}/stat").read_text().rsplit(")", 1)[1].split()
            command = Path(f"/proc/{name}/cmdline").read_text().replace("\0", " ").strip()
        except OSError:
            continue
        ours = str(ROOT / "hsd" / "verify" / "child") in command and int(stat[1]) in (1, os.getpid())
        if ours or (stat[0] == "Z" and int(stat[1]) == os.getpid()):
            found.append(command or f"zombie {name}")
    return found


def _peak_mib() -> int:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


# -- speed ------------------------------------------------------------------------------------------------------------


def speed(workers: int) -> Facts:
    """Verdicts a second through the reward functions, after a warm-up; meaningful on an idle machine only."""
    golds = _gsm8k("test")[:400]
    answers = [row["answer"] for row in rows("math500.jsonl")]
    script = {"inputs": ["41\n"], "outputs": ["42\n"]}
    function = {"asserts": ["assert f(1) == 2"]}
    sympy = ["x + x", "(x+1)^2", r"\sqrt{8}", r"\frac{2x}{4}"] * 25
    same = ["2x", "x^2+2x+1", r"2\sqrt{2}", r"\frac{x}{2}"] * 25
    math_reward, code_reward = math_reward_with(workers=workers), code_reward_with(workers=workers)
    work: dict[str, tuple[Callable[..., Any], list[str], list[Any]]] = {
        "unboxed numbers": (math_reward, [f"So there are {g} apples in total." for g in golds], golds),
        "boxed MATH-500 answers": (math_reward, [rf"\boxed{{{a}}}" for a in answers], answers),
        "unboxed MATH-500 answers": (math_reward, [f"The answer is ${a}$." for a in answers], answers),
        "answers that need SymPy": (math_reward, [rf"\boxed{{{a}}}" for a in sympy], same),
        "scripts": (code_reward, ["print(int(input()) + 1)"] * 100, [script] * 100),
        "functions": (code_reward, ["def f(x): return x + 1"] * 100, [function] * 100),
    }
    found = {}
    for name, (reward, texts, columns) in work.items():
        reward(texts[: 2 * workers], columns[: 2 * workers])
        start = time.monotonic()
        rewards = reward(texts, columns)
        found[name] = {
            "a second": round(len(texts) / (time.monotonic() - start), 1),
            "correct": rewards.count(1.0),
            "of": len(texts),
        }
    return {"workers": workers, "load before": os.getloadavg()[0], "verdicts": found}


# -- report -----------------------------------------------------------------------------------------------------------


def report(facts: Facts) -> str:
    lines = [", ".join(f"{k} {v}" for k, v in facts["environment"].items()), ""]
    lines += ["Commits: " + ", ".join(f"{part} {at}" for part, at in facts["commits"].items()), ""]
    lines += _gold_report(facts["gold"]) if "gold" in facts else []
    lines += _variants_report(facts["variants"]) if "variants" in facts else []
    lines += _human_eval_report(facts["humaneval"]) if "humaneval" in facts else []
    lines += _hostile_report(facts["hostile"]) if "hostile" in facts else []
    lines += _speed_report(facts["speed"]) if "speed" in facts else []
    return "\n".join(lines).rstrip() + "\n"


def _gold_report(gold: Facts) -> list[str]:
    lines = ["## Gold answers", ""]
    for name, part in gold.items():
        counts = sum((Counter(c) for c in part["forms"].values()), Counter())
        lines += [f"### {name}: {counts[part['wanted']]:,} of {sum(counts.values()):,} {part['wanted']}", ""]
        lines += ["| form | cases | " + f"{part['wanted']} |", "|---|---|---|"]
        for form, count in part["forms"].items():
            lines.append(f"| {form} | {sum(count.values()):,} | {count.get(part['wanted'], 0):,} |")
        lines += ["", *(f"- `{c['gold']}` against `{c['text'][:100]}`: {c['status']}" for c in part["not"][:40])]
        lines += [""] if part["not"] else []
    return lines


def _variants_report(found: Facts) -> list[str]:
    kinds = list(found["graders"]["this library"])
    lines = [f"## Made variants: {found['pairs']:,} pairs, the same for every grader", ""]
    lines += [f"Right ones accepted / wrong ones rejected, in percent. Named by the targets: {', '.join(KINDS)}.", ""]
    lines += ["| grader | " + " | ".join(kinds) + " |", "|---|" + "---|" * len(kinds)]
    for name, table in found["graders"].items():
        if isinstance(table, str):
            lines.append(f"| {name} | {table} |" + " |" * (len(kinds) - 1))
            continue
        cells = [f"{100 * a[1] / a[0]:.1f} / {100 * a[3] / a[2]:.1f}" for a in (table[kind] for kind in kinds)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    first = found["graders"]["this library"]
    lines.append("| pairs, right / wrong | " + " | ".join(f"{first[k][0]:,} / {first[k][2]:,}" for k in kinds) + " |")
    lines += ["", "### This library by form", "", "| kind | form | side | pairs | as wanted |", "|---|---|---|---|---|"]
    lines += [f"| {form} | {count[0]:,} | {count[1]:,} |" for form, count in found["forms"].items()]
    lines += ["", f"Not as wanted: {len(found['missed'])}, the first 40:", ""]
    lines += [
        f"- {c['kind']}, {c['form']}: `{c['gold']}` against {json.dumps(c['text'][:100])}: {c['status']}"
        for c in found["missed"][:40]
    ]
    return [*lines, ""]


def _speed_report(found: Facts) -> list[str]:
    lines = [f"## Verdicts a second: {found['workers']} workers, load {found['load before']:.1f} before", ""]
    lines += ["| what | a second | correct |", "|---|---|---|"]
    return [
        *lines,
        *(f"| {k} | {v['a second']} | {v['correct']} of {v['of']} |" for k, v in found["verdicts"].items()),
        "",
    ]


def _human_eval_report(found: Facts) -> list[str]:
    lines = [f"## HumanEval: {found['problems']} problems", ""]
    lines += ["| program | cases | correct | other statuses |", "|---|---|---|---|"]
    for kind, count in found["kinds"].items():
        other = ", ".join(f"{n} {s}" for s, n in sorted(count.items()) if s != "correct")
        lines.append(f"| {kind} | {sum(count.values())} | {count.get('correct', 0)} | {other} |")
    lines += ["", f"The {len(found['survivors'])} mutants that pass, each looked at:", ""]
    lines += ["| problem | mutant | verdict | why |", "|---|---|---|---|"]
    lines += [f"| {s['problem']} | {s['kind']} | {s['verdict']} | {s['why']} |" for s in found["survivors"]]
    return [*lines, ""]


def _hostile_report(found: Facts) -> list[str]:
    lines = [f"## Hostile inputs: {found['inputs']:,}", ""]
    single = [k for k in found if not isinstance(found[k], dict | list)]
    lines += ["| | |", "|---|---|", *(f"| {k} | {found[k]} |" for k in single)]
    lines.append(f"| leftover processes | {len(found['leftover processes'])} |")
    same = [k for k, v in found["unchanged"].items() if v]
    changed = [k for k, v in found["unchanged"].items() if not v]
    lines.append(f"| unchanged | {', '.join(same)}{'; CHANGED: ' + ', '.join(changed) if changed else ''} |")
    lines.append(f"| statuses | {', '.join(f'{n} {s}' for s, n in sorted(found['statuses'].items()))} |")
    lines += ["", "| kind | statuses | worst seconds |", "|---|---|---|"]
    for name, part in found["kinds"].items():
        statuses = ", ".join(f"{n} {s}" for s, n in sorted(part["statuses"].items()))
        lines.append(f"| {name} | {statuses} | {part['worst seconds']} |")
    lines += ["", "Those that were found correct, or that the verifier failed on:", ""]
    text = [
        f"- {c['kind']}, gold `{c['gold']}`: {c['status']} {json.dumps(c['text'][:100])}"
        for c in found["correct or failed"]
    ]
    return [*lines, *(text or ["- none"]), ""]


def environment() -> Facts:
    return {
        "python": platform.python_version(),
        "system": platform.system() + " " + platform.release().split("-")[0],
        "cores": len(os.sched_getaffinity(0)),
        "sandbox": str(isolation()),
    }


def commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=ROOT)
    return done.stdout.strip() or "unknown"


def main() -> None:
    parts = {
        "gold": gold_answers,
        "variants": made_variants,
        "humaneval": human_eval,
        "hostile": hostile,
        "speed": speed,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=tuple(parts), help="the other parts are kept from the file that is there")
    parser.add_argument("--peers", type=Path, help="a folder with verl and lm_eval")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "verifiers.json")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    facts: Facts = json.loads(args.json.read_text()) if args.only and args.json.exists() else {}
    facts["environment"] = environment()
    for name, part in parts.items():
        if args.only in (None, name):
            start = time.monotonic()
            facts[name] = made_variants(args.workers, args.peers) if name == "variants" else part(args.workers)  # type: ignore[call-arg]
            facts.setdefault("commits", {})[name] = commit()
            print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(facts, indent=1) + "\n")
    args.json.with_suffix(".md").write_text(report(facts))


if __name__ == "__main__":
    main()
