"""`HSDConfig`: GRPO's configuration plus what the self-distillation family adds.

A field's choices and interval are declared with it (`hsd.train.options`); `options` lists them for the command line and
the documentation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, Literal

from trl.trainer.grpo_config import GRPOConfig

from hsd.hindsight.context import DEFAULT_CHAT_TEMPLATE, DEFAULT_TEXT_TEMPLATE, ContextTemplate
from hsd.hindsight.groups import Prompt
from hsd.hindsight.peers import PEER_RULES
from hsd.hindsight.teacher_prompts import TeacherPrompts
from hsd.methods import METHODS, Method
from hsd.methods import method as find_method
from hsd.methods.method import REQUIRED, nothing
from hsd.methods.term import Schedule, scheduled
from hsd.named import nearest
from hsd.train import rules
from hsd.train.options import (
    ABOVE_0,
    AT_LEAST_0,
    AT_LEAST_1,
    FINITE,
    SHARE,
    Option,
    check,
    check_enums,
    check_setting,
    declared,
    option,
)
from hsd.train.rules import GRPO_OPTIONS, POLICY_MEANS, UNUSED, WITHOUT_TEACHER, grpo_defaults
from hsd.train.update import Objective
from hsd_kernels import Divergence
from hsd_kernels.rows import IMPLS

BY_METHOD: Any = None  # until `_take_defaults`


@dataclass
class HSDConfig(GRPOConfig):
    """TRL's `GRPOConfig` with what the update needs. The HSD paper's values (arXiv 2606.15576) are the defaults of the
    learning rate, its constant schedule, Adam's beta2, top_p, the group size and temperature; lengths, batch and steps
    are the user's. Options that `hsd.methods.METHODS["hsd"].defaults` names are the method's to decide where they are
    not given, and hold its choice afterwards. A `Schedule` is a number; [start, end, steps], linear in optimizer steps,
    then constant; or knots [[step, value], ...]."""

    learning_rate: float = option(1e-6, "initial learning rate", AT_LEAST_0)
    lr_scheduler_type: str = "constant"
    adam_beta2: float = 0.95
    top_p: float = option(0.95, "nucleus of the rollouts' sampling", SHARE)
    temperature: float = option(1.0, "divides the logits in the rollouts' sampling", ABOVE_0)
    max_completion_length: int | None = option(512, "tokens that a rollout may have", AT_LEAST_1)
    method: str = option("hsd", "member of the family (docs/methods.md), or module:METHOD, a Method of your own")
    divergence_coef: Schedule = option(None, "weight of the divergence from the teacher", AT_LEAST_0)
    policy_coef: Schedule = option(None, "weight of GRPO's clipped surrogate over the same rollouts", AT_LEAST_0)
    advantage_mix: Schedule = option(
        None, "rlsd and its kind: share of the teacher's weights in the advantage", AT_LEAST_0
    )
    policy_loss: Literal["auto", "fused", "trl"] = option(
        "auto", "who computes the loss of a method without a teacher: auto is fused where its options allow it"
    )
    policy_mean: Literal["rollout", "token", "max_length"] = option(
        None,
        "as loss_mean for the policy term, or over the tokens that fit (max_length); else loss_type's",
    )
    method_args: dict[str, Any] | None = option(None, "settings of the method's own: `hsd methods NAME` lists them")
    # "auto" is "paired" where prefixes are shared, which has the same expected gradient and at most two contexts a
    # group, and else "uniform".
    peer_rule: str = option(None, "how a peer is drawn from the group's successes", choices=("auto", *PEER_RULES))
    show_answer: bool = option(None, "whether an answer that is not blank stands beside a demonstration")
    fallback: Literal["answer", "solution", "mask"] = option(
        None,
        "what a rollout without a demonstration is shown: the answer, the column `solution` as a demonstration, or "
        "nothing, and it is left out (mask)",
    )
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = option(
        None, "KL(teacher || student), KL(student || teacher), or a mixture's (jsd)"
    )
    jsd_beta: float = option(None, "the teacher's share of the mixture", "[0, 1]")
    kl_temperature: float = option(None, "divides the logits of both sides in the loss, not in sampling", ABOVE_0)
    kl_clip: float = option(None, "OPSD's pointwise clip of the vocabulary summands; 0 is none", AT_LEAST_0)
    kl_clip_form: Literal["opsd", "nonnegative"] = option(
        "opsd", "clips p log(p / q), whose sum may then be negative (opsd), or p log(p / q) - p + q (nonnegative)"
    )
    kl_top_k: int = option(None, "likeliest tokens that the divergence compares; 0 is the vocabulary", AT_LEAST_0)
    kl_top_of: Literal["student", "teacher"] = option(None, "whose likeliest tokens")
    kl_rest: Literal["tail", "renormalise"] = option(
        None, "the other tokens: one bucket (tail), or left out and both sides renormalised"
    )
    kl_floor: float = option(
        None, "the teacher's probability of a token is at least this share of the student's; 0 is none", AT_LEAST_0
    )
    loss_mean: Literal["rollout", "token"] = option(
        None, "mean of the divergence over a rollout's tokens, then over rollouts, or over all tokens of the step"
    )
    skip_tokens: int = option(None, "tokens at the start of each rollout that have no divergence", AT_LEAST_0)
    strip_thinking: bool = option(None, "whether rollouts are shown to the teacher without their thinking")
    importance_cap: float = option(
        None, "a token's divergence times min(pi / pi_old, cap), where rollouts are older; 0 is none", AT_LEAST_0
    )
    teacher: Literal["live", "ema", "fixed", "trust_region", "copy", "gated"] = option(
        None, "the teacher's weights: docs/teachers.md"
    )
    teacher_copy_steps: int = option(None, "every so many steps a copy teacher becomes the student", AT_LEAST_1)
    teacher_ema_rate: float = option(None, "share of the student that enters an ema teacher at each step", SHARE)
    teacher_gate: list[float] | None = option(
        None, "gated: [generations, gain of success over them, truncated share], which must hold for a refresh"
    )
    teacher_success_every: int | None = option(
        None, "every so many steps replies are sampled from the teacher's contexts and scored; none: never", AT_LEAST_1
    )
    trust_region_share: float = option(0.05, "share of the live logits in those of a trust_region teacher", SHARE)
    reference_coef: Schedule = option(
        None, "weight of KL(student || reference); GRPO's own beta is for TRL's losses only", AT_LEAST_0
    )
    reference_kl: Literal["exact", "k3"] = option(None, "full vocabulary (exact), or at the sampled token (k3)")
    reference_refresh_steps: int | None = option(
        None, "every so many steps the reference becomes an average of the policy; none: initial policy", AT_LEAST_1
    )
    reference_ema_rate: float = option(0.01, "share of the policy that enters that average at each step", SHARE)
    success_reward: float = option(1.0, "the (weighted) reward from which on a rollout is a success", FINITE)
    max_teacher_prompt_length: int | None = option(
        None, "tokens; a longer teacher prompt has its demonstration's tail cut", AT_LEAST_1
    )
    # Wordings as in `hsd.hindsight.context.ContextTemplate`; the first two go together.
    with_peer_template: str | None = option(None, "wording of a demonstration with {answer} and {demonstration}")
    answer_only_template: str | None = option(None, "wording of the {answer} alone")
    demonstration_only_template: str | None = option(None, "wording of a {demonstration} alone")
    feedback_only_template: str | None = option(None, "wording of the environment's {feedback}")
    # "auto" is "tree" for models that pass `hsd.policy.tree.check`, in micro-batches where it saves a fifth of the
    # tokens or more; "tree" and "prompt" raise an error where a model does not pass.
    prefix_sharing: Literal["auto", "tree", "prompt", "none"] = option(
        "auto", "prefixes that are computed once: all shared ones (tree), the questions (prompt) or none"
    )
    tree_token_budget: int | None = option(
        None, "tokens of a micro-batch's tree above which it is differentiated in parts, same gradient", AT_LEAST_1
    )
    draw_cap: int | None = option(
        None, "texts and rollouts that a method's draw may ask for in a step; by default four a rollout", AT_LEAST_1
    )
    kernel_impl: str = option("auto", "impl of hsd_kernels.fused_hsd_kl", choices=IMPLS)
    memory_bytes: int | None = option(None, "memory_bytes of hsd_kernels.fused_hsd_kl", AT_LEAST_1)
    diagnostics: bool = option(
        False,
        "also log top-k overlap, teacher sharpening, compression of the tails, epistemic words; measure the teacher "
        "also where no term reads it",
    )
    record_groups: int = option(
        1, "groups of each generation whose rollouts go to rollouts.jsonl; 0 is none", AT_LEAST_0
    )
    logging_steps: float = 1
    loss_type: str | None = None
    scale_rewards: str | None = None
    importance_sampling_level: str | None = None
    epsilon: float = BY_METHOD
    # The loss has no rollout-engine correction; with vLLM it would cost TRL full logits for a ratio nobody reads.
    vllm_importance_sampling_correction: bool = False

    def __post_init__(self):
        self._take_defaults()
        check_enums(self, GRPOConfig)
        given = self.generation_batch_size
        try:
            super().__post_init__()
        except ValueError as error:
            rollouts, size = self.generation_batch_size, self.num_generations or 0
            if given is not None or rollouts is None or size < 2 or rollouts % size == 0:
                raise
            raise ValueError(
                f"num_generations: expected a divisor of {rollouts}, the rollouts of one generation "
                f"(per_device_train_batch_size {self.per_device_train_batch_size} x processes {self.world_size} x "
                f"steps_per_generation, else gradient_accumulation_steps, {self.steps_per_generation}), got {size}"
            ) from error
        for of in options():
            check(of, getattr(self, of.name))
        self.settings  # noqa: B018  # raises for a wrong one
        rules.check(self)
        self.context_template(DEFAULT_CHAT_TEMPLATE)
        if self.deepspeed and self.use_cpu and self.world_size > 1:
            import deepspeed

            deepspeed.init_distributed("gloo", auto_mpi_discovery=False)  # transformers does it on a GPU alone

    def _take_defaults(self) -> None:
        """Where the user left the choice to the method."""
        method = self.method_spec
        open_ = {f.name for f in fields(HSDConfig) if f.default is None}
        if fixed := sorted(method.defaults.keys() - open_):
            raise ValueError(
                f"method: expected defaults of options that are None unless given, got {fixed[0]!r} in those of "
                f"{self.method!r}"
            )
        own = METHODS["hsd"].defaults | {name: grpo_defaults()[name] for name in GRPO_OPTIONS}
        own |= method.defaults if method.has_teacher else WITHOUT_TEACHER | method.defaults
        for name in own:
            if getattr(self, name) is None:
                if own[name] is REQUIRED:
                    raise ValueError(
                        f"{name}: expected a value for method={self.method!r}, whose source publishes none, got None"
                    )
                setattr(self, name, own[name])

    def context_template(self, default: ContextTemplate) -> ContextTemplate:
        """The wording: ``default`` with the templates that are given. Raises ValueError for one with other fields."""
        names = ("with_peer", "answer_only", "demonstration_only", "feedback_only")
        given = {name: getattr(self, f"{name}_template") for name in names}
        try:
            return replace(default, **{name: text for name, text in given.items() if text is not None})
        except ValueError as error:
            name, colon, rest = str(error).partition(": ")
            raise ValueError(f"{name}_template{colon}{rest}") from error

    def teacher_prompts(
        self, tokenizer: Any, template: ContextTemplate | None, peer_rule: str, chat_template_kwargs: Mapping[str, Any]
    ) -> TeacherPrompts | None:
        """What makes the teacher's prompts, in the words of ``template`` or of the configuration; None without one."""
        method = self.method_spec
        if method.contexts is None:
            return None

        def template_for(prompt: Prompt) -> ContextTemplate:
            default = DEFAULT_TEXT_TEMPLATE if isinstance(prompt, str) else DEFAULT_CHAT_TEMPLATE
            return template or self.context_template(default)

        return TeacherPrompts(
            method.contexts,
            tokenizer,
            template_for,
            count=method.max_contexts,
            peer_rule=peer_rule if method.draws_peers else None,
            show_answer=self.show_answer,
            fallback=self.fallback,
            strip_thinking=self.strip_thinking,
            settings=self.settings,
            seed=self.seed,
            max_length=self.max_teacher_prompt_length,
            chat_template_kwargs=chat_template_kwargs,
        )

    @property
    def method_spec(self) -> Method:
        return find_method(self.method)

    @property
    def has_teacher(self) -> bool:
        return self.method_spec.has_teacher

    def why_trl(self) -> str | None:
        """What TRL's own loss alone can do, of a method without a teacher; None where the fused one does."""
        if self.loss_type not in POLICY_MEANS:
            return f"loss_type={self.loss_type!r}"
        own = ("loss_type", "importance_sampling_level")
        for name, default in grpo_defaults().items():
            if name in {*UNUSED, "beta", "use_liger_kernel"} - {*own} and getattr(self, name) != default:
                return f"{name}={getattr(self, name)!r}"
        if self.vllm_importance_sampling_correction:
            return "vllm_importance_sampling_correction=True"
        return "fp16=True" if self.fp16 else None

    @property
    def own_loss(self) -> bool:
        """Whether the loss is made here, not by TRL."""
        return self.has_teacher or (self.policy_loss != "trl" and self.why_trl() is None)

    @property
    def mean_of_policy(self) -> str:
        """The policy term's mean: "rollout", "token" or "max_length"."""
        return self.policy_mean if self.has_teacher else POLICY_MEANS[str(self.loss_type)]

    @property
    def settings(self) -> dict[str, Any]:
        """The method's own settings, and two that the rollouts have. Raises ValueError for an unknown one, for one of
        another kind than its default, and for one that is required."""
        own, given = self.method_spec.settings, self.method_args or {}
        for name in given:
            if name not in own:
                raise ValueError(f"method_args: expected names among {sorted(own)}{nearest(name, own)}, got {name!r}")
            check_setting(f"method_args.{name}", own[name], given[name])
        missing = [name for name, value in own.items() if value is REQUIRED and name not in given]
        if missing:
            raise ValueError(
                f"method_args: expected {missing[0]!r} for method={self.method!r}, whose source does not publish it, "
                f"got {sorted(given)}"
            )
        return {"max_completion_length": self.max_completion_length, **own, **given}

    @property
    def draws(self) -> bool:
        """Whether the method draws; `dapo` does with ``method_args.rounds`` alone."""
        return self.method_spec.draw is not None and self.settings.get("rounds") != 0

    @property
    def needs_old_logps(self) -> bool:
        """Whether the loss needs log-probs under the policy that sampled, where a generation serves several steps."""
        surrogate = self.policy_coef != 0.0 and any(term.kind == "advantage" for term in self.method_spec.terms)
        return bool(self.importance_cap) or surrogate

    def objective(self, step: int) -> Objective:
        """The objective at an optimizer step, counted from 0."""
        return Objective(
            divergence=Divergence(
                self.divergence,
                self.jsd_beta,
                self.kl_temperature,
                self.kl_clip or None,
                self.kl_clip_form,
                self.kl_top_k or None,
                self.kl_top_of,
                self.kl_rest,
                self.kl_floor or None,
            ),
            divergence_coef=scheduled(self.divergence_coef, step),
            importance_cap=self.importance_cap or None,
            reference_coef=scheduled(self.reference_coef, step),
            reference_kl=self.reference_kl,
            policy_coef=scheduled(self.policy_coef, step),
            terms=self.method_spec.terms,
            step=step,
            advantage_mix=scheduled(self.advantage_mix, step),
            settings=self.settings,
            epsilon_low=self.epsilon,
            epsilon_high=self.epsilon if self.epsilon_high is None else self.epsilon_high,
            dual_clip=self.delta,
            sequence_ratio=self.importance_sampling_level == "sequence",
            sampling_temperature=self.temperature,
            memory_bytes=self.memory_bytes,
            impl=self.kernel_impl,
            # Each run whose teacher reads the rollouts says the gap before step 1.
            measure=self.method_spec.contexts is not nothing and (self.diagnostics or step == 0),
        )


@cache
def options() -> tuple[Option, ...]:
    """All fields that HSD adds to `GRPOConfig`, or whose values it restricts, in order."""
    return declared(HSDConfig, by_method=METHODS["hsd"].defaults)
