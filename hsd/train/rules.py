"""Rules between the fields of an `HSDConfig`, and the fields that a method's loss does not use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from itertools import chain
from typing import Any

from trl.trainer.grpo_config import GRPOConfig

from hsd.methods import METHODS, Method
from hsd.methods import method as find_method
from hsd.train.generations import steps_of_a_generation

# Options of GRPO's policy-gradient loss: set to anything else, they would silently do nothing.
UNUSED = (
    "loss_type",
    "importance_sampling_level",
    "top_entropy_quantile",
    "entropy_coef",
    "use_adaptive_entropy",
    "off_policy_mask_threshold",
    *("sapo_temperature_neg", "sapo_temperature_pos"),
    *("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
    *("entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target"),
    *("vllm_importance_sampling_mode", "vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min"),
    *("vllm_importance_sampling_cap", "use_bias_correction_kl"),
    *("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
)
UNUSED_WITHOUT_POLICY_TERM = ("epsilon", "epsilon_high", "delta")
# The mean of the policy term that a loss of TRL's takes, where that loss is the clipped surrogate.
POLICY_MEANS = {"grpo": "rollout", "dapo": "token", "dr_grpo": "max_length"}
# Fields that a method without a teacher may have.
OF_THE_POLICY = ("policy_coef", "reference_coef", "reference_kl")
# Options of GRPO that its variants decide, None until then; a user may also want TRL's own default.
GRPO_OPTIONS = ("loss_type", "scale_rewards", "importance_sampling_level", "epsilon", "epsilon_high")

# HSD's own fields where the loss is a policy gradient alone, against METHODS["hsd"].defaults.
WITHOUT_TEACHER = {"divergence_coef": 0.0, "policy_coef": 1.0, "reference_coef": 0.0}


def check(config: Any) -> None:
    """Raise ValueError for the first rule that an `HSDConfig` breaks."""
    broken = chain.from_iterable(rule(config) for rule in RULES)
    if (message := next(broken, None)) is not None:
        raise ValueError(message)


def _loss(c: Any) -> Iterator[str]:
    neutral = _unread(c.method_spec, policy_term=c.policy_coef != 0.0, own_loss=c.own_loss)
    why = "which has no teacher" if c.own_loss else "whose loss is TRL's (its reference is beta)"
    if c.has_teacher:
        why = "whose loss does not use it"
        if c.policy_loss == "trl":
            yield f"policy_loss: expected 'auto' or 'fused' with method={c.method!r}, got 'trl'"
        if c.beta != 0.0:
            yield (
                f"beta: expected 0 (GRPO's beta loads a second reference and samples its KL), got {c.beta}; "
                "use reference_coef for KL(student || initial policy), and reference_kl='k3' to sample it"
            )
    elif c.policy_loss == "fused" and (reason := c.why_trl()) is not None:
        yield f"policy_loss: expected 'trl' or 'auto' with {reason}, got 'fused'"
    for name, value in neutral.items():
        if getattr(c, name) != value:
            yield f"{name}: expected {value!r} with method={c.method!r}, {why}, got {getattr(c, name)!r}"
    if c.advantage_mix and not c.method_spec.defaults.get("advantage_mix"):
        yield f"advantage_mix: expected 0 with method={c.method!r}, got {c.advantage_mix}"
    if c.draw_cap is not None and not c.draws:
        yield f"draw_cap: expected None with method={c.method!r}, which draws nothing, got {c.draw_cap}"


def _arithmetic(c: Any) -> Iterator[str]:
    made_early = c.policy_coef != 0.0 or (c.reference_coef and c.reference_kl == "k3") or c.tree_token_budget
    if c.fp16 and c.own_loss and made_early:
        yield (
            "fp16: expected False (bf16 or fp32) with policy_coef, reference_kl='k3' or tree_token_budget, whose "
            "gradients are made before the loss scale and would leave fp16's range, got True"
        )
    if c.importance_cap and c.kl_temperature != c.temperature:
        yield (
            f"importance_cap: expected 0 where the loss has another temperature ({c.kl_temperature}) than sampling "
            f"({c.temperature}), whose ratio pi / pi_old would be of two policies, got {c.importance_cap}"
        )


def _teacher(c: Any) -> Iterator[str]:
    gate, every = c.teacher_gate, c.teacher_success_every
    if (c.teacher == "gated") != (gate is not None):
        yield f"teacher_gate: expected [generations, gain, truncated share] with teacher='gated' alone, got {gate}"
    if gate is not None and (len(gate) != 3 or gate[0] < 1 or gate[1] < 0.0 or not 0.0 <= gate[2] <= 1.0):
        yield f"teacher_gate: expected [at least 1, at least 0, a share], got {gate}"
    if every is not None and (not c.has_teacher or c.teacher == "trust_region"):
        why = f"teacher={c.teacher!r}, whose logits are of two models"
        if not c.has_teacher:
            why = f"method={c.method!r}, which has no teacher"
        yield f"teacher_success_every: expected None with {why}, got {every}"
    if c.reference_refresh_steps is not None and not c.reference_coef:
        yield (
            "reference_refresh_steps: expected None without a reference (reference_coef is 0), got "
            f"{c.reference_refresh_steps}"
        )
    first, second = c.with_peer_template, c.answer_only_template
    if (first is None) != (second is None):
        yield f"with_peer_template, answer_only_template: expected both or neither, got {first!r} and {second!r}"


def _batches(c: Any) -> Iterator[str]:
    budget, period = c.tree_token_budget, steps_of_a_generation(c)
    if budget is not None and c.prefix_sharing == "none":
        yield f"tree_token_budget: expected None with prefix_sharing='none', which makes no tree, got {budget}"
    if budget is not None and c.method_spec.max_rows > 1:
        why = f"method={c.method!r}, whose losses compare two sequences"
        yield f"tree_token_budget: expected None with {why}, got {budget}"
    if c.save_strategy == "steps" and period > 1 and c.save_steps % period:
        yield (
            f"save_steps: expected a multiple of {period}, the steps that one generation serves (its rollouts are not "
            f"in a checkpoint, so that a run could not go on exactly from between them), got {c.save_steps}"
        )


RULES = (_loss, _arithmetic, _teacher, _batches)


def _unread(method: Method, *, policy_term: bool, own_loss: bool) -> dict[str, Any]:
    """The fields that the loss does not use, with the value that each of them then has."""
    if method.has_teacher:
        names = (*UNUSED, *(() if policy_term else UNUSED_WITHOUT_POLICY_TERM))
        return {n: v for n, v in grpo_defaults().items() if n in names} | {"vllm_importance_sampling_correction": False}
    of_hsd = METHODS["hsd"].defaults | WITHOUT_TEACHER
    return {n: v for n, v in of_hsd.items() if n not in OF_THE_POLICY or not own_loss}


def unused(given: Mapping[str, Any]) -> list[str]:
    """The names in ``given`` that its method does not use and `HSDConfig` refuses beside it: a configuration that is
    switched to another method leaves them out."""
    neutral = ignored(given)
    return [name for name in given if name in neutral and given[name] not in (None, neutral[name])]


def ignored(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that the method in ``given`` does not use, with the value that each of them then has."""
    try:
        method = find_method(given.get("method", "hsd"))
    except ValueError:  # `HSDConfig` says it; another run's may be a module that is not here
        return {}
    policy_coef, default = given.get("policy_coef"), (METHODS["hsd"].defaults | method.defaults)["policy_coef"]
    neutral = _unread(method, policy_term=bool(default if policy_coef is None else policy_coef), own_loss=True)
    if method.has_teacher:
        if given.get("policy_loss") == "trl":
            neutral["policy_loss"] = "auto"
    else:
        neutral |= {"teacher_gate": None, "teacher_success_every": None}
        if policy_coef == 0.0:  # all that such a method's loss has
            neutral["policy_coef"] = WITHOUT_TEACHER["policy_coef"]
    if not method.draw:
        neutral["draw_cap"] = None
    args = given.get("method_args") or {}
    if not method.settings.keys() >= args.keys() and any(m.settings.keys() >= args.keys() for m in METHODS.values()):
        neutral["method_args"] = None
    return neutral


def grpo_defaults() -> dict[str, Any]:
    return {f.name: f.default for f in fields(GRPOConfig)}
