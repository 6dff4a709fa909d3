"""What the verifiers accept, reject and survive: gold answers, HumanEval and its mutants, 1,000 hostile inputs.

    python benchmarks/bench_verifiers.py [--only gold|humaneval|hostile] [--json PATH] [--workers N]

Data: GSM8K, MATH-500 and HumanEval in $HSD_SHARED_DATA, or in shared/data beside the repository. About 20 minutes on
two cores. The hostile part runs in a "strong" sandbox only. The cases are in `verifier_cases.py`, `hostile_inputs.py`.
"""

from __future__ import annotations

import argparse
import gzip
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

from hsd.verify import Limits, Result, Status, isolation, verify_code, verify_math
from hsd.verify.math import _SERVERS
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
    numbers = [
        row["answer"].rpartition("####")[2].strip()
        for name in ("gsm8k_train.jsonl", "gsm8k_test.jsonl")
        for row in rows(name)
    ]
    answers = [row["answer"] for row in rows("math500.jsonl")]
    others = [(gold, answers[i - 1]) for i, gold in enumerate(answers) if gold != answers[i - 1]]
    return {
        "GSM8K": _forms(numbers, number_forms, Status.CORRECT, workers),
        "GSM8K, wrong": _forms(numbers, wrong_number_forms, Status.INCORRECT, workers),
        "MATH-500": _forms(answers, math_forms, Status.CORRECT, workers),
        "MATH-500, another's answer": _judge(
            [(gold, "boxed", rf"\boxed{{{other}}}") for gold, other in others], Status.INCORRECT, workers
        ),
        "MATH-500, SymPy alone": _sympy_alone(answers, workers),
    }


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
        reply = _SERVERS.ask(gold, gold, 5.0)
        return Result(Status.CORRECT if reply.get("equal") else Status.INCORRECT, str(reply))

    results = in_order(judge, answers, workers)
    named = [{"gold": g, "form": "SymPy", "text": g, "status": r.detail} for g, r in zip(answers, results, strict=True)]
    kept = [case for case, r in zip(named, results, strict=True) if r.status is not Status.CORRECT]
    return {"wanted": "correct", "forms": {"boxed": dict(Counter(str(r.status) for r in results))}, "not": kept}


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
        _SERVERS.close()  # of the parts before: ended meanwhile, they would count as a change
        before = _state(canary)
        peak_before = _peak_mib()
        start = time.monotonic()
        judged = in_order(_hostile_case, cases, workers)
        seconds = time.monotonic() - start
        _SERVERS.close()
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


# -- report -----------------------------------------------------------------------------------------------------------


def report(facts: Facts) -> str:
    lines = [", ".join(f"{k} {v}" for k, v in facts["environment"].items()), ""]
    lines += ["Commits: " + ", ".join(f"{part} {at}" for part, at in facts["commits"].items()), ""]
    lines += _gold_report(facts["gold"]) if "gold" in facts else []
    lines += _human_eval_report(facts["humaneval"]) if "humaneval" in facts else []
    lines += _hostile_report(facts["hostile"]) if "hostile" in facts else []
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
    parts = {"gold": gold_answers, "humaneval": human_eval, "hostile": hostile}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=tuple(parts), help="the other parts are kept from the file that is there")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "verifiers.json")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    facts: Facts = json.loads(args.json.read_text()) if args.only and args.json.exists() else {}
    facts["environment"] = environment()
    for name, part in parts.items():
        if args.only in (None, name):
            start = time.monotonic()
            facts[name] = part(args.workers)
            facts.setdefault("commits", {})[name] = commit()
            print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(facts, indent=1) + "\n")
    args.json.with_suffix(".md").write_text(report(facts))


if __name__ == "__main__":
    main()
