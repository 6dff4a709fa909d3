"""The results of one model as a Markdown table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hsd.evaluate.interval import with_interval


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """One line per benchmark: exact subset, rows, pass@1 with its 95 % interval, and what qualifies the number."""
    lines = [
        "| benchmark | rows | samples | pass@1 [95 % interval] | pass@k | truncated | mean length | verifier failed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        whole = "" if r["rows"] == r["rows_of_the_subset"] else f" of {r['rows_of_the_subset']}"
        more = [
            f"{k}: {_share(v['value'], v['interval'])}"
            for k, v in r.items()
            if k.startswith("pass@") and type(v) is dict
        ]
        failed = f"{r['verifier_failures']} of {r['rows'] * r['samples']}"
        if "pass@1_bounds" in r:
            low, high = r["pass@1_bounds"]
            failed += f" (pass@1 {low:.3f} if wrong, {high:.3f} if right)"
        cells = [r["subset"], f"{r['rows']}{whole}", r["samples"], _share(r["pass@1"], r["interval"]), ", ".join(more)]
        cells += [f"{r['truncated']:.1%}", f"{r['mean_length']:.0f} tokens", failed]
        lines.append("| " + " | ".join(str(c) for c in cells) + " |")
    first = results[0]
    sampling = first["sampling"]
    how = "greedy"
    if sampling["temperature"]:
        how = f"temperature {sampling['temperature']:g}, top-p {sampling['top_p']:g}"
        how += f", top-k {sampling['top_k']}" * bool(sampling["top_k"])
        how += f", min-p {sampling['min_p']}" * bool(sampling["min_p"])
    if sampling["repetition_penalty"] != 1:
        how += f", repetition penalty {sampling['repetition_penalty']:g}"
    verifiers = sorted({name for r in results for name in r["verifiers"].values()})
    note = (
        f"`{first['model']}`, {first['engine']}; {how}, at most {sampling['max_new_tokens']} new tokens, seed "
        f"{first['seed']}, {first['prompt_form']} prompts; scored by {', '.join(verifiers)}."
    )
    return f"{note}\n\n" + "\n".join(lines) + "\n"


def _share(value: float | None, interval: Sequence[float] | None) -> str:
    return "none judged" if value is None or interval is None else with_interval(value, *interval)
