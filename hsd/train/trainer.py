"""`HSDTrainer`: TRL's GRPO rollouts, rewards, logging and checkpoints; the update is self-distillation's.

What is private to TRL's `GRPOTrainer` is used in this file alone. After a batch is generated and scored, every rollout
gets its teacher's prompt (`hsd.hindsight`); in the loss, teacher and student compute the states of the same rollout
tokens (`hsd.train.micro_batch`), and `hsd.train.update` makes the loss of them. Logits are never made.

What is used of TRL 1.16 beyond its documentation, to look at when TRL changes:

- overridden: ``_get_train_sampler``, ``_prepare_inputs``, ``_calculate_rewards``, ``_generate_and_score_completions``,
  ``_generate``, ``_generate_single_turn``, ``_tokenize_prompts``, ``training_step``, ``compute_loss``,
  ``create_model_card``, ``log``, and of transformers' Trainer ``_save_checkpoint``, ``_save``,
  ``_load_optimizer_and_scheduler``, ``_issue_warnings_after_load``
- attributes: ``_buffered_inputs``, ``_step``, ``_metrics``, ``_tokenizer``, ``_is_vlm``, ``_get_output_dir``,
  ``num_generations``, ``num_generations_eval``, ``num_iterations``, ``reward_weights``, ``temperature``,
  ``chat_template``, ``chat_template_kwargs``, ``tools``, ``current_gradient_accumulation_steps``, ``eos_token_ids``,
  ``max_completion_length``, ``_pending_extra_logs``, ``_pending_metrics``, ``generation_kwargs``,
  ``pad_to_multiple_of``, ``use_vllm``, ``use_transformers_continuous_batching``, ``aux_loss_enabled``
- keys of its batch: ``prompt_ids``, ``prompt_mask``, ``completion_ids``, ``completion_mask``, ``tool_mask``,
  ``advantages``, ``old_per_token_logps``, ``sampling_per_token_logps`` (`hsd.train.batch` and `hsd.train.draw` use
  them)
- functions: ``unwrap_model_for_generation``, ``_ForwardRedirection``, ``split_tensor_dict``, ``RepeatSampler`` and its
  arguments
"""

from __future__ import annotations

import copy
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback
from trl.models.utils import _ForwardRedirection, unwrap_model_for_generation
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import RepeatSampler, split_tensor_dict

from hsd.data.rows import completions_of
from hsd.evaluate.sampling import Sampling, choice_of, sample_from_ids, until_end
from hsd.hindsight.context import ContextTemplate, known_words, tokenize_prompt
from hsd.hindsight.groups import Member, Prompt, Rollout, members
from hsd.hindsight.peers import GenerationNumbers
from hsd.hindsight.teacher_prompts import TeacherPrompt
from hsd.methods.method import State
from hsd.methods.state import GATE, STATE, RefreshGate, load_states, save_states
from hsd.padding import padded
from hsd.policy.body_and_head import body_and_head
from hsd.policy.forward import RolloutInputs
from hsd.policy.frozen import in_eval_mode, is_peft
from hsd.policy.generate import generate
from hsd.policy.sharding import gather, reshard, stored_tensors, weights_of
from hsd.policy.stand_in import small_model
from hsd.policy.tree.check import choose_sharing
from hsd.policy.vocabulary import check_vocabulary
from hsd.process import settle
from hsd.progress import counted, say
from hsd.train import draw
from hsd.train.alarms import repeated_tail
from hsd.train.batch import facts_of, has_contexts, own_columns, shuffle_groups, some_rows, student_inputs, unpack
from hsd.train.callbacks import ROLLOUTS, TEXTS, RunFiles, warn_of_lost_rollouts
from hsd.train.card import write_card
from hsd.train.config import HSDConfig
from hsd.train.diagnostics import of_texts
from hsd.train.generations import serves_a_multiple
from hsd.train.limits import (
    check_columns,
    check_engine,
    check_method,
    check_no_tensor_parallelism,
    engine_of,
    lacking,
    makes_loss,
)
from hsd.train.metrics import context_metrics, group_metrics, initial_gap, loss_metrics, teacher_success
from hsd.train.micro_batch import MicroBatchLoss, joined
from hsd.train.ranks import mean_over_ranks, means, of_all_ranks
from hsd.train.rollouts import append_rollouts, rollout_rows
from hsd.train.step_time import StepTime
from hsd.train.teachers import FrozenPolicies
from hsd_kernels import RowStats, fused_token_logps

# What the environment says about each completion: called with prompts=, completions= and the data-set columns.
FeedbackFn = Callable[..., Sequence[str | None]]
WriterFn = Callable[[list[Prompt]], Sequence[str]]


class HSDTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` with the update of HSD (arXiv 2606.15576) or of another method of the family.

    Args: as `GRPOTrainer`, with an `HSDConfig` and a data set with ``prompt`` and ``answer`` (and the columns that
    the method needs), and

        context_template: words of the privileged context; by default the config's templates, else one that suits
            chat or plain-text prompts.
        feedback_fn: what the environment says about each completion, for methods that show it (SDPO).
        writer_fn: writes the texts of a method's draw in the model's place, as another model would: prompts -> texts.

    Raises ValueError for a data set without a needed column, a model whose logits are not a plain head over its hidden
    states, and combinations that are not supported, by name.
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: HSDConfig,
        train_dataset: Any = None,
        *,
        context_template: ContextTemplate | None = None,
        feedback_fn: FeedbackFn | None = None,
        writer_fn: WriterFn | None = None,
        **kwargs: Any,
    ):
        settle()  # reward functions have children
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", kwargs.get("eval_dataset"))):
            for part in dataset.values() if isinstance(dataset, dict) else (dataset,):
                check_columns(name, getattr(part, "column_names", None) or (), args)
        check_method(args, {"feedback_fn": feedback_fn, "writer_fn": writer_fn} | kwargs)
        check_no_tensor_parallelism(model, args)
        self.step_time = StepTime()
        super().__init__(model=model, reward_funcs=reward_funcs, args=args, train_dataset=train_dataset, **kwargs)
        self.args: HSDConfig
        self._sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if args.draws and self.tools:
            raise ValueError(f"tools: expected none with method={args.method!r}, which draws, got {len(self.tools)}")
        if self._is_vlm:
            raise ValueError("model: expected a text model, got a vision-language one")
        policy = self._policy
        check_vocabulary(policy, self._tokenizer)
        self.feedback_fn = feedback_fn
        self._redirect = _ForwardRedirection()
        held = weights_of(self.accelerator, self._redirect)
        engine = engine_of(self.accelerator)
        check_engine(args, engine, peft=is_peft(policy))
        tried = policy
        if args.own_loss and held.gathers:  # weights that a rank lacks cannot be compared: those of a small model are
            tried = small_model(policy, self.accelerator.device)
        aux_loss, whole = self.aux_loss_enabled, not held.gathers
        self.own_loss = makes_loss(args, policy, tried, engine, aux_loss=aux_loss, whole=whole)
        self.prefix_sharing = "none"
        if self.own_loss:  # before frozen copies are made: they take the tree as the policy does
            with self.accelerator.autocast():
                self.prefix_sharing = choose_sharing(args.prefix_sharing, policy, tried, args.neftune_noise_alpha)
        rule = "uniform" if self.prefix_sharing == "none" else "paired"
        self.peer_rule = rule if args.peer_rule == "auto" else args.peer_rule
        self.frozen = FrozenPolicies(policy, args, held)
        self.micro_batch_loss = MicroBatchLoss(
            self.frozen,
            self.prefix_sharing,
            args.loss_mean,
            args.mean_of_policy,
            always=args.prefix_sharing != "auto" or args.tree_token_budget is not None,
            token_budget=args.tree_token_budget,
            diagnostics=args.diagnostics,
        )
        self.teacher_prompts = args.teacher_prompts(
            self._tokenizer, context_template, self.peer_rule, self._chat_template
        )
        self.writer = draw.Writer(
            self._tokenizer,
            self._prompt_ids,
            self.teacher_prompts,
            self._sampled,
            self._judged,
            gather_object,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            writer_fn,
        )
        make_state = args.method_spec.state
        self.method_state = None if make_state is None else make_state()
        gate = args.teacher_gate
        self.gate = None if gate is None else RefreshGate(int(gate[0]), gate[1], gate[2])
        self.refresh = False  # set by a generation, taken at the end of its first step
        # Set by _calculate_rewards, taken and cleared by _generate_and_score_completions, which calls it.
        self._scored: draw.Scored | None = None
        self._numbers, self._generation = GenerationNumbers(), 0
        self.add_callback(_AfterStep(self))
        self.add_callback(RunFiles(Path(str(args.output_dir)), args.teacher if args.has_teacher else ""))

    @property
    def _policy(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    @property
    def _chat_template(self) -> dict[str, Any]:
        """As TRL renders the student's prompt."""
        given: Any = self.chat_template_kwargs
        return {**given, "chat_template": self.chat_template, "tools": self.tools or None}

    def _get_train_sampler(self, dataset=None):
        s: Any = super()._get_train_sampler(dataset)
        passes = lambda: int((self.state.epoch or 0.0) + 1e-6)  # noqa: E731
        return QuestionOrder(
            s.data_source, s.mini_repeat_count, s.batch_size, s.repeat_count, s.shuffle, s.seed, passes=passes
        )

    def _prepare_inputs(self, generation_batch):
        """TRL's, but whole groups change places: rows shuffled one by one would scatter what can be shared."""
        if self.prefix_sharing == "none" or self._mode == "eval":
            return super()._prepare_inputs(generation_batch)
        steps: Any = self.args.steps_per_generation
        if self._step % (steps * self.num_iterations) == 0 or self._buffered_inputs is None:
            batch = self._generate_and_score_completions(generation_batch)  # type: ignore[arg-type]
            size: Any = self.num_generations
            self._buffered_inputs = split_tensor_dict(shuffle_groups(batch, size), steps)
        return self._buffered_inputs[self._step % steps]

    def training_step(self, model, inputs, num_items_in_batch):
        with self.step_time.part("update"):
            return super().training_step(model, inputs, num_items_in_batch)

    def evaluate(self, *args, **kwargs):
        found = super().evaluate(*args, **kwargs)
        self.step_time.take()  # what the evaluation took is no part of the next step
        return found

    def _tokenize_prompts(self, prompts):
        with known_words(prompts):
            return super()._tokenize_prompts(prompts)

    def _autocast_sampling(self) -> AbstractContextManager:
        """Around a whole generation: autocast casts the weights once, not once a token, and a frozen teacher's forward
        has no autocast of its own. Where a rank holds a part of the weights, the copies would be of all."""
        return nullcontext() if self._sharded else self.accelerator.autocast()

    def _generate(self, prompts):
        with self.step_time.part("sampling"), self._autocast_sampling():
            found = super()._generate(prompts)
        self.step_time.tokens += sum(map(len, found[1]))
        return found

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, *args):
        elsewhere = self.use_vllm or self.use_transformers_continuous_batching or self._sharded
        asked = self.args.generation_kwargs or self.pad_to_multiple_of or multimodal_fields
        if elsewhere or asked or not self.max_completion_length:
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields, *args)
        given: dict[str, Any] = dict(self.generation_kwargs)  # which vLLM's trainer has not
        new, pad_id, ends = (given.pop(key) for key in ("max_new_tokens", "pad_token_id", "eos_token_id"))
        ids, mask = padded(prompt_ids, pad_id, "left")
        ids, mask = ids.to(self.accelerator.device), mask.to(self.accelerator.device)
        wrapped: Any = self.model_wrapped
        checkpointing: Any = self.args.gradient_checkpointing_kwargs
        settings = {"generation_kwargs": self.generation_kwargs, "gradient_checkpointing_kwargs": checkpointing}
        with unwrap_model_for_generation(wrapped, self.accelerator, **settings) as model:
            out = generate(model, ids, mask, max_new_tokens=new, pad_id=pad_id, end_ids=ends, **given)
        return [until_end(row, ends) for row in out[:, ids.shape[1] :].tolist()], None

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        feedback: list[str | None] = [None] * len(inputs)
        if self.feedback_fn is not None:
            columns = {key: [row[key] for row in inputs] for key in inputs[0] if key not in ("prompt", "completion")}
            feedback = list(self.feedback_fn(prompts=prompts, completions=completions, **columns))
            if len(feedback) != len(inputs):
                raise ValueError(
                    f"feedback_fn: expected {counted(len(inputs), 'text')}, one a completion, got {len(feedback)}"
                )
        self._scored = draw.Scored(*self._weighted(rewards), [list(ids) for ids in completion_ids_list], feedback)
        return self._draw(inputs, prompts, completions, rewards, self._scored) if self.args.draws else rewards

    def _weighted(self, rewards: Tensor) -> tuple[list[float], Tensor]:
        return draw.weighted(rewards, self.reward_weights, self.args.success_reward)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._generation = self._numbers.next(self.state.global_step, training=self._mode == "train")
        with self.step_time.part("rewards"):  # and contexts
            return self._generated(inputs)

    def _generated(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        scored, self._scored = self._scored, None
        assert scored is not None
        args, mode, size, outcome = self.args, self._mode, self._group_size, scored.outcome
        pad_id: Any = self._tokenizer.pad_token_id
        first = self.accelerator.process_index * len(inputs)
        sampled = None
        if outcome is not None:
            ends = {*self.eos_token_ids, pad_id} if args.mask_truncated_completions else None
            sampled = draw.put_replies(batch, scored, inputs, self.writer, size=size, ends=ends)
        rollouts = self._rollouts(batch, scored)
        mine = members(inputs, rollouts, first=first, group_size=size, success_reward=args.success_reward)
        success = torch.tensor([m.success for m in mine], device=batch["completion_ids"].device)
        unscored = scored.unscored[first : first + len(inputs)]
        batch["advantages"] = batch["advantages"].masked_fill(unscored, 0.0)
        self._record_success(mine, success, scored)
        prompts = None
        if self.teacher_prompts is not None:
            prompts = self.teacher_prompts.make(
                mine,
                inputs,
                scored.feedback,
                generation=self._generation,
                groups=[rollouts[i : i + size] for i in range(0, len(rollouts), size)],
                notes=None if outcome is None else outcome.notes,
                state=self.method_state,
            )
        if args.record_groups and mode == "train":
            step, flags, groups = self.state.global_step + 1, unscored.tolist(), args.record_groups
            rows = gather_object(rollout_rows(step, mine, prompts, flags, self._tokenizer, groups=groups))
            if self.is_world_process_zero():
                append_rollouts(Path(str(args.output_dir)) / ROLLOUTS, rows)
        if args.diagnostics:
            self._record(mode, of_texts(self._tokenizer.batch_decode(scored.completion_ids, skip_special_tokens=True)))
        tails = sum(map(repeated_tail, scored.completion_ids)) / len(scored.completion_ids)
        self._record(mode, (context_metrics(prompts) if prompts else {}) | {"repeated_tail": tails})
        every = args.teacher_success_every
        if prompts and every and mode == "train" and serves_a_multiple(self.state.global_step, every, args):
            with self.step_time.part("teacher_success"):
                self._record(mode, {"teacher_success": self._teacher_success(inputs, prompts, first)})
        if not self.own_loss:
            return batch
        steps: Any = args.steps_per_generation if mode == "train" else 1
        mean = partial(mean_over_ranks, self.accelerator)
        batch |= facts_of(batch, mine, success, prompts, args, pad_id, mean, steps).pack()
        if outcome is not None:
            mask = batch["completion_mask"]
            batch |= draw.drawn_columns(args.method_spec, outcome, mine, self.writer, mask, mean, steps)
        if args.needs_old_logps and (sampled is not None or "old_per_token_logps" in batch):
            # TRL's left-padded prompts have no position ids: with GPT-2's absolute positions its log-probs are of
            # another policy than the loss's.
            plain, mask = student_inputs(batch)
            batch["old_per_token_logps"] = self._logps(sampled or plain, mask, temperature=self.temperature)
        if args.method_spec.on_batch is not None:
            rows = self._score(batch) if args.method_spec.scores else None
            gather = partial(of_all_ranks, self.accelerator)
            batch |= own_columns(batch, rows, args, self.state.global_step, self._state_of_the_method, gather)
        return batch

    def _record_success(self, mine: Sequence[Member], success: Tensor, scored: draw.Scored) -> None:
        """Metrics of the groups of all ranks, and whether a gated teacher is refreshed by them."""
        has_peer = torch.tensor([m.has_peer for m in mine], device=success.device)
        everywhere: Any = self.accelerator.gather(torch.stack([success, has_peer], -1))
        metrics: dict[str, Any] = group_metrics(everywhere[:, 0], everywhere[:, 1], scored.unscored, self._group_size)
        if scored.outcome is not None:
            metrics |= draw.draw_metrics(scored.outcome, len(scored.rewards)) | {"success_before_draw": scored.before}
        self._record(self._mode, metrics)
        if self.gate is not None and self._mode == "train":
            truncated = self._metrics["train"]["completions/clipped_ratio"][-1]  # of all ranks, as the success rate
            self.refresh |= self.gate.step(metrics["success_rate"].item(), truncated)

    def _teacher_success(
        self, inputs: list[dict[str, Any]], prompts: Sequence[Sequence[TeacherPrompt]], first: int
    ) -> Tensor:
        """Share of successes among replies sampled from the teacher, one from the first context of each rollout."""
        asked = [row[0].context.prompt_ids for row in prompts]
        seed = hash((self.args.seed, self._generation, first)) % 2**31
        with self.frozen.sampler(self._policy) as model, in_eval_mode(model), self._autocast_sampling():
            rollouts = sample_from_ids(model, self._tokenizer, asked, self._sampling(len(inputs)), seed=seed)
        texts = self._tokenizer.batch_decode(rollouts, skip_special_tokens=True)
        sums, unscored = self._weighted(self._rewards_of(inputs, texts, rollouts))  # of all ranks, as what follows
        shown: Any = self.accelerator.gather(has_contexts(prompts)[:, 0].to(unscored.device))
        return teacher_success(sums, shown & ~unscored, self.args.success_reward)

    def _sampling(self, batch_size: int) -> Sampling:
        """As the rollouts are sampled."""
        longest: Any = self.max_completion_length
        return Sampling(longest, batch_size=batch_size, **choice_of(self.args))

    def _rewards_of(
        self, rows: Sequence[Mapping[str, Any]], texts: Sequence[str], ids: Sequence[Sequence[int]]
    ) -> Tensor:
        """(N, functions) of all ranks, for replies to these rows of this rank; what is logged of them is left out."""
        asked, prompts = [dict(row) for row in rows], [row["prompt"] for row in rows]
        pending = self._pending_extra_logs, self._pending_metrics  # of the rollouts, a value each
        self._pending_extra_logs, self._pending_metrics = defaultdict(list), defaultdict(list)
        try:
            return super()._calculate_rewards(asked, prompts, completions_of(asked, texts), [list(i) for i in ids])
        finally:
            self._pending_extra_logs, self._pending_metrics = pending

    @property
    def _state_of_the_method(self) -> Any:
        """What an evaluation changes in it is forgotten."""
        return self.method_state if self._mode == "train" else copy.deepcopy(self.method_state)

    @property
    def _group_size(self) -> int:
        size: Any = self.num_generations if self._mode == "train" else self.num_generations_eval
        return size

    def _draw(
        self, inputs: list[dict[str, Any]], prompts: list, completions: list, rewards: Tensor, scored: draw.Scored
    ) -> Tensor:
        """The rewards (N, functions) of all ranks, with those of the replies that take a rollout's place, also in TRL's
        three lists."""
        size, training, step = self._group_size, self._mode == "train", self.state.global_step
        state, spare = self._state_of_the_method, self.train_dataset
        outcome, before = draw.run(
            self.args,
            self.writer,
            inputs,
            scored,
            size=size,
            state=state,
            spare=spare,  # type: ignore[arg-type]
            step=step,
            generation=self._generation,
        )
        if not training:  # an evaluation is of the policy's own rollouts
            outcome = replace(outcome, drawn=[replace(d, rollouts={}, row=None) for d in outcome.drawn])
        elif self.is_world_process_zero():
            draw.record(Path(str(self.args.output_dir)) / TEXTS, step + 1, outcome)
        first = self.accelerator.process_index * len(inputs)
        own, feedback = draw.take_replies(outcome, inputs, prompts, completions, scored, first=first, size=size)
        rewards = draw.with_replies(rewards, outcome, size)
        self._scored = draw.Scored(*self._weighted(rewards), own, feedback, outcome, before)
        return rewards

    def _prompt_ids(self, prompt: Prompt) -> draw.Ids:
        template = {name: value for name, value in self._chat_template.items() if name != "tools"}
        return tokenize_prompt(self._tokenizer, prompt, chat_template_kwargs=template)

    def _sampled(self, prompts: Sequence[draw.Ids], who: str, seed: int) -> Sequence[Sequence[int]]:
        """What the policy, or the run's teacher, says; the RNG of the rollouts is left alone."""
        ids, args = [list(prompt) for prompt in prompts], self.args
        size = max(1, args.generation_batch_size // args.world_size)  # type: ignore[operator]
        if who == "teacher" and self.frozen.teacher is not None:
            with self.frozen.sampler(self._policy) as model, self._autocast_sampling():
                return sample_from_ids(model, self._tokenizer, ids, self._sampling(size), seed=seed)
        devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), self._autocast_sampling():
            torch.manual_seed(seed)
            parts = [ids[at : at + size] for at in range(0, len(ids), size)]  # as large as a generation
            return [said for part in parts for said in self._generate_single_turn(part, None, {}, 1)[0]]

    def _judged(
        self, rows: Sequence[Mapping[str, Any]], texts: Sequence[str], ids: Sequence[Sequence[int]]
    ) -> tuple[Tensor, list[float]]:
        raw = self._rewards_of(rows, texts, ids)
        return raw, self._weighted(raw)[0]

    def _rollouts(self, batch: dict[str, Any], scored: draw.Scored) -> list[Rollout]:
        """The rollouts of all ranks."""
        logps: list[float] | list[None] = [None] * len(scored.rewards)
        if self.args.has_teacher and self.peer_rule.endswith("perplexity"):
            # All tokens count, also of rollouts that mask_truncated_completions leaves out of the loss.
            lengths = torch.tensor([len(ids) for ids in scored.completion_ids], device=batch["completion_mask"].device)
            kept = torch.arange(batch["completion_mask"].shape[1], device=lengths.device) < lengths.unsqueeze(-1)
            inputs, mask = student_inputs(batch | {"completion_mask": kept.long()})
            logps = gather_object((self._logps(inputs, mask).sum(-1) / mask.sum(-1).clamp_min(1)).tolist())
        ids = gather_object(scored.completion_ids)
        found = zip(ids, scored.rewards, logps, scored.unscored.tolist(), strict=True)
        return [Rollout(tuple(i), reward=r, mean_logp=p, scored=not unscored) for i, r, p, unscored in found]

    def _score(self, batch: Mapping[str, Any]) -> RowStats | None:
        """Student and teacher (B, T) over the generation, a micro-batch at a time, without gradient."""
        policy, objective = self._policy, self.args.objective(self.state.global_step)

        def score(rows: Tensor) -> RowStats:
            return self.micro_batch_loss.stats(policy, unpack(some_rows(batch, rows), self.args.skip_tokens), objective)

        return joined(self._measure(score, len(batch["completion_ids"])))

    @torch.no_grad()
    def _measure(self, measure: Callable[[Tensor], Any], rows: int) -> list[Any]:
        """``measure(rows of a micro-batch)`` for each of a generation, where the policy's weights are whole."""
        policy = self._policy
        wrapper: Any = self.model_wrapped  # the engine's, whose hooks gather weights
        found: list[Any] = []
        with in_eval_mode(policy), self.accelerator.autocast():
            for part in torch.arange(rows).split(self.args.per_device_train_batch_size):
                if self._sharded:
                    # Not as the forward's result, which FSDP2 rounds to the precision that it computes in.
                    self._redirect(wrapper, policy, lambda part=part: found.append(measure(part)))
                else:
                    found.append(measure(part))
        if self.is_fsdp_enabled:
            reshard(policy)
        return found

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"  # type: ignore[union-attr]

    def _logps(self, inputs: RolloutInputs, weights: Tensor, temperature: float = 1.0) -> Tensor:
        """Log-prob (B, T) of each rollout's tokens under the policy that sampled it, 0 where the weight (B, T) is."""
        parts = body_and_head(self._policy)

        def logps(rows: Tensor) -> Tensor:
            some = inputs.rows(rows.tolist())
            ids, hidden = some.completion_ids, some.forward(parts, "student")
            return fused_token_logps(hidden, parts.head, ids, token_weights=weights[rows], temperature=temperature)

        return torch.cat(self._measure(logps, len(weights)))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs:
            raise ValueError("return_outputs: expected False, HSDTrainer computes no model outputs")
        if not self.own_loss:
            return super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        policy: Any = self.accelerator.unwrap_model(model)
        # Through the wrapper's forward, so that DDP and FSDP hooks apply. Accelerate's autocast sits in the very
        # attribute that the redirection replaces, so it is entered here.
        with self.accelerator.autocast():
            return self._redirect(model, policy, self._hsd_loss, policy, inputs)

    def _hsd_loss(self, policy: Any, inputs: dict[str, Any]) -> Tensor:
        batch, mode = unpack(inputs, self.args.skip_tokens), self._mode
        out = self.micro_batch_loss(policy, batch, self.args.objective(self.state.global_step))
        asked = {"temperature": self.args.kl_temperature, "diagnostics": self.args.diagnostics}
        if metrics := loss_metrics(out, batch, **asked):
            self._record(mode, metrics)
        # As in GRPOTrainer: the mean over the micro-batches of one optimizer step.
        return out.loss / (self.current_gradient_accumulation_steps if mode == "train" else 1)

    def _record(self, mode: str, values: Mapping[str, Tensor | float]) -> None:
        for name, value in means(self.accelerator, values).items():
            self._metrics[mode][f"hsd/{name}"].append(value)

    def log(self, logs, start_time=None):
        """Without the metrics of which these steps measured nothing: TRL would log them as None."""
        measured = self._metrics[self._mode]
        for name in [name for name, values in measured.items() if all(map(math.isnan, values))]:
            del measured[name]
        super().log(logs, start_time)

    def _save_checkpoint(self, model, trial):
        # First, so that a checkpoint with a trainer_state.json, which is written last, is whole.
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        self.frozen.save(self._policy, folder, writes=self.args.should_save)
        if self.args.should_save:
            save_states(self._states, folder)
        super()._save_checkpoint(model, trial)

    @property
    def _states(self) -> dict[str, State]:
        """By file, what is remembered beside the weights."""
        both = {STATE: self.method_state, GATE: self.gate}
        return {name: state for name, state in both.items() if state is not None}

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            write_card(Path(str(output_dir or self.args.output_dir)), self.args, self._policy, self.state.global_step)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        """TRL's card names GRPO and its paper, and PEFT's nothing."""
        if self.is_world_process_zero():
            write_card(Path(str(self.args.output_dir)), self.args, self._policy, self.state.global_step)

    def save_model(self, output_dir=None, _internal_call=False):
        """Also where ranks hold parts: whole weights, gathered one at a time and written by one rank."""
        held = self.frozen.held
        if not held.gathers:
            return super().save_model(output_dir, _internal_call)
        policy = self._policy
        shards = {name: (p, held.shard(p)) for name, p in stored_tensors(policy).items()}
        self._save(output_dir, state_dict=gather(held, shards, writes=self.args.should_save))
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _load_optimizer_and_scheduler(self, checkpoint):
        # Not in _load_from_checkpoint, which transformers does not call under DeepSpeed.
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._load_frozen(Path(checkpoint))

    def _issue_warnings_after_load(self, load_result):
        """A file holds tied weights once: those under their other names are not missing."""
        tied = getattr(self._policy, "all_tied_weights_keys", None) or {}
        missing = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def _load_frozen(self, folder: Path) -> None:
        self.frozen.load(self._policy, folder)
        load_states(self._states, folder, f"method={self.args.method!r} and teacher={self.args.teacher!r}")
        warn_of_lost_rollouts(folder, self.args)


class _AfterStep(TrainerCallback):
    def __init__(self, trainer: HSDTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        t = self.trainer
        if state.is_world_process_zero and (told := lacking(t.args, t.train_dataset)) is not None:
            say(told)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """The optimizer's clock, and the initial gap: the final gain was linear in it (arXiv 2605.30070)."""
        self.began = time.perf_counter()
        if state.global_step == 0 and state.is_world_process_zero:
            gaps = self.trainer._metrics["train"].get("hsd/kl", [])
            if (told := initial_gap(gaps, self.trainer.args.divergence)) is not None:
                say(told)

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.step_time.add("optimizer", time.perf_counter() - self.began)

    def on_step_end(self, args, state, control, **kwargs):
        t = self.trainer
        for name, value in t.step_time.take().items():
            t._metrics["train"][f"time/{name}"].append(value)
        t.frozen.step(t._policy, state.global_step, t.refresh)
        t.refresh = False


class QuestionOrder(RepeatSampler):
    """TRL's order of questions, in which the n-th pass has the same shuffle in whatever process it begins.

    TRL's draws one shuffle a pass from a generator that a new process starts over. ``passes()`` says how many are done.
    """

    def __init__(self, *args: Any, passes: Callable[[], int], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.passes = passes

    def __iter__(self):
        if self.shuffle:
            self.generator.manual_seed(self.seed)  # type: ignore[arg-type]
            for _ in range(self.passes()):
                torch.randperm(self.num_samples, generator=self.generator)
        return super().__iter__()
