"""`HSDTrainer`: TRL's GRPO rollouts, rewards, logging and checkpoints; the update is self-distillation's.

Two hooks carry it. After a batch is generated and scored, every rollout gets what its teacher is shown (for HSD a peer
from its own group) and the teacher's prompt ``[q ; c_i]`` is built. In the loss, teacher and student read the same
rollout tokens and meet in `hsd.train.update.method_loss`, over hidden states; logits are never made.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from trl.models.utils import _ForwardRedirection
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import pad, split_tensor_dict

from hsd.hindsight.context import DEFAULT_CHAT_TEMPLATE, DEFAULT_TEXT_TEMPLATE, ContextTemplate
from hsd.hindsight.credit import credit, credit_at_divergence, credit_mass
from hsd.hindsight.groups import Rollout
from hsd.hindsight.lessons import Lesson, make_lessons
from hsd.policy.body_and_head import Split, check_split, split_model
from hsd.policy.frozen import in_eval_mode
from hsd.policy.tree.batch import pack_batch, pad_states, pays, shuffle_groups
from hsd.policy.tree.check import try_tree, warn_unshared
from hsd.policy.tree.forward import Pack, read_frozen, read_live_teacher, read_student, rows_of
from hsd.policy.tree.two_phase import two_phase_loss
from hsd.policy.vocabulary import check_vocabulary
from hsd.process import settle
from hsd.sampled import sampled_logps
from hsd.train.alarms import repeated_tail
from hsd.train.callbacks import RunFiles, steps_of_a_generation
from hsd.train.config import HSDConfig
from hsd.train.limits import check_sharded
from hsd.train.question_order import EpochSampler
from hsd.train.teachers import FrozenPolicies, check_fresh_adapter
from hsd.train.update import LossOutput, Objective, Rollouts, Side, method_loss, read_rollouts, rollout_weights
from hsd_kernels import HSDKLOutput

# What the environment says about each completion: called with prompts=, completions= and the data-set columns.
FeedbackFn = Callable[..., Sequence[str | None]]


class HSDTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` with the update of HSD (arXiv 2606.15576) or of another method of the family.

    Args: as `GRPOTrainer`, with an `HSDConfig` and a data set with ``prompt`` and ``answer`` (and the columns that
    the method needs), and

        context_template: words of the privileged context; by default the config's templates, else one that suits
            chat or plain-text prompts.
        feedback_fn: what the environment says about each completion, for methods that show it (SDPO).

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
        **kwargs: Any,
    ):
        settle()  # reward functions have children
        _check_columns("train_dataset", train_dataset, args)
        _check_columns("eval_dataset", kwargs.get("eval_dataset"), args)
        for name in ("environment_factory", "rollout_func"):  # they may change the question after the data set
            if args.has_teacher and kwargs.get(name) is not None:
                raise ValueError(
                    f"{name}: expected None with method={args.method!r}, whose teacher reads the data set's"
                )
        super().__init__(model=model, reward_funcs=reward_funcs, args=args, train_dataset=train_dataset, **kwargs)
        self.args: HSDConfig
        if self._is_vlm:
            raise ValueError("model: expected a text model, got a vision-language one")
        check_vocabulary(self.accelerator.unwrap_model(self.model), self._tokenizer)
        if feedback_fn is not None and not args.spec.feedback:
            raise ValueError(f"feedback_fn: expected None with method={args.method!r}, which shows no feedback")
        self.context_template = context_template
        self.feedback_fn = feedback_fn
        policy = self.accelerator.unwrap_model(self.model)
        self._sharded = sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if sharded:
            plugin = self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None
            check_sharded(args, zero_stage=getattr(plugin, "zero_stage", 0), peft=hasattr(policy, "peft_config"))
        if args.has_teacher:
            split = split_model(policy)
            if not sharded:  # sharded weights cannot be read here
                check_split(policy, split)
                check_fresh_adapter(policy, args)
        self.prefix_sharing = self._choose_sharing(policy) if args.has_teacher else "none"
        rule = "uniform" if self.prefix_sharing == "none" else "paired"
        self.peer_rule: Any = rule if args.peer_rule == "auto" else args.peer_rule
        self.frozen = FrozenPolicies(policy, args)
        self._redirect = _ForwardRedirection()
        self.add_callback(_AfterStep(self))
        self.add_callback(RunFiles(Path(str(args.output_dir))))

    def _choose_sharing(self, policy: Any) -> str:
        """ "tree", "prompt" or "none". Before frozen copies are made: they take the tree as the policy does."""
        asked = self.args.prefix_sharing
        if asked == "none":
            return asked
        if self._sharded:
            reason = "it has not been tried with sharded weights (FSDP, DeepSpeed)"
        elif self.args.neftune_noise_alpha:
            reason = (
                f"neftune_noise_alpha={self.args.neftune_noise_alpha}: a shared token would draw its noise once for "
                "all sequences, scaled by the length of the batch, expected None"
            )
        else:
            with self.accelerator.autocast():
                reason = try_tree(policy)
        if reason is None:
            return "tree" if asked == "auto" else asked
        if asked != "auto":
            raise ValueError(f"prefix_sharing: expected 'none' for this model, got {asked!r}: {reason}")
        warn_unshared(reason)
        return "none"

    # -- rollouts -> groups -> privileged contexts ----------------------------------------------------------------

    def _get_train_sampler(self, dataset=None):
        s: Any = super()._get_train_sampler(dataset)
        passes = lambda: int((self.state.epoch or 0.0) + 1e-6)  # noqa: E731
        return EpochSampler(
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

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        weighted = (rewards * self.reward_weights.to(rewards.device)).nansum(-1)
        unscored = rewards.isnan().all(-1)  # every verifier failed: no success, no peer, no advantage
        weighted = weighted.masked_fill(unscored, min(0.0, self.args.success_reward - 1.0))
        self._scored = (weighted.tolist(), unscored, [list(ids) for ids in completion_ids_list])  # rewards of all ranks
        self._feedback: Sequence[str | None] = [None] * len(inputs)
        if self.feedback_fn is not None:
            columns = {key: [row[key] for row in inputs] for key in inputs[0] if key not in ("prompt", "completion")}
            self._feedback = self.feedback_fn(prompts=prompts, completions=completions, **columns)
            if len(self._feedback) != len(inputs):
                got = len(self._feedback)
                raise ValueError(f"feedback_fn: expected {len(inputs)} texts, one a completion, got {got}")
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        rewards, unscored, completion_ids = self._scored
        mode = self._mode
        size: Any = self.num_generations if mode == "train" else self.num_generations_eval
        mean_logps = None
        if self.args.has_teacher and self.peer_rule.endswith("perplexity"):
            # All tokens count, also of rollouts that mask_truncated_completions leaves out of the loss.
            lengths = torch.tensor([len(ids) for ids in completion_ids], device=batch["completion_mask"].device)
            kept = torch.arange(batch["completion_mask"].shape[1], device=lengths.device) < lengths.unsqueeze(-1)
            whole = _student_inputs(batch | {"completion_mask": kept.long()})
            mean_logps = gather_object((self._logps(*whole).sum(-1) / whole[-1].sum(-1).clamp_min(1)).tolist())
        first = self.accelerator.process_index * len(inputs)
        lessons = make_lessons(
            self.args.spec,
            inputs,
            [
                Rollout(tuple(ids), reward=r, mean_logp=None if mean_logps is None else mean_logps[i])
                for i, (ids, r) in enumerate(zip(gather_object(completion_ids), rewards, strict=True))
            ],
            first=first,
            group_size=size,
            success_reward=self.args.success_reward,
            peer_rule=self.peer_rule,
            show_answer=bool(self.args.show_answer),
            fallback=str(self.args.fallback),
            seed=self.args.seed,
            step=self.state.global_step,
            feedback=self._feedback,
            tokenizer=self._tokenizer,
            template_for=self._template_for,
            max_length=self.args.max_teacher_prompt_length,
            chat_template_kwargs=self._rendering,
        )
        device = batch["completion_ids"].device
        batch["advantages"] = batch["advantages"].masked_fill(unscored[first : first + len(inputs)], 0.0)
        batch["success"] = torch.tensor([lesson.success for lesson in lessons], device=device)
        self._log_coverage(mode, batch["success"], lessons, size, unscored)
        self._record(mode, repeated_tail=sum(map(repeated_tail, completion_ids)) / len(completion_ids))
        if self.args.has_teacher:
            self._add_teacher(batch, lessons)
            if "old_per_token_logps" in batch and self.args.reads_old_logps and not self._sharded:
                # TRL reads left-padded prompts without position ids: with GPT-2's absolute positions its log-probs are
                # of another policy than the loss's, 2 to 6 nats away.
                batch["old_per_token_logps"] = self._logps(*_student_inputs(batch), temperature=self.temperature)
        return batch

    def _add_teacher(self, batch: dict[str, Any], lessons: Sequence[Lesson]) -> None:
        device = batch["completion_ids"].device
        contexts = [lesson.context for lesson in lessons if lesson.context is not None]
        ids = [torch.tensor(c.prompt_ids) for c in contexts]
        pad_id: Any = self._tokenizer.pad_token_id
        batch["teacher_prompt_ids"] = pad(ids, pad_id, padding_side="left").to(device)
        masks = [torch.ones_like(x) for x in ids]
        batch["teacher_prompt_mask"] = pad(masks, 0, padding_side="left").to(device)
        taus = [-1 if lesson.tau is None else lesson.tau for lesson in lessons]
        batch["divergence_position"] = torch.tensor(taus, device=device)
        batch["shown"] = torch.tensor([c.kind != "nothing" for c in contexts], device=device)
        # What a micro-batch of one process holds on average: the mean over all tokens of a step divides by it.
        tokens: Any = (_student_inputs(batch)[-1].sum(-1) * batch["shown"]).sum()
        tokens = self.accelerator.reduce(tokens.float(), reduction="mean")
        steps: Any = self.args.steps_per_generation if self._mode == "train" else 1
        batch["tokens_per_micro_batch"] = tokens.clamp_min(1.0) / steps

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"  # type: ignore[union-attr]

    def _template_for(self, prompt: str | list) -> ContextTemplate:
        default = DEFAULT_TEXT_TEMPLATE if isinstance(prompt, str) else DEFAULT_CHAT_TEMPLATE
        return self.context_template or self.args.context_template(default)

    @property
    def _rendering(self) -> dict[str, Any]:
        """What TRL passes to the chat template for the student's prompt; the teacher's must be rendered alike."""
        given: Any = self.chat_template_kwargs
        return {**given, "chat_template": self.chat_template, "tools": self.tools or None}

    @torch.no_grad()
    def _logps(self, ids: Tensor, mask: Tensor, targets: Tensor, weights: Tensor, temperature: float = 1.0) -> Tensor:
        """Log-prob (B, T) of each rollout's tokens under the policy that sampled it, 0 where the weight is."""
        policy = self.accelerator.unwrap_model(self.model)
        split, length = split_model(policy), targets.shape[1]
        size = self.args.per_device_train_batch_size
        parts = zip(*(x.split(size) for x in (ids, mask, targets, weights)), strict=True)
        with in_eval_mode(policy), self.accelerator.autocast():
            logps = [
                sampled_logps(read_rollouts(split, x, m, length), split, t, w, temperature=temperature)
                for x, m, t, w in parts
            ]
        return torch.cat(logps)

    def _log_coverage(self, mode: str, success: Tensor, lessons: Sequence[Lesson], size: int, unscored: Tensor) -> None:
        """Shares of the rollouts of all ranks. One without a verdict has neither succeeded nor failed."""
        has_peer = torch.tensor([lesson.has_peer for lesson in lessons], device=success.device)
        gathered: Any = self.accelerator.gather((success, has_peer))
        success, has_peer = gathered
        failing = ~success & ~unscored
        solved = success.reshape(-1, size).float().mean(-1)
        self._record(
            mode,
            success_rate=success.sum() / (~unscored).sum(),
            # f(p, G) of hsd.hindsight.credit.coverage is the expectation of this share of all rollouts.
            coverage=(failing & has_peer).sum() / (~unscored).sum(),
            failing_with_peer=(failing & has_peer).sum() / failing.sum(),
            mixed_groups=((solved > 0) & (solved < 1)).float().mean(),
            unscored=unscored.float().mean(),
        )
        if self.args.has_teacher:
            contexts = [lesson.context for lesson in lessons if lesson.context is not None]
            self._record(
                mode,
                fallback_share=sum(c.kind != "peer" for c in contexts) / len(contexts),
                demonstration_truncated=sum(c.truncated for c in contexts) / len(contexts),
            )

    # -- the loss -------------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs:
            raise ValueError("return_outputs: expected False, HSDTrainer computes no model outputs")
        if not self.args.has_teacher:
            return super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        policy = self.accelerator.unwrap_model(model)
        # Through the wrapper's forward, so that DDP and FSDP hooks apply. Accelerate's autocast sits in the very
        # attribute that the redirection replaces, so it is entered here.
        with self.accelerator.autocast():
            return self._redirect(model, policy, self._hsd_loss, policy, inputs)

    def _hsd_loss(self, policy: Any, batch: dict[str, Any]) -> Tensor:
        mode = self._mode
        pack = self._pack(batch)
        budget = self.args.tree_token_budget
        if pack is not None and budget is not None and len(pack.trie) > budget and torch.is_grad_enabled():
            out = self._loss_in_chunks(policy, batch, pack, budget)
        else:
            sides = self._read_unshared(policy, batch) if pack is None else self._read_shared(policy, batch, pack)
            student, teacher, reference = sides
            split = split_model(policy)
            rollouts, objective = self._rollouts(batch), self._objective
            out = method_loss(student, split, teacher, reference, rollouts, objective, self.args.spec)
        self._log_loss(mode, out, batch, _student_inputs(batch)[-1])
        # As in GRPOTrainer: the mean over the micro-batches of one optimizer step.
        return out.loss / (self.current_gradient_accumulation_steps if mode == "train" else 1)

    @property
    def _objective(self) -> Objective:
        return self.args.objective(self.state.global_step)

    def _rollouts(self, batch: dict[str, Any]) -> Rollouts:
        *_, targets, mask = _student_inputs(batch)
        shown = mask * batch["shown"].unsqueeze(-1)
        over_tokens = self.args.loss_mean == "token"
        weights = shown / batch["tokens_per_micro_batch"] if over_tokens else rollout_weights(shown)
        old = batch.get("old_per_token_logps")
        return Rollouts(targets, weights, rollout_weights(mask), batch["advantages"], old)

    def _pack(self, batch: dict[str, Any]) -> Pack | None:
        """None where every sequence is to be read by itself."""
        if self.prefix_sharing == "none":
            return None
        pack = pack_batch(batch, self.prefix_sharing)
        wanted = self.args.prefix_sharing != "auto" or pays(pack, batch, self._live)
        return pack if wanted and len(pack.trie) else None  # a batch whose rollouts are all masked has no nodes

    @property
    def _live(self) -> bool:
        """Whether the student's own weights read the teacher's prompts."""
        return self.args.teacher in ("live", "trust_region")

    def _read_unshared(self, policy: Any, batch: dict[str, Any]) -> tuple[Tensor, Side, Side | None]:
        """Student states, teacher and reference, every sequence read by itself."""
        ids, mask, targets, _ = _student_inputs(batch)
        length = targets.shape[1]
        prompts = {
            "student": (ids, mask),
            "teacher": (
                torch.cat([batch["teacher_prompt_ids"], targets], 1),
                torch.cat([batch["teacher_prompt_mask"], batch["completion_mask"]], 1),
            ),
        }

        def read(split: Split, wanted: Sequence[str]) -> list[Tensor]:
            return [read_rollouts(split, *prompts[name], length) for name in wanted]

        split = split_model(policy)
        with torch.no_grad(), in_eval_mode(policy):  # no dropout noise in the target
            frozen, reference = self.frozen.read(policy, read)
            live = Side(read(split, ["teacher"])[0]) if self._live else None
        student = read(split, ["student"])[0]
        return student, self.frozen.combine(live, frozen, split), reference

    def _read_shared(self, policy: Any, batch: dict[str, Any], pack: Pack) -> tuple[Tensor, Side, Side | None]:
        """One forward for the student; the teacher, live, takes the question's keys and values from it."""
        length = batch["completion_ids"].shape[1]
        split = split_model(policy)
        hidden, keys = read_student(split.body, pack, live_teacher=self._live)
        student = pad_states(split, rows_of(hidden, pack.student_nodes, pack.student), length)
        frozen, reference = self._read_frozen_tree(policy, pack, length)
        live = None
        if self._live:
            with in_eval_mode(policy):
                live = Side(pad_states(split, read_live_teacher(split.body, pack, hidden, keys), length))
        return student, self.frozen.combine(live, frozen, split), reference

    @torch.no_grad()
    def _read_frozen_tree(self, policy: Any, pack: Pack, length: int) -> tuple[Side | None, Side | None]:
        def read(split: Split, wanted: Sequence[str]) -> list[Tensor]:
            sides = read_frozen(split.body, pack, student="student" in wanted, teacher="teacher" in wanted)
            return [pad_states(split, states, length) for states in sides if states]

        with in_eval_mode(policy):
            return self.frozen.read(policy, read)

    def _loss_in_chunks(self, policy: Any, batch: dict[str, Any], pack: Pack, budget: int) -> LossOutput:
        """The same loss and gradient for a pack over the budget. Frozen policies share within a chunk only."""
        rollouts, objective = self._rollouts(batch), self._objective
        length = rollouts.target_ids.shape[1]
        split = split_model(policy)
        outs: list[LossOutput] = []

        def chunk_loss(chunk: Sequence[int], student: list[Tensor], live: list[Tensor]) -> Tensor:
            rows = torch.tensor(list(chunk), device=rollouts.target_ids.device)
            part = pack_batch(batch, self.prefix_sharing, chunk)
            frozen, reference = self._read_frozen_tree(policy, part, length)
            seen = Side(pad_states(split, live, length)) if self._live else None
            teacher = self.frozen.combine(seen, frozen, split)
            hidden = pad_states(split, student, length)
            some = rollouts.rows(rows)
            outs.append(method_loss(hidden, split, teacher, reference, some, objective, self.args.spec))
            return outs[-1].loss

        elsewhere = None if self._live else lambda chunk: []
        loss = two_phase_loss(policy, split.body, pack, chunk_loss, budget, teacher=elsewhere)
        fields = zip(*(out.stats[1:] for out in outs), strict=True)
        per_token: list[Any] = [None if field[0] is None else torch.cat(field) for field in fields]
        return LossOutput(loss, HSDKLOutput(loss.detach(), *per_token))

    def _log_loss(self, mode: str, out: LossOutput, batch: dict[str, Any], mask: Tensor) -> None:
        t = out.stats
        assert t.student_logps is not None and t.teacher_logps is not None
        mask = mask * batch["shown"].unsqueeze(-1)
        a = credit(t.teacher_logps, t.student_logps)
        failing = torch.where(batch["success"], -1, batch["divergence_position"])
        tokens = mask.sum()  # 0 where no teacher is shown anything: NaN, which is no part of a mean
        self._record(
            mode,
            kl=(t.per_token_kl * mask).sum() / tokens,
            student_entropy=(t.student_entropy * mask).sum() / tokens,
            teacher_entropy=(t.teacher_entropy * mask).sum() / tokens,
            credit_at_tau=credit_at_divergence(a, mask, failing),
            credit_mass_8=credit_mass(a, mask, failing, windows=(8,))[0],  # micro-batches count alike
        )
        if t.reference_kl is not None:
            self._record(mode, reference_kl=(t.reference_kl * mask).sum() / tokens)

    def _record(self, mode: str, **values: Tensor | float) -> None:
        """Mean over ranks, ignoring NaN (no rollout to measure); one collective for all of them."""
        device = self.accelerator.device
        mine = torch.stack([torch.as_tensor(v, dtype=torch.float32, device=device) for v in values.values()])
        gathered: Any = self.accelerator.gather(mine.unsqueeze(0))
        means = gathered.nanmean(0).tolist()
        for name, value in zip(values, means, strict=True):
            self._metrics[mode][f"hsd/{name}"].append(value)

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model, trial):
        # First, so that a checkpoint with a trainer_state.json, which is written last, is whole.
        if self.args.should_save:
            self.frozen.save(Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}")
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        folder, period = Path(resume_from_checkpoint), steps_of_a_generation(self.args)
        self.frozen.load(folder)
        step = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME)).global_step
        if step % period:
            warnings.warn(
                f"resume_from_checkpoint: one generation serves {period} steps and step {step} is not its last; its "
                "rollouts are lost, and the run goes on with new ones, other than an uninterrupted one would",
                stacklevel=2,
            )


class _AfterStep(TrainerCallback):
    def __init__(self, trainer: HSDTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        t = self.trainer
        t.frozen.step(t.accelerator.unwrap_model(t.model), state.global_step)


def _check_columns(name: str, dataset: Any, args: HSDConfig) -> None:
    needed = {"prompt", "answer", *args.spec.needs}
    for part in dataset.values() if isinstance(dataset, dict) else (dataset,):
        columns = getattr(part, "column_names", None) or ()
        if columns and not needed <= set(columns):
            wanted = f"columns {sorted(needed)} for method={args.method!r}"
            raise ValueError(f"{name}: expected {wanted}, got {sorted(columns)}")


def _student_inputs(batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(input ids, attention mask, rollout tokens, loss mask) of a GRPO batch; a tool's tokens carry no loss."""
    targets, completion_mask = batch["completion_ids"], batch["completion_mask"]
    ids = torch.cat([batch["prompt_ids"], targets], 1)
    mask = torch.cat([batch["prompt_mask"], completion_mask], 1)
    return ids, mask, targets, completion_mask * batch["tool_mask"] if "tool_mask" in batch else completion_mask
