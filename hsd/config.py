"""`HSDConfig`: GRPO's configuration plus what Hindsight Self-Distillation adds."""

from __future__ import annotations

from dataclasses import dataclass, fields

from trl.trainer.grpo_config import GRPOConfig

from hsd.loss import Objective
from hsd.peers import PEER_RULES

SHARING = ("auto", "tree", "prompt", "none")

TEACHERS = ("live", "ema", "fixed")
# Options of GRPO's policy-gradient loss: set to anything else, they would silently do nothing.
UNUSED = (
    "loss_type",
    "importance_sampling_level",
    "epsilon",
    "delta",
    "top_entropy_quantile",
    "entropy_coef",
    "use_adaptive_entropy",
    "off_policy_mask_threshold",
)


@dataclass
class HSDConfig(GRPOConfig):
    """TRL's `GRPOConfig` with what the HSD update needs. The paper's values (arXiv 2606.15576) are the defaults of the
    learning rate, its constant schedule, Adam's beta2, top_p, the group size and temperature, the live teacher and the
    reference coefficient; lengths, batch and steps are the user's.

    Args:
        peer_rule: how a rollout's peer is drawn from the other successes of its group: "uniform", "paired",
            "shortest", "highest_perplexity" or "lowest_perplexity". "auto" is "paired" where prefixes are shared, which
            has the same expected gradient and at most two contexts a group, and else "uniform".
        divergence: "forward_kl" = KL(teacher || student), "reverse_kl" = KL(student || teacher), or "jsd".
        jsd_beta: the teacher's share of the mixture, for "jsd".
        kl_temperature: divides the logits of both sides in the loss (sampling has its own ``temperature``).
        kl_clip: OPSD's pointwise clip of the vocabulary summands.
        teacher: whose weights read the privileged context. "live" is the student of the moment, the paper's setting
            at learning rate 1e-6; at that of the small world it runs away (docs/teachers.md), and
            "ema" or "fixed" (the initial policy; with LoRA, adapters off) hold.
        teacher_ema_rate: share of the student that enters an "ema" teacher at each optimizer step.
        reference_coef: weight of the exact KL(student || initial policy). GRPO's own ``beta`` must stay 0.
        success_reward: a rollout whose (weighted) reward reaches this is a success and may be a peer.
        max_teacher_prompt_length: tokens; a longer teacher prompt has its demonstration's tail cut.
        with_peer_template, answer_only_template: `str.format` templates of the privileged context, see
            `hsd.context.ContextTemplate`; both or neither.
        prefix_sharing: what several sequences of a micro-batch begin with is computed once: "tree" every shared
            prefix, of student and teacher, "prompt" the questions only, "none" nothing. "auto" is "tree" for models
            that pass `hsd.tree.check`, in micro-batches where it saves a fifth of the tokens or more, and says so
            when a model does not pass. "tree" and "prompt" raise the reason instead.
        tree_token_budget: a micro-batch whose tree has more tokens is differentiated a few rollouts at a time, with
            the same gradient (`hsd.tree.two_phase`), so that memory is bounded.
        kernel_impl, chunk_bytes: passed to `hsd_kernels.fused_hsd_kl`.
    """

    learning_rate: float = 1e-6
    lr_scheduler_type: str = "constant"
    adam_beta2: float = 0.95
    top_p: float = 0.95
    peer_rule: str = "auto"
    divergence: str = "forward_kl"
    jsd_beta: float = 0.5
    kl_temperature: float = 1.0
    kl_clip: float | None = None
    teacher: str = "live"
    teacher_ema_rate: float = 0.005
    reference_coef: float = 0.001
    success_reward: float = 1.0
    max_teacher_prompt_length: int | None = None
    with_peer_template: str | None = None
    answer_only_template: str | None = None
    prefix_sharing: str = "auto"
    tree_token_budget: int | None = None
    kernel_impl: str = "auto"
    chunk_bytes: int | None = None
    logging_steps: float = 1
    # The loss has no importance ratios; with vLLM the correction would cost TRL full logits for a ratio nobody reads.
    vllm_importance_sampling_correction: bool = False

    def __post_init__(self):
        super().__post_init__()
        inherited = {f.name: f.default for f in fields(GRPOConfig)}
        for name in UNUSED:
            if name in inherited and getattr(self, name) != inherited[name]:
                raise ValueError(
                    f"{name}: expected {inherited[name]!r}, GRPO's default, because the HSD loss does not use it, "
                    f"got {getattr(self, name)!r}"
                )
        _one_of("peer_rule", self.peer_rule, ("auto", *PEER_RULES))
        _one_of("prefix_sharing", self.prefix_sharing, SHARING)
        if self.tree_token_budget is not None and self.tree_token_budget < 1:
            raise ValueError(f"tree_token_budget: expected a positive number or None, got {self.tree_token_budget}")
        _one_of("divergence", self.divergence, ("forward_kl", "reverse_kl", "jsd"))
        _one_of("teacher", self.teacher, TEACHERS)
        if self.beta != 0.0:
            raise ValueError(
                f"beta: expected 0 (GRPO's beta loads a second reference and samples its KL), got {self.beta}; "
                "use reference_coef for the exact KL(student || initial policy)"
            )
        if not 0.0 < self.teacher_ema_rate <= 1.0:
            raise ValueError(f"teacher_ema_rate: expected a number in (0, 1], got {self.teacher_ema_rate}")
        if self.reference_coef < 0.0:
            raise ValueError(f"reference_coef: expected a number >= 0, got {self.reference_coef}")
        if not self.num_generations or self.num_generations < 2:
            raise ValueError(f"num_generations: expected at least 2 rollouts a group, got {self.num_generations}")
        if (self.with_peer_template is None) != (self.answer_only_template is None):
            raise ValueError("with_peer_template, answer_only_template: expected both or neither")

    @property
    def objective(self) -> Objective:
        return Objective(
            divergence=self.divergence,
            beta=self.jsd_beta,
            temperature=self.kl_temperature,
            kl_clip=self.kl_clip,
            reference_coef=self.reference_coef,
            chunk_bytes=self.chunk_bytes,
            impl=self.kernel_impl,
        )


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {allowed}, got {value!r}")
