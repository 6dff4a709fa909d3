"""What is run: every row of the experiment and what was expected of it before it ran."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

STEPS = {"additions": 16, "chain_sum": 60}  # of 24 rollouts, no training question twice in 28; of 64 rollouts
MEASURE_TEACHER = 5  # every so many steps


@dataclass(frozen=True)
class Row:
    """``options`` are those of `hsd.HSDConfig` beside the task's."""

    name: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    expected: str = ""


COPY = {"teacher": "copy", "teacher_copy_steps": 4}
WORDS = {  # the default words, which ask for the teacher's own
    "with_peer_template": "\n\nHere is the reference answer and a correct solution to the same problem.\n\n"
    "Reference answer: {answer}\n\nCorrect solution:\n{demonstration}\n\nNow solve the problem in your own words.",
    "answer_only_template": "\n\nHere is the reference answer to the problem.\n\nReference answer: {answer}\n\n"
    "Now solve the problem in your own words.",
}
# The peer as the model's own earlier reply, in the turns of the model's chat format: nothing speaks of a reference.
AGAIN = "<|im_end|>\n<|im_start|>user\nThat is right, the answer is {answer}. Say it again."
TURN = "<|im_end|>\n<|im_start|>assistant\n"
TURNS = {
    "with_peer_template": TURN + "{demonstration}" + AGAIN,
    "answer_only_template": TURN + "{answer}" + AGAIN.replace(", the answer is {answer}", ""),
}
# The question ends in "=", which the answer completes; the peer is the reply to it, and the question is asked again.
TURN_OF_QUESTION = "<|im_end|>\n<|im_start|>user\n{question}"
ASKED_AGAIN = {
    "with_peer_template": " {answer}" + TURN + "{demonstration}" + TURN_OF_QUESTION,
    "answer_only_template": " {answer}" + TURN + "Answer: {answer}" + TURN_OF_QUESTION,
}
PEERS_ONLY = {"fallback": "mask"}
FADING = {"policy_coef": 1.0, "divergence_coef": [1.0, 0.0, 8]}
BEST = {**FADING, "divergence": "jsd"}  # also the task's own setting
GRPO = {"kl_temperature": 1.0, "teacher": None, "policy_loss": "fused"}
ROWS = (
    Row("grpo", "grpo", GRPO, "0.9: only the reward counts, and nothing holds the student back"),
    Row("hsd fixed", "hsd", {}, "0.5 to 0.7: within 0.1 of the fixed teacher's own success"),
    Row("hsd copy 4", "hsd", COPY, "above fixed by 0.1 or more: each copy starts where the student is"),
    Row("hsd fixed + policy", "hsd", {"policy_coef": 1.0}, "between fixed and GRPO, nearer to GRPO"),
    Row("hsd fixed, reverse KL", "hsd", {"divergence": "reverse_kl"}, "fixed + 0.05: it seeks the teacher's mode"),
    Row("opsd", "opsd", {"kl_clip": 0.0}, "below fixed: the answer alone makes a worse teacher (0.53 for 0.73)"),
    Row("hsd unpaired", "hsd_unpaired", {}, "as opsd or lower: the wrong sum stands in the context"),
    Row("hsd copy 4 + policy", "hsd", {**COPY, "policy_coef": 1.0}, "GRPO's end, reached in fewer steps"),
    Row("hsd live", "hsd", {"teacher": "live"}, "rises, then falls: the drift that both contexts share"),
    Row("hsd copy 4, reverse KL", "hsd", {**COPY, "divergence": "reverse_kl"}, "as copy 4 or above"),
    Row("hsd ema 0.1", "hsd", {"teacher": "ema", "teacher_ema_rate": 0.1}, "between fixed and copy 4"),
    Row("hsd fixed, JSD", "hsd", {"divergence": "jsd"}, "as fixed, slower"),
    Row("hsd fixed, peers only", "hsd", {"fallback": "mask"}, "fixed + 0.05: the better of the two contexts alone"),
    # Added after "hsd fixed" (0.508) had learnt its context's words, "Correct answer: 18", and a probe of other words.
    Row(
        "hsd turns, peers only",
        "hsd",
        {**TURNS, **PEERS_ONLY},
        "0.75, fixed + 0.2: this teacher answers 0.93 rightly in the words of the peer",
    ),
    Row(
        "hsd turns copy 4, peers only",
        "hsd",
        {**TURNS, **PEERS_ONLY, **COPY},
        "above turns by 0.05 to 0.1",
    ),
    Row(
        "hsd turns",
        "hsd",
        TURNS,
        "below peers only: shown the answer alone it gives a bare number, where the student adds up badly",
    ),
    Row(
        "hsd turns copy 4, peers only + policy",
        "hsd",
        {**TURNS, **PEERS_ONLY, **COPY, "policy_coef": 1.0},
        "GRPO's end or above, in fewer steps",
    ),
    # Added after "hsd turns, peers only" (0.367) had refuted that the teacher's success (0.64 to 1) is the ceiling:
    # what a teacher says rightly because it was told teaches no sum. The reward must choose among its forms.
    Row(
        "hsd 1 to 0 + policy",
        "hsd",
        FADING,
        "GRPO's end: the teacher shortens replies early, the reward alone decides from step 9 on",
    ),
    Row("hsd 0.1 + policy", "hsd", {"policy_coef": 1.0, "divergence_coef": 0.1}, "GRPO - 0.1 or better"),
    Row(
        "hsd fixed, skip 1 + policy",
        "hsd",
        {"policy_coef": 1.0, "skip_tokens": 1},
        "above fixed + policy: the context's words enter with the first token, which the reward alone chooses here",
    ),
    Row("hsd fixed, default words", "hsd", WORDS, "below fixed: a worse teacher (0.57 for 0.73)"),
    # Added after six summands of the small world, where a JSD makes HSD faster than GRPO (results/chains).
    Row(
        "hsd JSD 1 to 0 + policy",
        "hsd",
        BEST,
        "GRPO's end, and faster there than with the forward KL: a JSD bounds what the context's words cost",
    ),
    # Added after seed 6 of the row above broke at step 12, with no divergence left to hold it.
    Row(
        "hsd JSD 1 to 0.1 + policy",
        "hsd",
        {**BEST, "divergence_coef": [1.0, 0.1, 8]},
        "as 1 to 0, and seed 6 holds: a tenth of the divergence is an anchor",
    ),
    Row(
        "hsd gated",
        "hsd",
        {"teacher": "gated", "teacher_gate": [4, 0.05, 0.7]},
        "between fixed and copy 4: a refresh follows the first gain, by step 8",
    ),
    Row(
        "hsd fixed, failing only",
        "benchmarks.real_model.failing:METHOD",
        {},
        "fixed or 0.05 above: successes no longer learn the context's words",
    ),
)
# The path matters here: two steps a line each, p near 0.2. Expected before any of them ran.
CHAIN_ROWS = (
    Row("grpo", "grpo", GRPO, "0.2 to 0.5: groups of 8 are mixed in half of the cases, and only the reward counts"),
    Row("hsd fixed", "hsd", {}, "0.4: the peer's steps are worth copying, and the worked examples fix the form"),
    Row("opsd", "opsd", {"kl_clip": 0.0}, "0.25: the answer without a path"),
    Row("hsd unpaired", "hsd_unpaired", {}, "0.25: another question's steps"),
    Row("hsd copy 15", "hsd", {"teacher": "copy", "teacher_copy_steps": 15}, "above fixed by 0.05"),
    Row(
        "hsd 1 to 0 + policy",
        "hsd",
        {"policy_coef": 1.0, "divergence_coef": [1.0, 0.0, 30]},
        "GRPO's end or 0.05 above",
    ),
    # Added after "hsd fixed" (0.085) had learnt to leave out the steps, as its teacher does. This one writes the peer's
    # steps again: half of its replies are right, a third with the task's words.
    Row("hsd again, peers only", "hsd", {**ASKED_AGAIN, **PEERS_ONLY}, "0.3: the replies keep their steps"),
    Row(
        "hsd again copy 15, peers only",
        "hsd",
        {**ASKED_AGAIN, **PEERS_ONLY, "teacher": "copy", "teacher_copy_steps": 15},
        "above again by 0.05: nothing in the context is worth taking over but the steps",
    ),
    Row(
        "hsd again 1 to 0, peers only + policy",
        "hsd",
        {**ASKED_AGAIN, **PEERS_ONLY, "policy_coef": 1.0, "divergence_coef": [1.0, 0.0, 30]},
        "GRPO's end, reached in fewer steps",
    ),
    # Added after the JSD had taken away what the divergence costs on additions.
    Row(
        "hsd again JSD 1 to 0, peers only + policy",
        "hsd",
        {**ASKED_AGAIN, **PEERS_ONLY, "policy_coef": 1.0, "divergence_coef": [1.0, 0.0, 30], "divergence": "jsd"},
        "as fast as GRPO, and its end",
    ),
)
PLANS = {"additions": ROWS, "chain_sum": CHAIN_ROWS}


def key(name: str, seed: int) -> str:
    """A file name."""
    words = "".join(c if c.isalnum() or c in ".-" else " " for c in name.replace("+", "and")).split()
    return "-".join([*words, f"seed{seed}"])
