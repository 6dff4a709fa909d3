"""patch_trl against the real trainers: loss, gradients, metrics and one whole optimizer step."""

import warnings

import pytest
import torch
from datasets import Dataset
from tiny_runs import LORA, QUIET, TOKENIZER, half
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.sdft import SDFTConfig, SDFTTrainer
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

from hsd.adapters import trl as adapter
from hsd.adapters.trl import patch_trl
from hsd.tasks import small_world

QUESTIONS = small_world.make_questions(4, seed=0)
ROWS = [{"prompt": q["prompt"], "privileged_context": q["prompt"]} for q in QUESTIONS]
COMMON = QUIET | {
    "max_steps": 1,
    "per_device_train_batch_size": 4,
    "optim": "sgd",
    "learning_rate": 1e-2,
    "max_grad_norm": 0.0,
}
SDPO = COMMON | {"max_completion_length": 8, "num_generations": 4, "distillation_mode": "full_logits"}
SDPO |= {"reprompt_template": "{prompt}{solution}{feedback}", "solution_template": "[{successful_previous_attempt}]"}
SDFT = COMMON | {"max_completion_length": 8, "num_generations": 4, "distillation_mode": "full_logits"}
SDFT |= {"teacher_prompt_template": "{prompt}[{privileged_context}]"}
LIVE = {"teacher_model_kind": "live"}


def shifted(model):
    """Move the student off the weights it shares with its teacher."""
    torch.manual_seed(9)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))


def sdpo(model, tmp_path, peft_config=None, **options):
    args = SDPOConfig(output_dir=str(tmp_path), **(SDPO | options))
    data = Dataset.from_list(ROWS)
    return SDPOTrainer(
        model, reward_funcs=half, args=args, train_dataset=data, processing_class=TOKENIZER, peft_config=peft_config
    )


def sdft(model, tmp_path, peft_config=None, **options):
    args = SDFTConfig(output_dir=str(tmp_path), **(SDFT | options))
    data = Dataset.from_list(ROWS)
    return SDFTTrainer(model, args=args, train_dataset=data, processing_class=TOKENIZER, peft_config=peft_config)


def gkd(model, teacher, tmp_path, **options):
    args = GKDConfig(output_dir=str(tmp_path), **(COMMON | {"lmbda": 0.0} | options))
    rows = [{"text": "x"}] * 4
    return GKDTrainer(
        model,
        teacher_model=teacher,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=TOKENIZER,
        data_collator=lambda _: None,
    )


def distillation(model, teacher, tmp_path, **options):
    args = DistillationConfig(output_dir=str(tmp_path), **(COMMON | {"max_completion_length": 8} | options))
    data = Dataset.from_list(ROWS)
    return DistillationTrainer(model, teacher, args=args, train_dataset=data, processing_class=TOKENIZER)


def gkd_batch(batch):
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    labels = torch.cat([torch.zeros_like(batch["prompt_ids"]), batch["completion_mask"]], 1) * (ids + 100) - 100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def both(trainer, inputs, gradients, **kwargs):
    """(ours, theirs), on the trainer's own compute_loss."""
    trainer.current_gradient_accumulation_steps = 1  # transformers sets it in train()

    def call():
        return trainer.compute_loss(trainer.model, dict(inputs), **kwargs)

    theirs = gradients(trainer.model, call)
    with patch_trl():
        ours = gradients(trainer.model, call)
    return ours, theirs


@pytest.mark.parametrize(
    ("family", "beta"),
    [("qwen3", 0.0), ("qwen3", 1.0), *((f, 0.3) for f in ("qwen3", "gemma2", "cohere", "granite", "gpt2", "phi"))],
)
def test_gkd(family, beta, build, batch, tmp_path, gradients, assert_same):
    """beta 0 is KL(teacher || student); the sampling temperature does not reach the loss."""
    trainer = gkd(build(family), build(family, seed=1), tmp_path, beta=beta, temperature=0.7)
    inputs = gkd_batch(batch)
    assert_same(*both(trainer, inputs, gradients))
    assert_same(*both(trainer, inputs, gradients, num_items_in_batch=torch.tensor(37)))


def test_gkd_beta_0_is_the_forward_kl(build, batch, tmp_path):
    student, teacher = build(), build(seed=1)
    trainer = gkd(student, teacher, tmp_path, beta=0.0, temperature=0.7)
    inputs = gkd_batch(batch)
    seen = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    with torch.no_grad():
        ls, lt = (m(**seen).logits[:, :-1].log_softmax(-1) for m in (student, teacher))
        live = inputs["labels"][:, 1:] != -100
        expected = (lt.exp() * (lt - ls)).sum(-1)[live].mean()
    with patch_trl():
        found = trainer.compute_loss(trainer.model, inputs)
    torch.testing.assert_close(found.detach(), expected, rtol=1e-5, atol=1e-6)


def test_gkd_leaves_outputs_and_a_differently_capped_teacher_to_trl(build, batch, tmp_path):
    trainer = gkd(build("gemma2"), build("gemma2", seed=1), tmp_path)
    inputs = gkd_batch(batch)
    adapter._leave.cache_clear()
    with patch_trl():
        with pytest.warns(UserWarning, match=r"GKDTrainer.*return_outputs"):
            _, outputs = trainer.compute_loss(trainer.model, inputs, return_outputs=True)
        assert outputs.logits.shape[:2] == inputs["input_ids"].shape
        trainer.teacher_model.config.final_logit_softcapping = 5.0
        with pytest.warns(UserWarning, match="softcap"):
            found = trainer.compute_loss(trainer.model, inputs)
    torch.testing.assert_close(found, trainer.compute_loss(trainer.model, inputs))


@pytest.mark.parametrize(
    ("family", "beta"),
    [("qwen3", 0.0), ("qwen3", 1.0), *((f, 0.3) for f in ("qwen3", "gemma2", "cohere", "phi"))],
)
def test_distillation(family, beta, build, batch, tmp_path, gradients, assert_same):
    trainer = distillation(build(family), build(family, seed=1), tmp_path, beta=beta, temperature=0.7)
    tools = torch.ones_like(batch["completion_mask"])
    tools[:, 1] = 0
    inputs = batch | {"tool_mask": tools}
    assert_same(*both(trainer, inputs, gradients))
    assert_same(*both(trainer, inputs | {"num_items_in_batch": torch.tensor(37.0)}, gradients))
    entropies = trainer._metrics["train"]["entropy"] + trainer._metrics["eval"]["entropy"]
    assert len(entropies) == 4 and entropies[0] > 0
    torch.testing.assert_close(entropies[0], entropies[1], rtol=1e-5, atol=0)


def test_distillation_leaves_another_scale_to_trl(build, batch, tmp_path, gradients, assert_same):
    trainer = distillation(build("cohere"), build("cohere", seed=1), tmp_path, beta=0.5)
    trainer.teacher_model.config.logit_scale = 0.2
    adapter._leave.cache_clear()
    with pytest.warns(UserWarning, match="logit scale"):
        assert_same(*both(trainer, batch, gradients), rtol=0)


@pytest.mark.parametrize(
    ("family", "alpha", "is_clip"),
    [
        ("qwen3", 0.0, 1.05),
        ("qwen3", 0.3, 1.05),
        ("qwen3", 1.0, 1.05),
        ("qwen3", 1.0, None),
        ("gemma2", 0.3, 1.05),
        ("gpt2", 0.3, None),
    ],
)
def test_sdpo(family, alpha, is_clip, build, batch, tmp_path, gradients, assert_same):
    """Temperature, a rollout without context, the clipped importance ratio, and the logged metric."""
    options = LIVE | {"distillation_alpha": alpha, "temperature": 0.7, "distillation_is_clip": is_clip}
    trainer = sdpo(build(family), tmp_path, **options)
    old = -3.0 + torch.rand(batch["completion_ids"].shape, generator=torch.Generator().manual_seed(3))
    inputs = batch | {"self_distillation_mask": torch.tensor([1.0, 1.0, 0.0, 1.0]), "old_per_token_logps": old}
    assert_same(*both(trainer, inputs, gradients))
    logged = trainer._metrics["train" if trainer.model.training else "eval"]["sdpo/distillation_loss"]
    assert len(logged) == 2 and logged[0] > 0
    torch.testing.assert_close(logged[0], logged[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["base", "ema"])
@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("make", [sdpo, sdft])
def test_self_distillation_with_a_teacher_of_its_own(
    make, kind, peft_config, build, batch, tmp_path, gradients, assert_same
):
    build().save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    trainer = make(model, tmp_path, peft_config, teacher_model_kind=kind)
    if kind == "ema" and peft_config is not None:  # the adapter that TRL adds when training begins
        callback = next(c for c in trainer.callback_handler.callbacks if type(c).__name__ == "PEFTAdapterEMACallback")
        callback.on_train_begin(trainer.args, trainer.state, trainer.control)
    shifted(trainer.model)
    assert_same(*both(trainer, batch, gradients))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_sdft_skips_the_first_tokens(alpha, build, batch, tmp_path, gradients, assert_same):
    trainer = sdft(build(), tmp_path, distillation_alpha=alpha, num_loss_tokens_to_skip=2, temperature=0.7, **LIVE)
    assert_same(*both(trainer, batch, gradients))


def test_no_rollout_with_a_context(build, batch, tmp_path, gradients):
    trainer = sdpo(build(), tmp_path, **LIVE)
    ours, theirs = both(trainer, batch | {"self_distillation_mask": torch.zeros(4)}, gradients)
    assert ours[0] == theirs[0] == 0.0
    assert ours[1].keys() == theirs[1].keys() and not any(g.any() for g in ours[1].values())


@pytest.mark.parametrize(
    "options",
    [
        {"distillation_mode": "topk_logits", "distillation_topk": 3},
        {"distillation_mode": "sampled_token"},
        {"distillation_weight": 0.5},
    ],
    ids=["top-k", "sampled token", "policy term"],
)
def test_what_needs_logits_is_left_to_trl(options, build, batch, tmp_path, gradients, assert_same):
    trainer = sdpo(build(), tmp_path, **LIVE, **options)
    adapter._leave.cache_clear()
    with pytest.warns(UserWarning, match=r"left to TRL.*distillation_"):
        assert_same(*both(trainer, batch | {"advantages": torch.tensor([1.0, -1.0, 0.5, 0.0])}, gradients), rtol=0)


def test_no_dense_logits(build, batch, tmp_path, head_calls):
    trainer = sdpo(build(), tmp_path, **LIVE)

    def call():
        trainer.compute_loss(trainer.model, dict(batch))

    assert head_calls(trainer.model, call) == 2
    with patch_trl():
        call()  # the first one proves that body and head give the model's logits
        assert head_calls(trainer.model, call) == 0


def test_a_model_that_cannot_be_taken_apart_is_an_error(build, batch, tmp_path):
    model = build()
    trainer = sdpo(model, tmp_path, **LIVE)
    forward = model.forward

    def doubled(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = out.logits * 2
        return out

    model.forward = doubled
    with patch_trl(), pytest.raises(ValueError, match=r"^model: Qwen3ForCausalLM changes its logits"):
        trainer.compute_loss(model, dict(batch))


@pytest.mark.parametrize("make", [sdpo, sdft])
def test_one_step_of_training(make, build, tmp_path):
    """Rollouts, contexts, loss and optimizer of the real trainer: the same weights afterwards."""
    found = []
    for patched in (False, True):
        trainer = make(build(scale=2.0), tmp_path, gradient_accumulation_steps=2, learning_rate=0.1, **LIVE)
        start = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        if patched:
            with patch_trl():
                trainer.train()
        else:
            trainer.train()
        found.append({n: p.detach() - start[n] for n, p in trainer.model.named_parameters()})
    top = max(d.abs().max().item() for d in found[0].values())
    assert top > 0
    for name, theirs in found[0].items():
        assert (found[1][name] - theirs).abs().max().item() <= 1e-3 * top, name


def test_a_prepared_model_in_bf16(batch, tmp_path):
    """TRL's default: fp32 weights, a forward that accelerate has put into bf16. In 36 layers bf16's rounding adds up
    to more than `check_body_and_head` takes for one and the same head."""
    models = []
    for seed in (0, 10):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 36, "head_dim": 16}
        config = Qwen3Config(
            vocab_size=len(TOKENIZER), initializer_range=0.16, num_attention_heads=4, num_key_value_heads=4, **sizes
        )
        models.append(Qwen3ForCausalLM(config).float())
    trainer = gkd(*models, tmp_path, beta=0.5, bf16=True)
    prepared = trainer.accelerator.prepare_model(trainer.model)  # as train() does
    trainer.current_gradient_accumulation_steps = 1
    theirs = trainer.compute_loss(prepared, gkd_batch(batch)).item()
    with patch_trl():
        ours = trainer.compute_loss(prepared, gkd_batch(batch)).item()
    assert ours == pytest.approx(theirs, rel=1e-2)


def test_the_patch_is_reversible_and_not_doubled():
    theirs = GKDTrainer.compute_loss
    with patch_trl():
        assert GKDTrainer.compute_loss is not theirs
        with pytest.raises(RuntimeError, match="patched already"):
            patch_trl()
        assert GKDTrainer.compute_loss is not theirs
    patch_trl().close()
    assert GKDTrainer.compute_loss is theirs


def test_a_version_outside_the_range_warns_once(monkeypatch):
    from hsd.adapters import common

    monkeypatch.setattr(common.metadata, "version", lambda package: "1.99.0")
    common.check_version.cache_clear()
    with pytest.warns(UserWarning, match=r"trl 1\.99\.0: .* 1\.16 to 1\.16"):
        patch_trl().close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch_trl().close()
    common.check_version.cache_clear()


@pytest.mark.parametrize(
    ("version", "warns"), [("1.15.9", True), ("1.16.0", False), ("1.16.7", False), ("1.17.0", True), ("2.0", True)]
)
def test_the_range_of_a_version(version, warns, monkeypatch, recwarn):
    from hsd.adapters import common

    monkeypatch.setattr(common.metadata, "version", lambda package: version)
    common.check_version.__wrapped__("trl", "1.16", "1.16")
    assert bool(len(recwarn)) == warns
