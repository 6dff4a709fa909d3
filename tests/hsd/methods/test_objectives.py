"""Each method's step is the gradient of its equation, written here in a few lines over full logits."""

import pytest
import torch
from datasets import Dataset
from tiny_runs import ACCUMULATED, STEP, TOKENIZER, half, qwen3
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from hsd.hindsight.context import ContextTemplate
from hsd.tasks import small_world
from hsd.train.config import HSDConfig
from hsd.train.limits import check_columns
from hsd.train.trainer import HSDTrainer

TEMPLATE = ContextTemplate("[{answer}|{demonstration}]", "[{answer}]", "[|{demonstration}]", "[{feedback}]")
QUESTIONS = [
    {**q, "solution": f"{i}+{i}=", "demonstration": f"#{i}#"}
    for i, q in enumerate(small_world.make_questions(6, seed=0))
]


def build():
    return qwen3(initializer_range=0.15)  # wide enough for RLSD's and OPSD's clips to bind


class Recorder(HSDTrainer):
    def _generate_and_score_completions(self, inputs):
        self.batch = super()._generate_and_score_completions(inputs)
        self.rows = inputs
        return self.batch


def trainer_of(tmp_path, reward=half, **options):
    feedback = options.pop("feedback_fn", None)
    return Recorder(
        model=build(),
        reward_funcs=reward,
        args=HSDConfig(output_dir=str(tmp_path), **STEP | options),
        train_dataset=Dataset.from_list(QUESTIONS),
        processing_class=TOKENIZER,
        context_template=TEMPLATE,
        feedback_fn=feedback,
    )


def log_probs(model, batch, prompt):
    ids = torch.cat([batch[f"{prompt}_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch[f"{prompt}_mask"], batch["completion_mask"]], 1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    return logits[:, -(batch["completion_ids"].shape[1] + 1) : -1].log_softmax(-1)


def moved(trainer):
    """(weights before, weights after) of one step."""
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    return before, {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


def check(trainer, equation):
    """The step taken is minus the gradient of ``equation(student, teacher, batch, mask, chosen log-probs)``."""
    before, after = moved(trainer)
    model = trainer.model.eval()
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(before[n])
    batch = trainer.batch
    with torch.no_grad():
        teacher = log_probs(model, batch, "teacher_prompt")  # at the first step every teacher has these weights
    student = log_probs(model, batch, "prompt")
    chosen = [x.gather(-1, batch["completion_ids"][..., None]).squeeze(-1) for x in (student, teacher)]
    loss = equation(student, teacher, batch, batch["completion_mask"].float(), *chosen)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    logged = next(row["loss"] for row in trainer.state.log_history if "loss" in row)
    assert logged == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
    scale = max(g.abs().max() for g in grads).item()
    assert scale > 1e-4  # a vanishing gradient would pass any comparison
    for (name, _), g in zip(model.named_parameters(), grads, strict=True):
        torch.testing.assert_close(before[name] - after[name], g, rtol=2e-3, atol=2e-5 * scale, msg=name)


def over_rollouts(x, mask):
    return ((x * mask).sum(-1) / mask.sum(-1)).mean()


def over_tokens(x, mask):
    return (x * mask).sum() / mask.sum()


def forward_kl(p, q, *_):
    return (q.exp() * (q - p)).sum(-1)


def jsd(p, q):
    m = (0.5 * p.exp() + 0.5 * q.exp()).log()
    return 0.5 * (q.exp() * (q - m)).sum(-1) + 0.5 * (p.exp() * (p - m)).sum(-1)


def surrogate(lp, advantages):
    return -(lp - lp.detach()).exp() * advantages


def clipped(p, q):
    return (q.exp() * (q - p)).clamp(max=0.05).sum(-1)


def rlsd_advantages(batch, lp, lq, share):
    a = batch["advantages"][:, None]
    w = torch.exp(torch.sign(a) * (lq - lp.detach())).clamp(0.8, 1.2)
    return a * ((1 - share) + share * w)


EQUATIONS = {
    "opsd": lambda p, q, b, m, lp, lq: over_tokens(clipped(p, q), m),
    "grpo+opsd": lambda p, q, b, m, lp, lq: over_rollouts(
        0.5 * clipped(p, q) + surrogate(lp, b["advantages"][:, None]), m
    ),
    "sdpo": lambda p, q, b, m, lp, lq: over_tokens(jsd(p, q), m * b["has_context"][:, None]),
    "sdft": lambda p, q, b, m, lp, lq: over_tokens(jsd(p, q), m),
    "rlsd": lambda p, q, b, m, lp, lq: over_rollouts(surrogate(lp, rlsd_advantages(b, lp, lq, 0.5)), m),
}


@pytest.mark.parametrize("sharing", ["none", "tree"])
@pytest.mark.parametrize("batches", [{}, ACCUMULATED], ids=["whole", "accumulated"])
@pytest.mark.parametrize("method", EQUATIONS)
def test_a_step_is_the_gradient_of_the_methods_equation(method, batches, sharing, tmp_path):
    check(trainer_of(tmp_path, method=method, prefix_sharing=sharing, **batches), EQUATIONS[method])


def test_the_nonnegative_form_of_the_clip(tmp_path):
    def equation(p, q, b, m, *_):
        return over_tokens((q.exp() * (q - p) - q.exp() + p.exp()).clamp(max=0.05).sum(-1), m)

    check(trainer_of(tmp_path, method="opsd", kl_clip_form="nonnegative"), equation)


@pytest.mark.parametrize("options", [{}, {"prefix_sharing": "tree", "tree_token_budget": 30}], ids=["plain", "chunks"])
def test_hsd_beside_the_grpo_advantage(options, tmp_path):
    trainer = trainer_of(tmp_path, policy_coef=0.7, reference_coef=0.0, **options)
    check(
        trainer,
        lambda p, q, b, m, lp, lq: over_rollouts(forward_kl(p, q) + 0.7 * surrogate(lp, b["advantages"][:, None]), m),
    )


def the_first_that_says_something(completions, **kwargs):
    """One success: it has no peer, nor has anybody in the other group."""
    first = next(i for i, text in enumerate(completions) if text.strip())
    return [float(i == first) for i in range(len(completions))]


def test_no_fallback_leaves_rollouts_without_a_peer_out(tmp_path):
    trainer = trainer_of(tmp_path, reward=the_first_that_says_something, fallback="mask", reference_coef=0.0)
    check(trainer, lambda p, q, b, m, *_: over_none(forward_kl(p, q), m, b["has_context"]))
    (success,) = [i for i, found in enumerate(trainer.batch["success"].tolist()) if found]
    assert trainer.batch["has_context"].tolist() == [i // 4 == success // 4 and i != success for i in range(8)]


def test_the_solution_stands_in_for_a_peer(tmp_path):
    """A rollout with a peer is shown it as before; the others are shown the data's solution as its demonstration."""
    trainer = trainer_of(tmp_path, reward=the_first_that_says_something, fallback="solution", reference_coef=0.0)
    trainer.train()
    batch = trainer.batch
    texts = TOKENIZER.batch_decode(batch["teacher_prompt_ids"], skip_special_tokens=True)
    questions = TOKENIZER.batch_decode(batch["prompt_ids"], skip_special_tokens=True)
    replies = TOKENIZER.batch_decode(batch["completion_ids"], skip_special_tokens=True)
    rows = {q["prompt"]: q for q in QUESTIONS}
    expected = [rows[q]["solution"] for q in questions]
    (success,) = [i for i, found in enumerate(batch["success"].tolist()) if found]
    for i in range(success - success % 4, success - success % 4 + 4):
        expected[i] = expected[i] if i == success else replies[success]
    assert texts == [f"{q}[{rows[q]['answer']}|{shown}]" for q, shown in zip(questions, expected, strict=True)]


def test_a_solution_is_asked_of_the_data(tmp_path):
    args = trainer_of(tmp_path, fallback="solution").args
    check_columns("data", ("prompt", "answer", "solution"), args)
    with pytest.raises(ValueError, match=r"'solution'.*fallback='solution'"):
        check_columns("data", ("prompt", "answer"), args)
    check_columns("data", ("prompt", "answer"), trainer_of(tmp_path).args)


def over_none(x, mask, shown):
    """Mean over rollouts in which those left out count as loss 0."""
    return ((x * mask).sum(-1) / mask.sum(-1) * shown).mean()


def test_trl_methods_are_trls(tmp_path):
    """The same weights, questions and seed through `GRPOTrainer` and through method='dr_grpo'."""
    ours = trainer_of(tmp_path / "ours", method="dr_grpo", policy_loss="trl")
    _, after = moved(ours)
    trl = GRPOTrainer(
        model=build(),
        reward_funcs=half,
        args=GRPOConfig(
            output_dir=str(tmp_path / "trl"), loss_type="dr_grpo", scale_rewards="none", top_p=0.95, beta=0.0,
            lr_scheduler_type="constant", **STEP,
        ),
        train_dataset=Dataset.from_list(QUESTIONS),
        processing_class=TOKENIZER,
    )  # fmt: skip
    start, expected = moved(trl)
    assert any(not torch.equal(start[n], expected[n]) for n in start)
    for name in expected:
        torch.testing.assert_close(after[name], expected[name], rtol=0, atol=0)
    row = ours.state.log_history[0]
    assert 0.0 <= row["hsd/success_rate"] <= 1.0 and 0.0 <= row["hsd/coverage"] <= 1.0
    assert "hsd/kl" not in row


@pytest.mark.parametrize(
    ("method", "name", "value", "otherwise"),
    [
        ("grpo", "loss_type", "dapo", "grpo"),
        ("dr_grpo", "scale_rewards", "group", "none"),
        ("gspo", "epsilon", 0.2, 3e-4),
    ],
)
def test_trls_own_default_may_be_asked_for(method, name, value, otherwise, tmp_path):
    args = {"output_dir": str(tmp_path), "method": method, "bf16": False, "use_cpu": True}
    assert getattr(HSDConfig(**args, **{name: value}), name) == value
    assert getattr(HSDConfig(**args), name) == otherwise


def test_our_surrogate_is_trls_grpo_loss(tmp_path):
    """With nothing but the policy term (an RLSD whose mix is 0), the step is that of TRL's loss_type='grpo'."""
    _, after = moved(trainer_of(tmp_path / "ours", method="rlsd", advantage_mix=0.0))
    _, expected = moved(trainer_of(tmp_path / "trl", method="grpo", policy_loss="trl"))
    for name in expected:
        torch.testing.assert_close(after[name], expected[name], rtol=1e-4, atol=1e-6)


def test_k3_and_refresh(tmp_path):
    """Two steps: at the second the reference is the average of the policy that the first step left."""
    refreshed = {"reference_kl": "k3", "reference_refresh_steps": 1, "reference_ema_rate": 0.25}
    trainer = trainer_of(tmp_path, max_steps=2, reference_coef=0.5, teacher="fixed", learning_rate=0.1, **refreshed)
    start = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    seen = []

    def watch(module, args, kwargs, output):
        seen.append(module.embed_tokens.weight.detach().clone())

    reference = trainer.frozen.models["reference"]
    reference.model.register_forward_hook(watch, with_kwargs=True)
    steps = []
    step = trainer.frozen.step

    def remember(policy, done, refresh=False):
        steps.append(policy.model.embed_tokens.weight.detach().clone())
        step(policy, done)

    trainer.frozen.step = remember
    trainer.train()
    name = "model.embed_tokens.weight"
    assert torch.equal(seen[0], start[name])
    torch.testing.assert_close(seen[-1], 0.75 * start[name] + 0.25 * steps[0])


def test_k3_equation(tmp_path):
    """At the first step the reference is the student: k3 and its gradient vanish, so compare at another point."""
    trainer = trainer_of(tmp_path, reference_coef=0.5, reference_kl="k3", teacher="live")
    other = build()
    torch.manual_seed(5)
    with torch.no_grad():
        for p in other.parameters():
            p += 0.02 * torch.randn_like(p)
    trainer.frozen.models["initial_policy"].load_state_dict(other.state_dict())

    def equation(p, q, b, m, lp, lq):
        with torch.no_grad():
            r = log_probs(other, b, "prompt").gather(-1, b["completion_ids"][..., None]).squeeze(-1)
        return over_rollouts(forward_kl(p, q) + 0.5 * ((r - lp).exp() - (r - lp) - 1), m)

    check(trainer, equation)


@pytest.mark.parametrize(
    "sharing",
    [
        {"prefix_sharing": "none"},
        {"prefix_sharing": "tree"},
        {"prefix_sharing": "tree", "tree_token_budget": 30},
    ],
    ids=["none", "tree", "chunks"],
)
def test_trust_region_mixes_logits(sharing, tmp_path):
    trainer = trainer_of(tmp_path, teacher="trust_region", trust_region_share=0.3, reference_coef=0.0, **sharing)
    other = build()
    torch.manual_seed(5)
    with torch.no_grad():
        for p in other.parameters():
            p += 0.05 * torch.randn_like(p)
    trainer.frozen.models["initial_policy"].load_state_dict(other.state_dict())

    def equation(p, q, b, m, *_):
        with torch.no_grad():
            mixed = (0.7 * log_probs(other, b, "teacher_prompt") + 0.3 * q).log_softmax(-1)
        return over_rollouts(forward_kl(p, mixed), m)

    check(trainer, equation)


def test_a_rollout_whose_verifier_failed_has_no_advantage(tmp_path):
    """TRL counts None as a reward of 0, which would be a verdict."""

    def unsure(completion_ids, **kwargs):
        return [None if i == 1 else float(i % 2) for i in range(len(completion_ids))]

    trainer = trainer_of(tmp_path, reward=unsure, method="grpo+opsd")
    trainer.train()
    advantages = trainer.batch["advantages"]
    assert advantages[1] == 0.0 and (advantages[[0, 2, 3]] != 0.0).all()
    assert not trainer.batch["success"][1]
    row = trainer.state.log_history[0]
    assert row["hsd/unscored"] == pytest.approx(1 / 8)
    assert row["hsd/success_rate"] == pytest.approx(3 / 7) and row["hsd/failing_with_peer"] == 1.0


def test_each_method_shows_its_own_context(tmp_path):
    def contexts(method, **options):
        trainer = trainer_of(tmp_path, method=method, **options)
        trainer.train()
        batch = trainer.batch
        texts = TOKENIZER.batch_decode(batch["teacher_prompt_ids"], skip_special_tokens=True)
        questions = TOKENIZER.batch_decode(batch["prompt_ids"], skip_special_tokens=True)
        by_prompt = {q["prompt"]: q for q in QUESTIONS}
        rows = [by_prompt[q] for q in questions]
        return batch, rows, [t.removeprefix(q) for t, q in zip(texts, questions, strict=True)]

    _, rows, shown = contexts("opsd")
    assert shown == [f"[{r['answer']}|{r['solution']}]" for r in rows]
    _, rows, shown = contexts("sdft")
    assert shown == [f"[|{r['demonstration']}]" for r in rows]
    feedback = lambda completions, answer, **kw: [f"{a}+" for a in answer]  # noqa: E731
    batch, rows, shown = contexts("sdpo", feedback_fn=feedback)
    texts = TOKENIZER.batch_decode(batch["completion_ids"], skip_special_tokens=True)
    success = batch["success"].tolist()
    for i, row in enumerate(rows):
        group = range(i - i % 4, i - i % 4 + 4)
        peers = [j for j in group if success[j] and j != i]
        expected = f"[|{texts[peers[0]]}]" if peers and texts[peers[0]].strip() else None
        if expected is None:
            assert peers or shown[i] == f"[{row['answer']}+]"  # feedback only where there is no demonstration
        else:
            assert shown[i] == expected
    batch, _, shown = contexts("sdpo")
    assert all((s == "") == (not kept) for s, kept in zip(shown, batch["has_context"].tolist(), strict=True))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"method": "hsdd"}, "method"),
        ({"method": "grpo", "policy_loss": "trl", "reference_coef": 0.1}, "reference_coef"),
        ({"method": "grpo", "teacher": "ema"}, "teacher"),
        ({"advantage_mix": 0.5}, "advantage_mix"),
        ({"method": "opsd", "epsilon": 0.3}, "epsilon"),
        ({"policy_coef": [1.0, 0.0]}, "policy_coef"),
        ({"advantage_mix": "much"}, "advantage_mix"),
        ({"fallback": "peer"}, "fallback"),
        ({"reference_kl": "k2"}, "reference_kl"),
        ({"kl_clip_form": "both"}, "kl_clip_form"),
        ({"reference_refresh_steps": 5, "reference_coef": 0.0}, "reference_refresh_steps"),
        ({"method": "sdpo", "temperature": 0.5}, "importance_cap"),
        ({"trust_region_share": 0.0}, "trust_region_share"),
        ({"feedback_fn": half}, "feedback_fn"),
    ],
)
def test_bad_options_are_named(options, named, tmp_path):
    with pytest.raises(ValueError, match=named):
        trainer_of(tmp_path, **options)


def test_a_method_asks_for_its_columns(tmp_path):
    with pytest.raises(ValueError, match="demonstration"):
        HSDTrainer(
            model=build(),
            reward_funcs=half,
            args=HSDConfig(output_dir=str(tmp_path), method="sdft", **STEP),
            train_dataset=Dataset.from_list([{"prompt": "1+1=", "answer": "2"}]),
            processing_class=TOKENIZER,
        )
