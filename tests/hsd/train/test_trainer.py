"""HSDTrainer against the paper's equation on full logits, its privileged contexts, and exact resume."""

import json
import logging
import warnings

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from tiny_runs import (
    ACCUMULATED,
    CHECKPOINTED,
    LORA,
    QUESTIONS,
    SIZES,
    TOKENIZER,
    half,
    make,
    qwen3,
    start_adapters,
)
from torch.nn.modules.module import _IncompatibleKeys as IncompatibleKeys
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from hsd.hindsight.context import ContextTemplate
from hsd.hindsight.peers import choose_peers
from hsd.policy.frozen import adapter_parameters, under_adapter
from hsd.tasks import small_world
from hsd.train.config import HSDConfig
from hsd.train.trainer import HSDTrainer


def llama():
    torch.manual_seed(2)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False)).float()


def log_probs(model, prompt, prompt_mask, completion, completion_mask):
    """Full logits of the rollout's positions from the model itself."""
    ids = torch.cat([prompt, completion], 1)
    mask = torch.cat([prompt_mask, completion_mask], 1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    return logits[:, -(completion.shape[1] + 1) : -1].log_softmax(-1)


def paper_loss(student, teacher, reference, batch, coef, live_share=0.0):
    """1/G sum_i 1/|o_i| sum_t KL(teacher || student), plus coef KL(student || reference).

    With ``live_share`` the teacher's logits are mixed with those of the student's weights under its prompt.
    """
    rollout = (batch["completion_ids"], batch["completion_mask"])
    mask = rollout[1].float()
    ls = log_probs(student, batch["prompt_ids"], batch["prompt_mask"], *rollout)
    with torch.no_grad():
        lt = log_probs(teacher, batch["teacher_prompt_ids"], batch["teacher_prompt_mask"], *rollout)
        live = log_probs(student, batch["teacher_prompt_ids"], batch["teacher_prompt_mask"], *rollout)
        lt = torch.lerp(lt, live, live_share).log_softmax(-1)
        lr = log_probs(reference, batch["prompt_ids"], batch["prompt_mask"], *rollout)
    per_token = (lt.exp() * (lt - ls)).sum(-1) + coef * (ls.exp() * (ls - lr)).sum(-1)
    return ((per_token * mask).sum(-1) / mask.sum(-1)).mean()


@pytest.mark.parametrize("build", [qwen3, llama])
@pytest.mark.parametrize(
    ("peft_config", "options"),
    [
        (None, {"teacher": "live", "reference_coef": 0.0}),
        (None, {"teacher": "fixed", "reference_coef": 0.5}),
        (None, {"teacher": "ema", "reference_coef": 0.0, **ACCUMULATED}),
        (None, {"teacher": "live", "reference_coef": 0.5, **ACCUMULATED, **CHECKPOINTED}),
        (LORA, {"teacher": "live", "reference_coef": 0.5}),
        (LORA, {"teacher": "fixed", "reference_coef": 0.0, **ACCUMULATED, **CHECKPOINTED}),
        (LORA, {"teacher": "trust_region", "reference_coef": 0.5, "trust_region_share": 0.3}),
    ],
    ids=["live", "fixed+reference", "ema+accumulation", "accumulation+checkpointing", "lora", "lora+all", "lora+trust"],
)
def test_one_step_is_the_gradient_of_the_papers_equation(build, peft_config, options, tmp_path):
    """One SGD step at learning rate 1 moves every trained weight by minus the gradient of the plain computation."""
    trainer = make(build(), tmp_path, peft_config=peft_config, **options)
    start_adapters(trainer.model)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    (batch,) = trainer.batches

    # Plain computation at the weights before the step: restore them.
    moved = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    model = trainer.model
    model.eval()
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.requires_grad:
                p.copy_(before[n])
    initial = model if peft_config is None else _Off(model)
    teacher = initial if options["teacher"] in ("fixed", "trust_region") else model
    share = options.get("trust_region_share", 0.0)
    loss = paper_loss(model, teacher, initial, batch, options["reference_coef"], share)
    names = list(before)
    grads = torch.autograd.grad(loss, [dict(model.named_parameters())[n] for n in names])

    logged = next(row["loss"] for row in trainer.state.log_history if "loss" in row)
    assert logged == pytest.approx(loss.item(), rel=1e-4)
    scale = max(g.abs().max() for g in grads)
    assert scale > 1e-4  # a vanishing gradient would pass any comparison
    for name, g in zip(names, grads, strict=True):
        torch.testing.assert_close(before[name] - moved[name], g, rtol=2e-3, atol=2e-5 * scale.item(), msg=name)


class _Off:
    def __init__(self, model):
        self.model = model

    def __call__(self, **kwargs):
        with self.model.disable_adapter():
            return self.model(**kwargs)


def test_each_rollout_reads_a_successful_peer_of_its_own_group_and_the_answer(tmp_path):
    trainer = make(qwen3(), tmp_path, max_steps=3)
    trainer.train()
    peers = 0
    for batch in trainer.batches:
        texts = TOKENIZER.batch_decode(batch["completion_ids"], skip_special_tokens=True)
        for i, ids in enumerate(batch["teacher_prompt_ids"]):
            question = TOKENIZER.decode(batch["prompt_ids"][i], skip_special_tokens=True)
            answer = next(q["answer"] for q in QUESTIONS if q["prompt"] == question)
            group = range(i - i % 4, i - i % 4 + 4)
            allowed = {texts[j] for j in group if j != i and batch["success"][j]}
            context = TOKENIZER.decode(ids, skip_special_tokens=True).removeprefix(question)
            if context == f"[{answer}]":
                assert not allowed or "" in allowed  # a peer that is only an end token shows nothing
                assert batch["divergence_position"][i] == -1
                continue
            peers += 1
            assert context in {f"[{answer}|{t}]" for t in allowed}
    assert peers > 5


def test_metrics_are_logged_and_bounded(tmp_path):
    trainer = make(qwen3(), tmp_path, max_steps=2, reference_coef=0.1)
    trainer.train()
    row = trainer.state.log_history[0]
    shares = (
        "success_rate",
        "coverage",
        "failing_with_peer",
        "mixed_groups",
        "fallback_share",
        "credit_mass_8",
        "repeated_tail",
    )
    for name in shares:
        assert 0.0 <= row[f"hsd/{name}"] <= 1.0, name
    for name in ("kl", "reference_kl", "student_entropy", "teacher_entropy", "tau", "credit_at_tau"):
        assert row[f"hsd/{name}"] >= 0.0, name
    assert {"completions/mean_length", "completions/clipped_ratio", "reward"} <= row.keys()


@pytest.mark.parametrize("rule", ["paired", "shortest", "lowest_perplexity"])
def test_peers_are_drawn_by_the_rule(rule, tmp_path, monkeypatch):
    drawn = []

    def recorded(group, *args, **kwargs):
        drawn.append((group, args, choose_peers(group, *args, **kwargs)))
        return drawn[-1][-1]

    monkeypatch.setattr("hsd.hindsight.teacher_prompts.choose_peers", recorded)
    make(qwen3(), tmp_path, peer_rule=rule, reference_coef=0.0).train()
    assert len(drawn) == 2 and {args for _, args, _ in drawn} == {(rule,)}
    shown = [(group.rollouts, i) for group, _, peers in drawn for i in peers if i is not None]
    assert shown and all((rollouts[i].mean_logp is not None) == (rule == "lowest_perplexity") for rollouts, i in shown)


REFRESHED = {"reference_coef": 0.5, "reference_refresh_steps": 3, "reference_ema_rate": 0.5}
FROZEN = {
    "ema": {"ema_teacher", "initial_policy"},
    "fixed": {"initial_policy"},
    "trust_region": {"initial_policy", "reference", "reference_average"},
}


@pytest.mark.parametrize("teacher", FROZEN)
def test_resume_continues_exactly(teacher, tmp_path):
    """Four steps in one go, and two, then two more in a new process-like trainer: same weights, same peers."""
    options = {
        "teacher": teacher,
        "teacher_ema_rate": 0.5,
        **(REFRESHED if teacher == "trust_region" else {}),
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole = make(qwen3(), tmp_path / "whole", max_steps=4, **options)
    whole.train()
    first = make(qwen3(), tmp_path / "parts", max_steps=2, **options)
    first.train()
    stranger = qwen3()  # other initial weights: a resumed run must not depend on what it is handed
    torch.nn.init.normal_(stranger.model.embed_tokens.weight)
    second = make(stranger, tmp_path / "parts", max_steps=4, **options)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))

    for mine, theirs in zip(whole.batches[2:], second.batches, strict=True):
        torch.testing.assert_close(mine["completion_ids"], theirs["completion_ids"], rtol=0, atol=0)
        torch.testing.assert_close(mine["teacher_prompt_ids"], theirs["teacher_prompt_ids"], rtol=0, atol=0)
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert set(whole.frozen.models) == FROZEN[teacher]
    for name, policy in whole.frozen.models.items():
        for a, b in zip(policy.parameters(), second.frozen.models[name].parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, msg=name)


def test_a_resume_that_cannot_be_exact_says_so(tmp_path):
    """A run's last step is saved wherever it falls."""
    options = {"num_iterations": 2, "save_strategy": "steps", "save_steps": 2, "teacher": "live", "reference_coef": 0.0}
    make(qwen3(), tmp_path, max_steps=3, **options).train()
    for step, said in ((2, 0), (3, 1)):
        trainer = make(qwen3(), tmp_path, max_steps=4, **options)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            trainer._load_frozen(tmp_path / f"checkpoint-{step}")
        assert sum(f"step {step} is not its last" in str(w.message) for w in seen) == said


def test_checkpoint_loads_with_from_pretrained(tmp_path):
    trainer = make(qwen3(), tmp_path, save_strategy="steps", save_steps=1)
    trainer.train()
    loaded = Qwen3ForCausalLM.from_pretrained(tmp_path / "checkpoint-1")
    for a, b in zip(trainer.model.parameters(), loaded.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())["global_step"] == 1


def test_ema_teacher_moves_and_fixed_does_not(tmp_path):
    ema = make(qwen3(), tmp_path, teacher="ema", teacher_ema_rate=0.25, reference_coef=0.0)
    teacher = ema.frozen.models["ema_teacher"]
    start = [p.clone() for p in teacher.parameters()]
    ema.train()
    for old, mine, theirs in zip(start, teacher.parameters(), ema.model.parameters(), strict=True):
        torch.testing.assert_close(mine, 0.75 * old + 0.25 * theirs)
    fixed = make(qwen3(), tmp_path, teacher="fixed", reference_coef=0.0)
    start = [p.clone() for p in fixed.frozen.models["initial_policy"].parameters()]
    fixed.train()
    for old, mine in zip(start, fixed.frozen.models["initial_policy"].parameters(), strict=True):
        assert torch.equal(old, mine)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"beta": 0.1}, "beta"),
        ({"teacher": "frozen"}, "teacher"),
        ({"peer_rule": "best"}, "peer_rule"),
        ({"divergence": "kl"}, "divergence"),
        ({"teacher_ema_rate": 0.0}, "teacher_ema_rate"),
        ({"reference_coef": -1.0}, "reference_coef"),
        ({"with_peer_template": "{answer}{demonstration}"}, "answer_only_template"),
        ({"num_iterations": 2, "save_strategy": "steps", "save_steps": 3}, "save_steps: expected a multiple of 2"),
        ({"num_iterations": 2, "save_strategy": "steps", "save_steps": 0.5}, "save_steps: expected a multiple of 2"),
        ({"fp16": True, "policy_coef": 1.0}, "^fp16"),
        ({"fp16": True, "tree_token_budget": 64}, "^fp16"),
        ({"prefix_sharing": "none", "tree_token_budget": 64}, "^tree_token_budget: .*which makes no tree, got 64"),
        ({"jsd_beta": 2.0}, "^jsd_beta"),
        ({"kl_temperature": 0.0}, "^kl_temperature"),
        ({"top_p": 2.0}, "^top_p"),
        ({"learning_rate": float("nan")}, "^learning_rate"),
        ({"kernel_impl": "numpy"}, "^kernel_impl"),
        ({"max_teacher_prompt_length": 0}, "^max_teacher_prompt_length"),
        ({"memory_bytes": 0}, "^memory_bytes"),
        ({"success_reward": float("nan")}, "^success_reward"),
    ],
)
def test_bad_options_are_named(options, named, tmp_path):
    with pytest.raises(ValueError, match=named):
        make(qwen3(), tmp_path, **options)


def test_sdpo_starts_with_its_defaults_on_lora(tmp_path):
    """Its EMA teacher is a second adapter, saved as one and beside no copy of the base."""
    words = ContextTemplate(small_world.WITH_PEER, small_world.ANSWER_ONLY, demonstration_only="[|{demonstration}]")
    options = {"method": "sdpo", "save_strategy": "steps", "save_steps": 1}
    trainer = make(qwen3(), tmp_path, peft_config=LORA, template=words, **options)
    start_adapters(trainer.model)
    base = {n: p.clone() for n, p in trainer.model.named_parameters() if "lora" not in n}
    before = [p.clone() for p in trainer.frozen.parameters(trainer.model, "ema_teacher").values()]
    trainer.train()
    assert not trainer.frozen.models and trainer.args.teacher == "ema"
    rate = trainer.args.teacher_ema_rate
    students = adapter_parameters(trainer.model, "default").values()
    teachers = trainer.frozen.parameters(trainer.model, "ema_teacher").values()
    for old, student, teacher in zip(before, students, teachers, strict=True):
        torch.testing.assert_close(teacher, (1 - rate) * old + rate * student)
    assert all(torch.equal(p, base[n]) for n, p in trainer.model.named_parameters() if n in base)
    saved = PeftModel.from_pretrained(qwen3(), tmp_path / "checkpoint-1" / "ema_teacher")
    merged = saved.merge_and_unload()(torch.tensor([[1, 2, 3]])).logits
    with under_adapter(trainer.model, "ema_teacher"):
        torch.testing.assert_close(trainer.model(torch.tensor([[1, 2, 3]])).logits, merged)


def test_refusals_are_named(tmp_path):
    with pytest.raises(ValueError, match="answer"):
        HSDTrainer(
            model=qwen3(),
            reward_funcs=half,
            args=HSDConfig(output_dir=str(tmp_path), bf16=False, report_to="none", use_cpu=True),
            train_dataset=Dataset.from_list([{"prompt": "1+1="}]),
            processing_class=TOKENIZER,
        )
    with pytest.raises(ValueError, match="lm_head"):
        make(llama(), tmp_path, peft_config=LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM"))


@pytest.mark.parametrize("name", ["environment_factory", "rollout_func"])
def test_questions_that_change_after_the_data_set_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match=f"^{name}: expected None"):
        make(qwen3(), tmp_path, **{name: lambda *_: None})


def test_evaluation_questions_need_the_same_columns(tmp_path):
    for without in (Dataset.from_list([{"prompt": "1+1="}]), {"held out": Dataset.from_list([{"prompt": "1+1="}])}):
        with pytest.raises(ValueError, match=r"^eval_dataset: expected columns \['answer', 'prompt'\]"):
            make(qwen3(), tmp_path, eval_dataset=without)


def test_an_evaluation_takes_no_time_of_a_step(tmp_path):
    trainer = make(qwen3(), tmp_path, eval_dataset=Dataset.from_list(QUESTIONS[:2]))
    assert "eval_hsd/success_rate" in trainer.evaluate()
    assert trainer.step_time.seconds == {} and trainer.step_time.tokens == 0


def test_bf16_computes_the_update_in_bf16(tmp_path):
    """Accelerate's autocast lives in the attribute that the forward redirection replaces: it must still apply."""
    seen = []

    class Watch(HSDTrainer):
        def _hsd_loss(self, policy, batch):
            seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
            return super()._hsd_loss(policy, batch)

    make(qwen3(), tmp_path, cls=Watch, bf16=True, peer_rule="lowest_perplexity").train()
    assert seen == [(True, torch.bfloat16)]


def test_the_teacher_reads_without_dropout(tmp_path):
    """A live teacher that sees no context equals the student up to the student's own dropout: KL must not hide it."""
    torch.manual_seed(1)
    config = Qwen3Config(**SIZES, head_dim=8, attention_dropout=0.5)
    trainer = make(Qwen3ForCausalLM(config).float(), tmp_path, teacher="live", reference_coef=0.0)
    modes = []
    trainer.model.model.register_forward_hook(lambda m, args, out: modes.append((m.training, torch.is_grad_enabled())))
    trainer.train()
    assert (False, False) in modes and (True, True) in modes  # TRL itself samples in training mode


@pytest.mark.parametrize(
    "option",
    [
        {"loss_type": "grpo"},
        {"importance_sampling_level": "sequence"},
        {"epsilon": 0.3},
        {"vllm_importance_sampling_correction": True},
        {"vllm_importance_sampling_mode": "token_mask"},
        {"use_bias_correction_kl": False},
        {"sync_ref_model": True},
        {"entropy_target": 0.5},
    ],
)
def test_options_without_effect_are_refused(option, tmp_path):
    with pytest.raises(ValueError, match=next(iter(option))):
        make(qwen3(), tmp_path, **option)


@pytest.mark.parametrize("method", ["hsd", "grpo"])
def test_a_model_with_fewer_rows_than_tokens_is_refused(method, tmp_path):
    said = f"model: expected at least {len(TOKENIZER)} embedding rows, one for each token of its tokenizer, got"
    with pytest.raises(ValueError, match=said):
        make(qwen3(vocab_size=len(TOKENIZER) - 1), tmp_path, method=method)
    make(qwen3(vocab_size=len(TOKENIZER) + 1), tmp_path, method=method)


def test_a_checkpoint_of_another_kind_of_run_is_refused(tmp_path):
    make(qwen3(), tmp_path, teacher="live", reference_coef=0.0, save_strategy="steps", save_steps=1).train()
    other = make(qwen3(), tmp_path, teacher="ema", reference_coef=0.0, max_steps=2)
    with pytest.raises(ValueError, match="ema_teacher"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_fresh_run_in_a_used_folder_saves_its_own_initial_policy(tmp_path):
    options = {"teacher": "fixed", "reference_coef": 0.0, "save_strategy": "steps", "save_steps": 1}
    make(qwen3(), tmp_path, **options).train()
    other = qwen3()
    torch.nn.init.normal_(other.model.embed_tokens.weight)
    trainer = make(other, tmp_path, **options)
    trainer.train()
    stored = load_file(tmp_path / "initial_policy.safetensors")
    initial = trainer.frozen.models["initial_policy"]
    assert torch.equal(stored["model.embed_tokens.weight"], initial.model.embed_tokens.weight)


def test_a_tied_head_is_not_missing_in_a_checkpoint_and_another_weight_is(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    trainer = make(qwen3(), tmp_path)
    for missing in (["lm_head.weight"], ["lm_head.weight", "model.norm.weight"]):
        trainer._issue_warnings_after_load(IncompatibleKeys(missing, []))
    (said,) = set(caplog.messages)
    assert "missing keys" in said and "['model.norm.weight']" in said


@pytest.mark.parametrize(("gain", "opens"), [(0.0, True), (0.9, False)])
def test_a_gate_that_opened_stays_open_until_the_step_is_done(gain, opens, tmp_path):
    """Of the two generations of the step the first has the success."""

    def falling(completion_ids, **kwargs):
        falling.calls += 1
        return [float(falling.calls == 1 and i % 2 == 0) for i in range(len(completion_ids))]

    falling.calls = 0
    twice = {"gradient_accumulation_steps": 2, "steps_per_generation": 1}
    trainer = make(qwen3(), tmp_path, reward=falling, teacher="gated", teacher_gate=[1, gain, 1.0], **twice)
    trainer.train()
    assert falling.calls == 2 and not trainer.refresh
    teacher = trainer.frozen.models["copied_teacher"]
    same = [torch.equal(p, q) for p, q in zip(teacher.parameters(), trainer.model.parameters(), strict=True)]
    assert all(same) if opens else not any(same)
