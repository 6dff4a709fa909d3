"""`HSDConfig`: GRPO's configuration plus what the self-distillation family adds."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from trl.trainer.grpo_config import GRPOConfig

from hsd.hindsight.context import DEFAULT_CHAT_TEMPLATE, ContextTemplate
from hsd.hindsight.peers import PEER_RULES
from hsd.methods import HSD_DEFAULTS, METHODS, Method
from hsd.train.callbacks import steps_of_a_generation
from hsd.train.update import Objective
from hsd_kernels.rows import IMPLS

SHARING = ("auto", "tree", "prompt", "none")
TEACHERS = ("live", "ema", "fixed", "trust_region")
# Options of GRPO's policy-gradient loss: set to anything else, they would silently do nothing.
UNUSED = (
    "loss_type",
    "importance_sampling_level",
    "delta",
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
UNUSED_WITHOUT_POLICY_TERM = ("epsilon", "epsilon_high")
# Options of GRPO that its variants decide, None until then; a user may also want TRL's own default.
GRPO_OPTIONS = ("loss_type", "scale_rewards", "importance_sampling_level", "epsilon", "epsilon_high")

# A number, or [start, end, steps]: linear in optimizer steps, then constant.
Schedule = float | list[float]


@dataclass
class HSDConfig(GRPOConfig):
    """TRL's `GRPOConfig` with what the update needs. The HSD paper's values (arXiv 2606.15576) are the defaults of the
    learning rate, its constant schedule, Adam's beta2, top_p, the group size and temperature; lengths, batch and steps
    are the user's. Options that are None here are the method's to decide (`hsd.methods`), and hold its choice
    afterwards.

    Args:
        method: "hsd", "opsd", "sdpo", "sdft", "rlsd", "grpo+opsd", or, with TRL's own loss, "grpo", "dr_grpo", "gspo",
            "dapo". Each is a page in docs/methods.md.
        divergence_coef, policy_coef: weights of the divergence from the teacher and of GRPO's clipped surrogate over
            the same rollouts. A number, or [start, end, steps]: linear in optimizer steps, then constant.
        advantage_mix: for "rlsd": share of the teacher's weights in the advantage, a schedule as above.
        peer_rule: how a rollout's peer is drawn from the other successes of its group: "uniform", "paired", "first",
            "shortest", "highest_perplexity" or "lowest_perplexity". "auto" is "paired" where prefixes are shared, which
            has the same expected gradient and at most two contexts a group, and else "uniform".
        show_answer: whether the answer stands beside a demonstration. A blank one never does.
        fallback: what a rollout without a demonstration is shown: "answer", or nothing, and it is left out ("mask").
        divergence: "forward_kl" = KL(teacher || student), "reverse_kl" = KL(student || teacher), or "jsd".
        jsd_beta: the teacher's share of the mixture, for "jsd".
        kl_temperature: divides the logits of both sides in the loss (sampling has its own ``temperature``).
        kl_clip: OPSD's pointwise clip of the vocabulary summands; 0 is none.
        kl_clip_form: "opsd" clips p log(p / q), whose sum may then be negative; "nonnegative" clips
            p log(p / q) - p + q.
        loss_mean: over the tokens of a rollout, then over rollouts ("rollout"), or over all tokens of the step
            ("token"). Of the divergence; the policy term is a mean over rollouts.
        importance_cap: multiplies a token's divergence by min(pi / pi_old, cap) where rollouts are older than the
            policy; 0 is no such weight.
        teacher: whose weights read the privileged context: "live", "fixed", "ema" or "trust_region"
            (`hsd.train.teachers`). "live" is HSD's setting at learning rate 1e-6; at that of the small world it runs
            away (docs/teachers.md).
        teacher_ema_rate: share of the student that enters an "ema" teacher at each optimizer step.
        trust_region_share: share of the live logits in those of a "trust_region" teacher.
        reference_coef: weight of KL(student || reference policy). GRPO's own ``beta`` must stay 0, except with TRL's
            losses, where it is the only one.
        reference_kl: "exact" over the full vocabulary, in the same pass, or "k3" at the sampled token.
        reference_refresh_steps: every so many steps the reference becomes an average of the policy; None keeps the
            initial policy.
        reference_ema_rate: share of the policy that enters that average at each step.
        success_reward: a rollout whose (weighted) reward reaches this is a success and may be a peer.
        max_teacher_prompt_length: tokens; a longer teacher prompt has its demonstration's tail cut.
        with_peer_template, answer_only_template: `str.format` templates of the privileged context, see
            `hsd.hindsight.context.ContextTemplate`; both or neither.
        demonstration_only_template, feedback_only_template: likewise, for methods that show these without the answer.
        prefix_sharing: what several sequences of a micro-batch begin with is computed once: "tree" every shared
            prefix, of student and teacher, "prompt" the questions only, "none" nothing. "auto" is "tree" for models
            that pass `hsd.policy.tree.check`, in micro-batches where it saves a fifth of the tokens or more, and says
            so when a model does not pass. "tree" and "prompt" raise the reason instead.
        tree_token_budget: a micro-batch whose tree has more tokens is differentiated a few rollouts at a time, with
            the same gradient (`hsd.policy.tree.two_phase`), so that memory is bounded.
        kernel_impl, chunk_bytes: passed to `hsd_kernels.fused_hsd_kl`.
    """

    learning_rate: float = 1e-6
    lr_scheduler_type: str = "constant"
    adam_beta2: float = 0.95
    top_p: float = 0.95
    method: str = "hsd"
    divergence_coef: Schedule | None = None
    policy_coef: Schedule | None = None
    advantage_mix: Schedule | None = None
    peer_rule: str | None = None
    show_answer: bool | None = None
    fallback: str | None = None
    divergence: str | None = None
    jsd_beta: float | None = None
    kl_temperature: float | None = None
    kl_clip: float | None = None
    kl_clip_form: str = "opsd"
    loss_mean: str | None = None
    importance_cap: float | None = None
    teacher: str | None = None
    teacher_ema_rate: float | None = None
    trust_region_share: float = 0.05
    reference_coef: float | None = None
    reference_kl: str = "exact"
    reference_refresh_steps: int | None = None
    reference_ema_rate: float = 0.01
    success_reward: float = 1.0
    max_teacher_prompt_length: int | None = None
    with_peer_template: str | None = None
    answer_only_template: str | None = None
    demonstration_only_template: str | None = None
    feedback_only_template: str | None = None
    prefix_sharing: str = "auto"
    tree_token_budget: int | None = None
    kernel_impl: str = "auto"
    chunk_bytes: int | None = None
    logging_steps: float = 1
    loss_type: str | None = None
    scale_rewards: str | None = None
    importance_sampling_level: str | None = None
    epsilon: float | None = None
    # The loss has no rollout-engine correction; with vLLM it would cost TRL full logits for a ratio nobody reads.
    vllm_importance_sampling_correction: bool = False

    def __post_init__(self):
        _one_of("method", self.method, tuple(METHODS))
        self._take_defaults()
        super().__post_init__()
        self._check()

    def _take_defaults(self) -> None:
        """Where the user left the choice to the method."""
        trl_loss, chosen = self.spec.trl_loss, self.spec.defaults
        own = HSD_DEFAULTS | {name: _grpo_defaults()[name] for name in GRPO_OPTIONS}
        own |= {"reference_coef": 0.0, **chosen} if trl_loss else chosen
        for name in own:
            if getattr(self, name) is None:
                setattr(self, name, own[name])

    def _check(self) -> None:
        policy_term = self.policy_coef != 0.0
        if not self.spec.trl_loss:
            inherited = _grpo_defaults()
            for name in (*UNUSED, *(() if policy_term else UNUSED_WITHOUT_POLICY_TERM)):
                if name in inherited and getattr(self, name) != inherited[name]:
                    raise ValueError(
                        f"{name}: expected {inherited[name]!r}, GRPO's default, because the loss of method="
                        f"{self.method!r} does not use it, got {getattr(self, name)!r}"
                    )
            if self.vllm_importance_sampling_correction:
                raise ValueError(
                    "vllm_importance_sampling_correction: expected False, because the loss of method="
                    f"{self.method!r} does not use it, got True"
                )
        for name in ("divergence_coef", "policy_coef", "advantage_mix"):
            _check_schedule(name, getattr(self, name))
        _one_of("peer_rule", self.peer_rule, ("auto", *PEER_RULES))
        _one_of("fallback", self.fallback, ("answer", "mask"))
        _one_of("loss_mean", self.loss_mean, ("rollout", "token"))
        _one_of("kl_clip_form", self.kl_clip_form, ("opsd", "nonnegative"))
        _one_of("reference_kl", self.reference_kl, ("exact", "k3"))
        _one_of("prefix_sharing", self.prefix_sharing, SHARING)
        _one_of("kernel_impl", self.kernel_impl, IMPLS)
        _one_of("divergence", self.divergence, ("forward_kl", "reverse_kl", "jsd"))
        _one_of("teacher", self.teacher, TEACHERS)
        for name in ("tree_token_budget", "reference_refresh_steps", "max_teacher_prompt_length", "chunk_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected a positive number or None, got {value}")
        for name in ("teacher_ema_rate", "reference_ema_rate", "trust_region_share"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(f"{name}: expected a number in (0, 1], got {getattr(self, name)}")
        for name in ("reference_coef", "kl_clip", "importance_cap"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a number >= 0, got {getattr(self, name)}")
        if not 0.0 <= self.jsd_beta <= 1.0:  # type: ignore[operator]
            raise ValueError(f"jsd_beta: expected a number in [0, 1], got {self.jsd_beta}")
        for name in ("kl_temperature", "temperature"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p: expected a number in (0, 1], got {self.top_p}")
        if not 0.0 <= self.learning_rate < math.inf:
            raise ValueError(f"learning_rate: expected a number >= 0, got {self.learning_rate}")
        if self.max_steps != -1 and self.max_steps < 1:
            raise ValueError(f"max_steps: expected a positive number, or -1 for num_train_epochs, got {self.max_steps}")
        if not math.isfinite(self.success_reward):
            raise ValueError(f"success_reward: expected a finite number, got {self.success_reward}")
        made_early = policy_term or (self.reference_coef and self.reference_kl == "k3") or self.tree_token_budget
        if self.fp16 and not self.spec.trl_loss and made_early:
            raise ValueError(
                "fp16: expected False (bf16 or fp32) with policy_coef, reference_kl='k3' or tree_token_budget, whose "
                "gradients are made before the loss scale and would leave fp16's range, got True"
            )
        if self.importance_cap and self.kl_temperature != self.temperature:
            raise ValueError(
                f"importance_cap: expected 0 where the loss has another temperature ({self.kl_temperature}) than "
                f"sampling ({self.temperature}), whose ratio pi / pi_old would be of two policies, got "
                f"{self.importance_cap}"
            )
        if self.spec.token_advantages is None and self.advantage_mix:
            raise ValueError(f"advantage_mix: expected 0 with method={self.method!r}, got {self.advantage_mix}")
        for name, value in (HSD_DEFAULTS | {"reference_coef": 0.0}).items() if self.spec.trl_loss else ():
            if getattr(self, name) != value:
                raise ValueError(
                    f"{name}: expected {value!r} with method={self.method!r}, whose loss is TRL's and has no teacher "
                    f"(its reference is GRPO's beta), got {getattr(self, name)!r}"
                )
        if self.beta != 0.0 and not self.spec.trl_loss:
            raise ValueError(
                f"beta: expected 0 (GRPO's beta loads a second reference and samples its KL), got {self.beta}; "
                "use reference_coef for KL(student || initial policy), and reference_kl='k3' to sample it"
            )
        if self.reference_refresh_steps is not None and not self.reference_coef:
            raise ValueError("reference_refresh_steps: expected None without reference_coef, which is 0")
        if not self.num_generations or self.num_generations < 2:
            raise ValueError(f"num_generations: expected at least 2 rollouts a group, got {self.num_generations}")
        period = steps_of_a_generation(self)
        if self.save_strategy == "steps" and period > 1 and self.save_steps % period:
            raise ValueError(
                f"save_steps: expected a multiple of {period}, the steps that one generation serves (its rollouts are "
                f"not in a checkpoint, so that a run could not go on exactly from between them), got {self.save_steps}"
            )
        if (self.with_peer_template is None) != (self.answer_only_template is None):
            raise ValueError("with_peer_template, answer_only_template: expected both or neither")
        self.context_template(DEFAULT_CHAT_TEMPLATE)

    def context_template(self, default: ContextTemplate) -> ContextTemplate:
        """The wording: ``default`` with the templates that are given. Raises ValueError for one with other fields."""
        names = ("with_peer", "answer_only", "demonstration_only", "feedback_only")
        given = {name: getattr(self, f"{name}_template") for name in names}
        return replace(default, **{name: text for name, text in given.items() if text is not None})

    @property
    def spec(self) -> Method:
        return METHODS[self.method]

    @property
    def reads_old_logps(self) -> bool:
        """Whether the loss needs log-probs under the policy that sampled, where a generation serves several steps."""
        return bool(self.importance_cap) or self.policy_coef != 0.0

    @property
    def has_teacher(self) -> bool:
        return not self.spec.trl_loss

    def objective(self, step: int) -> Objective:
        """The objective at an optimizer step, counted from 0."""
        return Objective(
            divergence=self.divergence,  # type: ignore[arg-type]
            beta=self.jsd_beta,  # type: ignore[arg-type]
            temperature=self.kl_temperature,  # type: ignore[arg-type]
            kl_clip=self.kl_clip or None,
            kl_clip_form=self.kl_clip_form,
            divergence_coef=scheduled(self.divergence_coef, step),
            importance_cap=self.importance_cap or None,
            reference_coef=self.reference_coef,  # type: ignore[arg-type]
            reference_kl=self.reference_kl,
            policy_coef=scheduled(self.policy_coef, step),
            advantage_mix=scheduled(self.advantage_mix, step),
            epsilon_low=self.epsilon,  # type: ignore[arg-type]
            epsilon_high=self.epsilon if self.epsilon_high is None else self.epsilon_high,  # type: ignore[arg-type]
            sampling_temperature=self.temperature,
            chunk_bytes=self.chunk_bytes,
            impl=self.kernel_impl,
        )


def scheduled(value: Any, step: int) -> float:
    """``value`` itself, or, for [start, end, steps], the straight line from start to end at ``step``."""
    if not isinstance(value, list | tuple):
        return float(value)
    start, end, steps = value
    return start + (end - start) * min(step / steps, 1.0)


def _check_schedule(name: str, value: Any) -> None:
    numbers: list[Any] = list(value) if isinstance(value, list | tuple) else [value, value, 1]
    if len(numbers) != 3 or not all(isinstance(x, int | float) and x >= 0.0 for x in numbers) or numbers[2] < 1:
        raise ValueError(f"{name}: expected a number >= 0 or [start, end, steps], got {value!r}")


def _grpo_defaults() -> dict[str, Any]:
    return {f.name: f.default for f in fields(GRPOConfig)}


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {allowed}, got {value!r}")
