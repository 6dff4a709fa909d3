"""HSD's privileged contexts in TRL's `SDPOTrainer`: a peer and the answer, the answer alone where no peer succeeded.

    trainer = SDPOTrainer(...)      # the dataset's column `privileged_context` holds the answer a*
    trainer.teacher_context_builder = PeerAndAnswer(trainer)

TRL's own builder shows the first success of the group and masks a rollout that has none out of the loss; it knows no
answer. Here the peer is drawn by `hsd.hindsight.peers.choose_peers`, every rollout has a context and none is masked.

What is used of TRL 1.16 beyond its documentation: ``_get_completion_ids_list``, ``_tokenizer``.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from hsd.adapters.common import check_version
from hsd.adapters.trl import TESTED
from hsd.hindsight.context import (
    DEFAULT_CHAT_TEMPLATE,
    DEFAULT_TEXT_TEMPLATE,
    ContextTemplate,
    PrivilegedContext,
    build_context,
)
from hsd.hindsight.groups import Member, Prompt, Rollout, members
from hsd.hindsight.peers import PEER_RULES, GenerationNumbers, choose_peers, peer_rng
from hsd.padding import padded

RULES = tuple(rule for rule in PEER_RULES if not rule.endswith("perplexity"))  # SDPO keeps no log-probs of a group


class PeerAndAnswer:
    """For `SDPOTrainer.teacher_context_builder`; reads its ``success_reward_threshold`` and ``max_reprompt_len``.

    TRL's reprompt templates and feedback options are not used.

    Args:
        rule: one of `RULES`; "uniform" is the paper's.
        template: the wording; by default `hsd.hindsight.context`'s for chat or for plain strings.
    """

    def __init__(self, trainer: Any, rule: str = "uniform", template: ContextTemplate | None = None):
        check_version("trl", *TESTED)
        if rule not in RULES:
            raise ValueError(f"rule: expected one of {RULES}, got {rule!r}")
        self.trainer, self.rule, self.template = trainer, rule, template
        self.last_metrics: dict[str, float] = {}
        self.numbers = GenerationNumbers()

    def build(
        self, output: dict[str, Any], prompts: list[Prompt], rewards: Tensor, feedbacks: list[Any] | None = None
    ) -> dict[str, Tensor]:
        """Teacher inputs (B, P + T) of the local rollouts; ``feedbacks`` are the answers, one a rollout.

        Raises TypeError when an answer is not a string, ValueError when question and answer exceed the limit.
        """
        trainer, args = self.trainer, self.trainer.args
        odd = [a for a in feedbacks or [None] if not isinstance(a, str)]
        if odd:
            raise TypeError(
                f"privileged_context: expected the answer of every question as a string, got {type(odd[0]).__name__}"
            )
        gather = importlib.import_module("accelerate.utils").gather_object
        scores = trainer.accelerator.gather(rewards).tolist()
        completions = gather(trainer._get_completion_ids_list(output))
        rollouts = [Rollout(tuple(ids), reward=r) for ids, r in zip(completions, scores, strict=True)]
        size = trainer.num_generations if trainer.model.training else trainer.num_generations_eval
        first = trainer.accelerator.process_index * len(prompts)

        rows = [{"prompt": q, "answer": a} for q, a in zip(prompts, feedbacks or [], strict=True)]
        mine = members(rows, rollouts, first=first, group_size=size, success_reward=args.success_reward_threshold)
        generation = self.numbers.next(trainer.state.global_step, training=trainer.model.training)
        contexts = [self._context(member, generation) for member in mine]
        solved = [bool(member.group.successes) for member in mine]
        shares = torch.tensor([[s, c.kind == "peer"] for s, c in zip(solved, contexts, strict=True)]).float()
        in_groups, with_peer = trainer.accelerator.gather(shares.to(rewards.device)).mean(0).tolist()
        self.last_metrics = {
            "self_distillation/success_group_fraction": in_groups,
            "self_distillation/success_sample_fraction": with_peer,
            "self_distillation/reprompt_sample_fraction": 1.0,
        }
        completion_ids, device = output["completion_ids"], output["completion_ids"].device
        ids, mask = padded([c.prompt_ids for c in contexts], trainer._tokenizer.pad_token_id, "left")
        return {
            "teacher_input_ids": torch.cat([ids.to(device), completion_ids], 1),
            "teacher_attention_mask": torch.cat([mask.to(device), output["completion_mask"]], 1),
            "self_distillation_mask": torch.ones(len(contexts), device=device),
        }

    def _context(self, member: Member, generation: int) -> PrivilegedContext:
        trainer, group = self.trainer, member.group
        rng = peer_rng(trainer.args.seed, generation, member.number)
        peer = choose_peers(group, self.rule, rng=rng)[member.index]
        default = DEFAULT_TEXT_TEMPLATE if isinstance(group.prompt, str) else DEFAULT_CHAT_TEMPLATE
        return build_context(
            trainer._tokenizer,
            group.prompt,
            group.answer,
            None if peer is None else group.rollouts[peer].token_ids,
            self.template or default,
            max_length=trainer.args.max_reprompt_len,
            chat_template_kwargs=trainer.chat_template_kwargs,
        )
