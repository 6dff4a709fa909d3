"""Which sequences go through the models in a step's loss: those that a term reads at this step, and no others."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from tiny_runs import QUESTIONS, Recorder, make, qwen3
from torch.nn.modules.module import register_module_forward_hook
from transformers import Qwen3Model

from hsd.hindsight.context import PARTS, ContextTemplate
from hsd.methods.draw import Drawn, Row
from hsd.methods.method import Method, nothing
from hsd.methods.term import Term
from hsd.train.batch import unpack
from hsd.train.update import Objective

SHORT = dict.fromkeys(PARTS, "|{text}")
TEMPLATE = ContextTemplate("[{answer}|{demonstration}]", "[{answer}]", "[|{demonstration}]", "[{feedback}]", SHORT, "]")
ROWS = [{**q, "solution": f"{i}+{i}="} for i, q in enumerate(QUESTIONS)]
B = 8
MARKS = {"ask": "[{attempt}", "separator": "+", "step": ";{n}={step}", "tag_key": "1", "tag_error": "0", "most": 0.9}
FADES = {"divergence_coef": [1.0, 0.0, 8], "policy_coef": 1.0, "reference_coef": 0.0}
CASES = {  # method, options, step -> sequences through teacher and reference
    "trace's last": ("trace", {"method_args": MARKS}, 39, (B, 0)),
    "dapo is what is left": ("trace", {"method_args": MARKS}, 40, (0, 0)),
    "hsd fades": ("hsd", FADES, 7, (B, 0)),
    "hsd has faded": ("hsd", FADES, 8, (0, 0)),
    "hsd, other weights": ("hsd", FADES | {"teacher": "fixed"}, 8, (0, 0)),
    "hsd, two weights": ("hsd", FADES | {"teacher": "trust_region"}, 8, (0, 0)),
    "hsd, measured": ("hsd", FADES | {"diagnostics": True}, 8, (B, 0)),
    "hsd, the reference stays": ("hsd", FADES | {"teacher": "fixed", "reference_coef": 0.5}, 8, (0, B)),
    "hsd, both have faded": ("hsd", FADES | {"reference_coef": [0.5, 0.0, 8]}, 8, (0, 0)),
    "the gap before step 1": ("sdpg", {}, 0, (B, 0)),
    "sdpg": ("sdpg", {}, 1, (B, B)),
    "sdpg has ended": ("sdpg", {}, 400, (0, 0)),
    "the mixture": ("grpo+opsd", FADES, 7, (B, 0)),
    "the mixture has faded": ("grpo+opsd", FADES, 8, (0, 0)),
    "ssopd": ("ssopd", FADES, 8, (0, 0)),
    "an advantage reads the teacher": ("rlsd", {"divergence_coef": 0.0}, 5, (B, 0)),
    "whose coefficient is 0": ("rlsd", {"divergence_coef": 0.0, "policy_coef": [1.0, 0.0, 5]}, 5, (0, 0)),
    "two teachers": ("rlcsd", {}, 5, (2 * B, 0)),
}


@contextmanager
def counted(trainer):
    """{"student", "teacher", "reference"} -> sequences of the forward passes inside; by the tree, "tokens" of all."""
    found = {"student": 0, "others": 0, "tokens": 0}

    def hook(module, args, out):
        if isinstance(module, Qwen3Model):
            found["student" if torch.is_grad_enabled() else "others"] += len(sizes[-1])
            found["tokens"] += sizes[-1].numel()

    sizes = []

    def before(module, args, kwargs):
        sizes.append(kwargs["input_ids"])

    bodies = [m.get_decoder() for m in (trainer._policy, *trainer.frozen.models.values())]
    handles = [body.register_forward_pre_hook(before, with_kwargs=True) for body in bodies]
    handles.append(register_module_forward_hook(hook))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def trainer_of(folder, method, **options):
    """After a step, so that there is a batch, and off the initial weights, so that student and teacher differ."""
    trainer = make(
        qwen3(initializer_range=0.15), folder, Recorder, template=TEMPLATE, questions=ROWS, method=method, **options
    )
    trainer.train()
    return trainer


def loss_of(trainer, objective):
    """(loss, gradients, what went through the models) of the last generation."""
    trainer.model.zero_grad()
    with counted(trainer) as found:
        out = trainer.micro_batch_loss(trainer._policy, unpack(trainer.batches[-1]), objective)
    out.loss.backward()
    return out, [p.grad.clone() for p in trainer.model.parameters()], found


@pytest.mark.parametrize("name", CASES)
def test_a_term_whose_coefficient_is_0_costs_no_forward_pass(name, tmp_path):
    method, options, step, (teacher, reference) = CASES[name]
    trainer = trainer_of(tmp_path, method, prefix_sharing="none", **options)
    objective = trainer.args.objective(step)
    out, gradients, found = loss_of(trainer, objective)
    passes = 2 if options.get("teacher") == "trust_region" else 1
    assert (found["student"], found["others"]) == (B, passes * teacher + reference)
    assert (out.stats is not None) == (teacher > 0) and (out.reference is not None) == (reference > 0)
    also, same, measured = loss_of(trainer, replace(objective, measure=True))
    assert measured["others"] >= passes * B + reference and also.stats is not None
    assert torch.equal(out.loss, also.loss)
    assert all(map(torch.equal, gradients, same))


OF_ROWS = {
    "mixed_policy": {"method_args": {"ask": "[{attempt}", "which": "all"}},
    "pbsd": {"method_args": {"beta": 0.3}},
    "imitate": {"method": f"{__name__}:IMITATE"},
    "stable_opd": {"method_args": {"gold": 0.5}, "reference_coef": 0.1},
}


def shortest(view):
    yield from ()
    best = view.shortest_success
    return None if best is None else Drawn(rows={best: [Row(view.group.rollouts[best].token_ids)]})


IMITATE = Method(
    "imitate",
    nothing,
    (Term("sampled", lambda logps, s: -logps, rows=True, teacher=False),),
    draw=shortest,
    max_rows=1,
    defaults={"teacher": "fixed", "divergence_coef": 0.0, "policy_coef": 1.0, "reference_coef": 0.0},
)


SHARING = ({"prefix_sharing": "none"}, {"prefix_sharing": "tree"}, {"tree_token_budget": 40})
PAIRS = [(method, s) for method in OF_ROWS for s in SHARING if method != "pbsd" or "tree_token_budget" not in s]


@pytest.mark.parametrize("teacher", ["live", "fixed"])
@pytest.mark.parametrize(("method", "sharing"), PAIRS)
def test_rollouts_that_no_term_reads_cost_no_forward_pass(method, teacher, sharing, tmp_path, monkeypatch):
    options = {"method": method, "teacher": teacher} | OF_ROWS[method] | sharing
    trainer = trainer_of(tmp_path, **options)
    rows = int(trainer.batches[-1]["rows/mask"].any(-1).sum())
    out, gradients, found = loss_of(trainer, trainer.args.objective(0))
    reads = method == "stable_opd"
    with monkeypatch.context() as patch:
        patch.setattr(Objective, "reads_rollouts", True)
        also, same, more = loss_of(trainer, trainer.args.objective(0))
    if sharing == {"prefix_sharing": "none"}:
        taught = {"imitate": 0}.get(method, rows)
        assert (found["student"], found["others"]) == ((B + rows, 2 * (B + rows)) if reads else (rows, taught))
        assert more["student"] == B + rows
    assert (found["tokens"] == more["tokens"]) if reads else (found["tokens"] < more["tokens"])
    torch.testing.assert_close(out.loss, also.loss, rtol=1e-5, atol=1e-7)
    scale = max(g.abs().max() for g in same).item()
    assert scale > 1e-4
    for a, b in zip(gradients, same, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("method", ["mixed_policy", "pbsd", "imitate"])
def test_a_micro_batch_of_no_rows_goes_through_no_model(method, tmp_path):
    trainer = trainer_of(tmp_path, **{"method": method, "prefix_sharing": "none"} | OF_ROWS[method])
    batch = {k: v for k, v in trainer.batches[-1].items() if not k.startswith("rows/")}
    trainer.batches.append(batch)
    out, gradients, found = loss_of(trainer, trainer.args.objective(0))
    assert out.loss == 0.0 and found["tokens"] == 0
    assert len(gradients) == len(list(trainer.model.parameters())) and not any(g.any() for g in gradients)


@pytest.mark.parametrize(
    ("method", "needed"), [("grpo", True), ("pbsd", False), ("mixed_policy", False), ("sdpo", True)]
)
def test_log_probs_of_older_rollouts_are_computed_where_a_ratio_reads_them(method, needed, tmp_path):
    options = {"method": method} | OF_ROWS.get(method, {})
    trainer = make(qwen3(), tmp_path, template=TEMPLATE, questions=ROWS, **options)
    assert trainer.args.needs_old_logps is needed


@pytest.mark.parametrize("teacher", ["live", "fixed"])
@pytest.mark.parametrize("budget", [None, 40])
def test_the_tree_has_no_node_of_a_teacher_that_nothing_reads(teacher, budget, tmp_path):
    options = FADES | {"teacher": teacher, "tree_token_budget": budget}
    trainer = trainer_of(tmp_path, "hsd", prefix_sharing="tree", **options)
    read, unread = (loss_of(trainer, trainer.args.objective(step))[2]["tokens"] for step in (7, 8))
    plain = make(
        qwen3(initializer_range=0.15), tmp_path, method="grpo", prefix_sharing="tree", tree_token_budget=budget
    )
    plain.batches = [{k: v for k, v in trainer.batches[-1].items() if "teacher" not in k}]
    assert loss_of(plain, plain.args.objective(8))[2]["tokens"] == unread < read


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, set()),
        ({"reference_coef": 0.5}, {"student_entropy", "reference_kl"}),  # the alarm of the entropy goes on
        ({"reference_coef": 0.5, "kl_temperature": 0.6}, {"reference_kl"}),  # its entropy is at temperature 1
        ({"diagnostics": True}, {"kl", "student_entropy", "teacher_entropy"}),
    ],
)
def test_what_a_run_measures_once_the_divergence_has_faded(options, kept, tmp_path):
    fading = FADES | {"divergence_coef": [1.0, 0.0, 2], "max_steps": 3}
    trainer = make(qwen3(initializer_range=0.15), tmp_path, **fading | options)
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    names = {"kl", "student_entropy", "teacher_entropy"} | ({"reference_kl"} if "reference_coef" in options else set())
    found = [{name for name in names if f"hsd/{name}" in row} for row in logged]
    assert found == [names, names, kept]


def test_the_gap_is_said_where_the_divergence_rises_from_0(tmp_path, capsys):
    make(qwen3(initializer_range=0.15), tmp_path, **FADES | {"divergence_coef": [0.0, 1.0, 2]}).train()
    assert "before step 1 student and teacher are" in capsys.readouterr().out
