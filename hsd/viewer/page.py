"""The credit page: one HTML file that shows each rollout token by token beside its peer, and asks nothing of a network.

A page holds one measurement or several of the same questions, such as "before training" and "after training".
Numbers travel as integers in JSON: thousandths of a nat, ten-thousandths of a probability, texts by their place in
a list. null is a number that is not finite.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import Tensor

from hsd.files import replacing
from hsd.hindsight.groups import Group, last_user_text
from hsd.viewer.measure import TokenCredit, Top
from hsd.viewer.tokens import partial_bytes, token_texts

LIMITS = [0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0]  # nats at full colour
DATA = '<script type="application/json" id="data">'  # of page.html
NATS, PROBABILITY = 1e-3, 1e-4  # units


def write_page(path: Path, measurements: Mapping[str, Mapping[str, Any]], *, title: str, note: str) -> None:
    """Write the page of ``measurements``, a `payload` by name; with several names the page has a switch.

    Args:
        title: heading of the page, plain text.
        note: a line below it: which model and which questions these are, plain text.
    """
    with replacing(path) as part:
        part.write_text(page(measurements, title=title, note=note), encoding="utf-8")


def read_page(path: Path) -> dict[str, dict[str, Any]]:
    """The measurements of a page that `write_page` wrote; ValueError for another file, with its name."""
    try:
        _, _, rest = path.read_text(encoding="utf-8").partition(DATA)
        return json.loads(rest.partition("</script>")[0])
    except ValueError as error:
        raise ValueError(f"{path}: expected a page of hsd credit, got no data that can be read ({error})") from error


def page(measurements: Mapping[str, Mapping[str, Any]], *, title: str, note: str) -> str:
    """The HTML text. The measurements stand in a script element that is never run, with every ``<`` escaped."""
    folder = files("hsd.viewer")
    text = json.dumps(measurements, separators=(",", ":"))  # ASCII: control characters and U+2028 are escaped
    parts = {
        "title": html.escape(title),
        "note": html.escape(note),
        "data": text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"),
        "css": folder.joinpath("page.css").read_text(encoding="utf-8"),
        "js": folder.joinpath("page.js").read_text(encoding="utf-8"),
    }
    template = folder.joinpath("page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)  # in one pass: parts are not searched


def payload(tokenizer: Any, groups: Sequence[Group], measured: Sequence[TokenCredit]) -> dict[str, Any]:
    """What page.js draws of ``measured``, all rollouts of ``groups`` in order (`hsd.viewer.measure.measure`).

    Ready for JSON. Raises ValueError where ``measured`` is empty or does not hold every rollout in order.
    """
    places = [(g, i) for g, group in enumerate(groups) for i in range(len(group.rollouts))]
    if not measured or [(r.group, r.rollout) for r in measured] != places:
        raise ValueError(f"measured: expected the {len(places)} rollouts of the groups in order, got {len(measured)}")
    own = [groups[r.group].rollouts[r.rollout].token_ids for r in measured]
    used = sorted({t for ids in own for t in ids}.union(*(_used(top) for r in measured for top in _tops(r))))
    place = {token: n for n, token in enumerate(used)}

    def top(of: Top) -> dict[str, list[int]]:
        probs = (of.probs.double().flatten() / PROBABILITY).round().int().tolist()
        return {"ids": [place[t] for t in of.ids.flatten().tolist()], "probs": probs}

    record_of = {place: n for n, place in enumerate(places)}
    return {
        "units": {"nats": NATS, "probability": PROBABILITY},
        "limits": LIMITS,
        "limit": _limit(measured),
        "first": _first(measured, groups),
        "texts": token_texts(tokenizer, used),
        "bytes": {str(n): data.hex() for n, token in enumerate(used) if (data := partial_bytes(tokenizer, token))},
        "groups": [[last_user_text(group.prompt), group.answer] for group in groups],
        "rollouts": [
            {
                "group": r.group,
                "index": r.rollout,
                **_verdict(groups[r.group], r.rollout),
                "peer": None if r.peer is None else record_of[r.group, r.peer],
                "tau": r.tau,
                "mean": [_mean_abs(r.credit), _mean_abs(r.answer_only)],
                "tokens": [place[t] for t in tokens],
                "credit": _thousandths(r.credit),
                "answer": _thousandths(r.answer_only),
                "kl": _thousandths(r.kl),
                "logp": _thousandths(r.student_logps),
                "top": dict(zip(("student", "teacher"), map(top, _tops(r)), strict=True)),
            }
            for r, tokens in zip(measured, own, strict=True)
        ],
    }


def _verdict(group: Group, i: int) -> dict[str, Any]:
    rollout = group.rollouts[i]
    return {"ok": i in group.successes, "reward": rollout.reward} if rollout.scored else {"ok": None, "reward": None}


def _tops(r: TokenCredit) -> tuple[Top, Top]:
    if r.student_top is None or r.teacher_top is None:
        raise ValueError(f"measured: expected the likeliest tokens of rollout {r.rollout} of group {r.group}, got none")
    return r.student_top, r.teacher_top


def _used(top: Top) -> set[int]:
    return set(top.ids.flatten().tolist())


def _limit(measured: Sequence[TokenCredit]) -> float:
    """Nats at full colour: the median over rollouts of the largest |A|, rounded up to a step of the page's scale. Where
    any leaves its peer, over those: a success beside a success has little credit."""
    peaks = sorted(
        r.credit[r.credit.isfinite()].abs().max().item()
        for r in ([r for r in measured if r.tau is not None] or measured)
        if r.credit.isfinite().any()
    )
    return next((step for step in LIMITS if peaks and step >= peaks[len(peaks) // 2]), LIMITS[-1])


def _first(measured: Sequence[TokenCredit], groups: Sequence[Group]) -> int:
    """The rollout that the page opens with: the first failure that leaves its peer."""
    failing = (n for n, r in enumerate(measured) if r.tau is not None and r.rollout in groups[r.group].failures)
    return next(failing, 0)


def _mean_abs(credit: Tensor) -> float | None:
    mean = credit.abs().mean().item()
    return round(mean, 4) if math.isfinite(mean) else None


def _thousandths(values: Tensor) -> list[int | None]:
    return [round(x / NATS) if math.isfinite(x) else None for x in values.tolist()]
