"""What is run: the scale of the experiment, its learning rates, and every run of the queue in order."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

GROUP_SIZE = 8


@dataclass(frozen=True)
class Scale:
    """How long and how often. A step has ``rollouts`` rollouts of ``rollouts / G`` questions."""

    seeds: int
    ablation_seeds: int
    steps: int
    pilot_steps: int
    long_steps: int = 300
    rollouts: int = 64
    warm_steps: int = 2600
    eval_every: int = 10
    validation: int = 128  # held-out questions of the curves and of the pilot; none of the final ones
    final: int = 512
    credit_questions: int = 64
    probe_every: int = 5  # steps, in the long runs
    long_seeds: int = 3
    rows: int | None = None  # of each part but main, league and cures; None is all

    @property
    def identity(self) -> dict[str, int]:
        """What a finished run must have in common with a queue that goes on; seeds may be added."""
        own = (
            "seeds",
            "ablation_seeds",
            "steps",
            "pilot_steps",
            "long_steps",
            "warm_steps",
            "probe_every",
            "long_seeds",
            "rows",
        )  # of the queue, or of a run
        return {k: v for k, v in asdict(self).items() if k not in own}


FULL = Scale(seeds=5, ablation_seeds=2, steps=40, pilot_steps=20)
QUICK = Scale(
    seeds=1,
    ablation_seeds=1,
    steps=4,
    pilot_steps=2,
    long_steps=4,
    warm_steps=300,
    eval_every=2,
    validation=32,
    final=64,
    credit_questions=6,
    probe_every=2,
    long_seeds=1,
    rows=1,
)


@dataclass(frozen=True)
class Run:
    """One training run. ``options`` are those of `hsd.HSDConfig` that differ from the method's defaults."""

    part: str
    name: str
    seed: int
    steps: int
    warm_steps: int
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    group_size: int = GROUP_SIZE
    terms: int = 4  # summands of a question
    cure: tuple[str, float] | None = None  # of `cures.CuredTrainer`

    @property
    def warm(self) -> str:
        """The key of its warm start."""
        return f"warm-{self.warm_steps}{f'-terms{self.terms}' * (self.terms != 4)}-seed{self.seed}"

    @property
    def key(self) -> str:
        """A file name, unlike that of any other run."""
        words = f"{self.part} {self.name}".replace("+", " and ").replace("=", " ")
        return "-".join([*"".join(c if c.isalnum() or c in ".-" else " " for c in words).split(), f"seed{self.seed}"])


# Every method of the main table, its learning rate from the pilot, and what else differs from its defaults. The small
# world has no solution column, so that opsd, grpo+opsd and rlsd show the answer. A demonstration without the answer is
# unlike anything that the warm start saw, so that sdpo shows both: a success contains its answer anyway.
POLICY_GRADIENT = {"learning_rate": 3e-4}
DIVERGENCE = {"learning_rate": 3e-4, "teacher": "fixed"}
SDPO = {"learning_rate": 3e-4, "show_answer": True}
MAIN: dict[str, dict[str, Any]] = {
    "hsd": DIVERGENCE,
    "grpo": POLICY_GRADIENT,
    "opsd": {**DIVERGENCE, "learning_rate": 1e-4},
    "sdpo": SDPO,
    "grpo+opsd": DIVERGENCE,
    "dapo": POLICY_GRADIENT,
    "dr_grpo": POLICY_GRADIENT,
    "rlsd": POLICY_GRADIENT,
}
# The rest of the family that needs no written text, at the pilot's rate, with the main table's changes. SDPG's schedule
# is over these 40 steps; AntiSD's verdict has no words among the 21 tokens.
SHOWN = {"learning_rate": 3e-4, "show_answer": True}
RISE_AND_FALL = [[0, 0.0], [5, 1e-3], [40, 0.0]]
LEAGUE: dict[str, dict[str, Any]] = {
    "hsd_unpaired": DIVERGENCE,
    "mopd": SHOWN,
    "ssopd": {**DIVERGENCE, **SHOWN},
    "sdpg": {**POLICY_GRADIENT, "divergence_coef": RISE_AND_FALL, "reference_coef": RISE_AND_FALL},
    "egrsd": POLICY_GRADIENT,
    "cl_egrsd": POLICY_GRADIENT,
    "rlrt": SHOWN,
    "rlcsd": POLICY_GRADIENT,
    "antisd": {**SHOWN, "method_args": {"verdict": False}},
    "vopd": POLICY_GRADIENT,
    "gspo": POLICY_GRADIENT,
    "brts": DIVERGENCE,
}
# How long each teacher holds: HSD for many more steps.
LONG_TEACHERS: dict[str, dict[str, Any]] = {
    "live": {},
    "ema": {},
    "copy": {},
    "gated": {"teacher_gate": [10, 0.05, 0.1]},  # our numbers: no source publishes them
    "fixed": {},
    "trust_region": {},
}
# HSD with a live teacher, a cure and no second copy of the weights: no reference policy either. (cure, learning rate)
CURES: dict[str, tuple[tuple[str, float], float]] = {
    "share 0.1": (("share", 0.1), 3e-4),
    "share 0.5": (("share", 0.5), 3e-4),
    "share 1": (("share", 1.0), 3e-4),
    "subtract": (("subtract", 1.0), 3e-4),
    "hold 0.1": (("hold", 0.1), 3e-4),
    "hold 1": (("hold", 1.0), 3e-4),
    "none, rate 1e-4": (("plain", 0.0), 1e-4),
    "none": (("plain", 0.0), 3e-4),
}
QUICK_CURES = ("share 0.5", "subtract")  # "hold" wants a success of the warm start, a short one may have none

APART = ("long", "cures")  # 300 steps, an hour and a half on two cores: asked for by name

# Six summands instead of four: five steps that each slip in 30 % of the cases, so p is near 0.15 and one reward is
# spread over more decisions.
CHAIN_TERMS = 6
# The variants of HSD take over what SDPO has and HSD has not: a teacher that moves along, a bounded divergence.
# Expected: with the EMA HSD ends above GRPO, as the ceiling of its fixed teacher goes; JSD alone leaves it where it is.
MOVING = {"teacher": "ema", "teacher_ema_rate": 0.05}
CHAINS: dict[str, tuple[str, dict[str, Any]]] = {
    **{method: (method, (MAIN | LEAGUE)[method]) for method in ("hsd", "grpo", "grpo+opsd", "sdpo", "egrsd", "rlsd")},
    "hsd, EMA 0.05": ("hsd", {**DIVERGENCE, **MOVING}),
    "hsd, jsd": ("hsd", {**DIVERGENCE, "divergence": "jsd"}),
    "hsd, jsd, EMA 0.05": ("hsd", {**DIVERGENCE, **MOVING, "divergence": "jsd"}),
}

PILOT_RATES = (1e-4, 3e-4, 1e-3)
PILOT: dict[str, tuple[str, dict[str, Any]]] = {
    "hsd": ("hsd", DIVERGENCE),
    "grpo": ("grpo", POLICY_GRADIENT),
    "opsd": ("opsd", DIVERGENCE),
    "sdpo": ("sdpo", SDPO),
    "sdpo, EMA 0.005": ("sdpo", {**SDPO, "teacher_ema_rate": 0.005}),
}

# part -> {row: (options over the main HSD run, group size)}; the main HSD run is a row of each.
ABLATIONS: dict[str, dict[str, tuple[dict[str, Any], int]]] = {
    "teacher": {
        "live": ({"teacher": "live"}, 8),
        "ema": ({"teacher": "ema"}, 8),
        "trust_region": ({"teacher": "trust_region"}, 8),
    },
    "fallback": {"mask": ({"fallback": "mask"}, 8)},
    "policy_coef": {"0.5": ({"policy_coef": 0.5}, 8), "1": ({"policy_coef": 1.0}, 8)},
    "G": {"4": ({}, 4), "16": ({}, 16)},
    "reference_coef": {
        "0": ({"reference_coef": 0.0}, 8),
        "0.01": ({"reference_coef": 1e-2}, 8),
        "0.1": ({"reference_coef": 1e-1}, 8),
    },
    "divergence": {"reverse_kl": ({"divergence": "reverse_kl"}, 8), "jsd": ({"divergence": "jsd"}, 8)},
    "peer_rule": {
        "uniform": ({"peer_rule": "uniform"}, 8),
        "shortest": ({"peer_rule": "shortest"}, 8),
        "highest_perplexity": ({"peer_rule": "highest_perplexity"}, 8),
        "lowest_perplexity": ({"peer_rule": "lowest_perplexity"}, 8),
        "first": ({"peer_rule": "first"}, 8),
    },
}
ON_ALL_SEEDS = ("divergence",)  # jsd leads on seeds 0 and 1, and on chains
# Again from warm starts of half the steps, whose teachers are worse.
HALF = ("hsd", "grpo", "opsd")
# Again at a third of the learning rate: the pilot saw seed 0 alone, and seed 3 learns least but one.
SLOW, SLOW_SEEDS = ("hsd", "grpo"), (0, 3)
# Again without OPSD's pointwise clip of the divergence, which lets its loss fall below 0.
UNCLIPPED = ("opsd", "grpo+opsd")
# The row that the main HSD run is.
BASE_ROW = {
    "teacher": "fixed",
    "fallback": "answer",
    "policy_coef": "0",
    "G": "8",
    "reference_coef": "0.001",
    "peer_rule": "paired",
    "divergence": "forward_kl",
}


def queue(scale: Scale) -> list[Run]:
    """All runs, the most wanted first: the pilot, then seed by seed over all methods, then over all ablations. The
    row of an ablation that is the main HSD run is not repeated."""
    steps, warm, some = scale.steps, scale.warm_steps, slice(scale.rows)
    runs = []
    for rate in PILOT_RATES[some]:
        for name, (method, options) in [*PILOT.items()][some]:
            at_rate = {**options, "learning_rate": rate}
            runs.append(Run("pilot", f"{name} {rate:g}", 0, scale.pilot_steps, warm, method, at_rate))
    for seed in range(scale.seeds):
        for method, options in MAIN.items():
            runs.append(Run("main", method, seed, steps, warm, method, dict(options)))
    for seed in range(scale.seeds):
        for method, options in LEAGUE.items():
            runs.append(Run("league", method, seed, steps, warm, method, dict(options)))
    for seed in range(scale.long_seeds):
        for teacher, options in [*LONG_TEACHERS.items()][some]:
            asked = {**MAIN["hsd"], "teacher": teacher, **options}
            runs.append(Run("long", teacher, seed, scale.long_steps, warm, "hsd", asked))
    for seed in range(scale.long_seeds):
        for name in QUICK_CURES if scale == QUICK else CURES:
            cure, rate = CURES[name]
            asked = {"learning_rate": rate, "teacher": "live", "reference_coef": 0.0}
            runs.append(Run("cures", name, seed, scale.long_steps, warm, "hsd", asked, cure=cure))
    for seed in range(scale.ablation_seeds):
        for name, (method, options) in [*CHAINS.items()][some]:
            runs.append(Run("chains", name, seed, steps, warm, method, dict(options), terms=CHAIN_TERMS))
    for seed in range(scale.seeds):
        for part, rows in ABLATIONS.items():
            for name, (options, size) in [*rows.items()][some]:
                if seed >= scale.ablation_seeds and part not in ON_ALL_SEEDS:
                    continue
                runs.append(Run(part, name, seed, steps, warm, "hsd", {**MAIN["hsd"], **options}, size))
    for seed in range(scale.ablation_seeds):
        for method in UNCLIPPED[some]:
            runs.append(Run("unclipped", method, seed, steps, warm, method, {**MAIN[method], "kl_clip": 0.0}))
        for method in HALF[some]:
            runs.append(Run("half", method, seed, steps, warm // 2, method, dict(MAIN[method])))
    for seed in [s for s in SLOW_SEEDS if s < scale.seeds]:
        for method in SLOW[some]:
            runs.append(Run("slow", method, seed, steps, warm, method, {**MAIN[method], "learning_rate": 1e-4}))
    return runs
