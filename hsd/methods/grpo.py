"""GRPO (arXiv 2402.03300): the policy gradient of the group's advantage, without a teacher.

    A = (R - mean) / std over the group
    S = mean over rollouts of mean_t -min(r_t A, clip(r_t, 1 - eps, 1 + eps) A),  r_t = p(o_t) / p_old(o_t)

Confidence: high (TRL's code, whose steps these are). With one update per generated batch every ratio is 1 and the clip
does nothing. ``policy_loss`` says who computes it: the fused surrogate here, or TRL's own loss over full logits, which
has more options (`HSDConfig.why_trl`).
"""

from hsd.methods.method import Method

METHOD = Method("grpo", defaults={"loss_type": "grpo"})
