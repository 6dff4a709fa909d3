"""`HSDTrainer`: TRL's GRPO rollouts, rewards, logging and checkpoints; the update is Hindsight Self-Distillation.

Two hooks carry the method. After a batch is generated and scored, every rollout gets a peer from its own group and the
teacher's prompt ``[q ; c_i]`` is built. In the loss, teacher and student read the same rollout tokens and meet in
`hsd.loss.hsd_loss`, over hidden states; logits are never made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback
from trl.models.utils import _ForwardRedirection
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import pad, split_tensor_dict

from hsd.body import Split, check_split, split_model
from hsd.callbacks import RunFiles
from hsd.config import HSDConfig
from hsd.context import DEFAULT_CHAT_TEMPLATE, DEFAULT_TEXT_TEMPLATE, ContextTemplate, build_context
from hsd.credit import credit, credit_at_divergence, credit_mass, divergence_position
from hsd.frozen import adapters_off, ema_update_, frozen_copy, in_eval_mode, load_policy_, save_policy
from hsd.groups import Group, Rollout
from hsd.loss import LossOutput, Side, frozen_side, hsd_loss, read_rollouts
from hsd.peers import choose_peers, peer_rng
from hsd.tree.batch import pack_batch, pad_states, pays, shuffle_groups
from hsd.tree.check import try_tree, warn_unshared
from hsd.tree.forward import Pack, read_frozen, read_live_teacher, read_student, rows_of
from hsd.tree.two_phase import two_phase_loss
from hsd_kernels import HSDKLOutput, fused_hsd_kl

INITIAL_POLICY = "initial_policy.safetensors"
EMA_TEACHER = "ema_teacher.safetensors"


class HSDTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` with the HSD update (arXiv 2606.15576). The data set needs a ``prompt`` and an ``answer``.

    Args: as `GRPOTrainer`, with an `HSDConfig`, and

        context_template: words of the privileged context; by default the config's templates, else one that suits
            chat or plain-text prompts.

    Raises ValueError for a data set without ``answer``, a model whose logits are not a plain head over its hidden
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
        **kwargs: Any,
    ):
        columns = getattr(train_dataset, "column_names", None) or ()
        if train_dataset is not None and columns and not {"prompt", "answer"} <= set(columns):
            raise ValueError(f"train_dataset: expected columns 'prompt' and 'answer' (a*), got {sorted(columns)}")
        super().__init__(model=model, reward_funcs=reward_funcs, args=args, train_dataset=train_dataset, **kwargs)
        self.args: HSDConfig
        if self._is_vlm:
            raise ValueError("model: expected a text model, got a vision-language one")
        if context_template is None and args.with_peer_template and args.answer_only_template:
            context_template = ContextTemplate(args.with_peer_template, args.answer_only_template)
        self.context_template = context_template
        policy = self.accelerator.unwrap_model(self.model)
        if not self.is_deepspeed_enabled and not self.is_fsdp_enabled:  # sharded weights cannot be read here
            check_split(policy, split_model(policy))
        self.prefix_sharing = self._choose_sharing(policy)
        rule = "uniform" if self.prefix_sharing == "none" else "paired"
        self.peer_rule = rule if args.peer_rule == "auto" else args.peer_rule
        self._make_frozen_policies(policy)
        self._initial_is_saved = False
        self._redirect = _ForwardRedirection()
        self.add_callback(_EMA(self))
        self.add_callback(RunFiles(Path(str(args.output_dir))))

    def _choose_sharing(self, policy: Any) -> str:
        """ "tree", "prompt" or "none". Before frozen copies are made: they take the tree as the policy does."""
        asked = self.args.prefix_sharing
        if asked == "none":
            return asked
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            reason = "it has not been tried with sharded weights (FSDP, DeepSpeed)"
        else:
            with self.accelerator.autocast():
                reason = try_tree(policy)
        if reason is None:
            return "tree" if asked == "auto" else asked
        if asked != "auto":
            raise ValueError(f"prefix_sharing: expected 'none' for this model, got {asked!r}: {reason}")
        warn_unshared(reason)
        return "none"

    # -- frozen policies ------------------------------------------------------------------------------------------

    def _make_frozen_policies(self, policy: Any) -> None:
        """`teacher_model` and `initial_model` are copies, or None where the student's own module serves."""
        peft = hasattr(policy, "peft_config")
        needs_initial = self.args.teacher == "fixed" or self.args.reference_coef > 0.0
        needs_copy = (needs_initial and not peft) or self.args.teacher == "ema"
        if needs_copy and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            raise ValueError(
                "teacher, reference_coef: expected 'live' and 0 (or LoRA) under FSDP and DeepSpeed, where a frozen "
                f"copy of sharded weights is not supported, got {self.args.teacher!r} and {self.args.reference_coef}"
            )
        if self.is_deepspeed_enabled and getattr(self.accelerator.state.deepspeed_plugin, "zero_stage", 0) == 3:
            raise ValueError("deepspeed: expected ZeRO stage 0 to 2, got 3: the partitioned head is not gathered here")
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if sharded and self.args.peer_rule.endswith("perplexity"):
            raise ValueError(f"peer_rule: expected one without perplexity under sharding, got {self.args.peer_rule!r}")
        if self.args.teacher == "ema" and peft:
            raise ValueError("teacher: expected 'live' or 'fixed' (adapters off) with LoRA, got 'ema'")
        half = next((p.dtype for p in policy.parameters() if p.dtype not in (torch.float32, torch.float64)), None)
        if self.args.teacher == "ema" and half is not None:
            # 1,000 steps of rate 0.005 from 1.0 towards 1.5 leave a bf16 weight at 1.0.
            raise ValueError(f"teacher: expected fp32 weights for 'ema' (bf16=True computes in bf16), got {half}")
        if peft and needs_initial and "ref" in policy.peft_config:
            raise ValueError("model: expected a fresh adapter (adapters off = initial policy), got a trained one")
        self.initial_model = frozen_copy(policy) if needs_initial and not peft else None
        self.teacher_model = frozen_copy(policy) if self.args.teacher == "ema" else None

    def _initial(self, policy: Any, read: Callable[[Split], Sequence[Tensor]]) -> list[Side]:
        """Sides read under the initial policy, by a function of its body and head."""
        if self.initial_model is not None:
            split = split_model(self.initial_model)
            return [frozen_side(split, hidden) for hidden in read(split)]
        with adapters_off(policy):
            return [Side(hidden) for hidden in read(split_model(policy))]

    def _read_initial(self, policy: Any, ids: Tensor, mask: Tensor, length: int) -> Side:
        return self._initial(policy, lambda split: [read_rollouts(split, ids, mask, length)])[0]

    def _read_teacher(self, policy: Any, ids: Tensor, mask: Tensor, length: int) -> Side:
        if self.args.teacher == "fixed":
            return self._read_initial(policy, ids, mask, length)
        if self.teacher_model is not None:
            split = split_model(self.teacher_model)
            return frozen_side(split, read_rollouts(split, ids, mask, length))
        return Side(read_rollouts(split_model(policy), ids, mask, length))

    # -- rollouts -> groups -> privileged contexts ----------------------------------------------------------------

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
        self._scored = (weighted.tolist(), [list(ids) for ids in completion_ids_list])  # rewards of all ranks
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        rewards, completion_ids = self._scored
        mode = self._mode
        size: Any = self.num_generations if mode == "train" else self.num_generations_eval
        mean_logps = None
        if self.peer_rule.endswith("perplexity"):
            mean_logps = gather_object(self._mean_logps(batch).tolist())

        first = self.accelerator.process_index * len(inputs)
        rollouts = [
            Rollout(tuple(ids), reward=r, mean_logp=None if mean_logps is None else mean_logps[i])
            for i, (ids, r) in enumerate(zip(gather_object(completion_ids), rewards, strict=True))
        ]
        contexts, taus, successes = [], [], []
        for i, example in enumerate(inputs):
            g, place = divmod(first + i, size)  # a group may be split between ranks: all of them see it whole
            members = tuple(rollouts[g * size : (g + 1) * size])
            group = Group(example["prompt"], str(example["answer"]), members, self.args.success_reward)
            rng = peer_rng(self.args.seed, self.state.global_step, g)
            peer = choose_peers(group, self.peer_rule, rng=rng)[place]
            shown = None if peer is None else members[peer].token_ids
            contexts.append(
                build_context(
                    self._tokenizer,
                    example["prompt"],
                    group.answer,
                    shown,
                    self._template_for(example["prompt"]),
                    max_length=self.args.max_teacher_prompt_length,
                    chat_template_kwargs=self._rendering,
                )
            )
            seen = shown is not None and contexts[-1].kind == "peer"  # it may have been left out for length
            tau = divergence_position(members[place].token_ids, shown) if seen else None  # type: ignore[arg-type]
            taus.append(-1 if tau is None else tau)
            successes.append(place in group.successes)

        ids = [torch.tensor(c.prompt_ids) for c in contexts]
        device = batch["completion_ids"].device
        pad_id: Any = self._tokenizer.pad_token_id
        batch["teacher_prompt_ids"] = pad(ids, pad_id, padding_side="left").to(device)
        masks = [torch.ones_like(x) for x in ids]
        batch["teacher_prompt_mask"] = pad(masks, 0, padding_side="left").to(device)
        batch["divergence_position"] = torch.tensor(taus, device=device)
        batch["success"] = torch.tensor(successes, device=device)
        has_peer = torch.tensor([c.kind == "peer" for c in contexts], device=device)
        self._log_coverage(mode, batch["success"], has_peer, size, [c.truncated for c in contexts])
        return batch

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"  # type: ignore[union-attr]

    @property
    def _rendering(self) -> dict[str, Any]:
        """What TRL passes to the chat template for the student's prompt; the teacher's must be rendered alike."""
        given: Any = self.chat_template_kwargs
        return {**given, "chat_template": self.chat_template, "tools": self.tools or None}

    def _template_for(self, prompt: str | list) -> ContextTemplate:
        if self.context_template is not None:
            return self.context_template
        return DEFAULT_TEXT_TEMPLATE if isinstance(prompt, str) else DEFAULT_CHAT_TEMPLATE

    @torch.no_grad()
    def _mean_logps(self, batch: dict[str, Any]) -> Tensor:
        """Mean log-prob (B,) of each rollout under the policy, for the perplexity rules."""
        policy = self.accelerator.unwrap_model(self.model)
        split = split_model(policy)
        ids, mask, targets, weights = _student_inputs(batch)
        with in_eval_mode(policy), self.accelerator.autocast():
            size = self.args.per_device_train_batch_size
            parts = zip(ids.split(size), mask.split(size), strict=True)
            h = torch.cat([read_rollouts(split, x, m, targets.shape[1]) for x, m in parts])
        form = {"logit_scale": split.logit_scale, "softcap": split.softcap, "impl": self.args.kernel_impl}
        h = h.to(split.weight.dtype)
        out = fused_hsd_kl(h, h, split.weight, split.bias, target_ids=targets, return_stats=True, **form)
        assert isinstance(out, HSDKLOutput) and out.student_logps is not None
        return (out.student_logps * weights).sum(-1) / weights.sum(-1).clamp_min(1)

    def _log_coverage(self, mode: str, success: Tensor, has_peer: Tensor, size: int, truncated: list[bool]) -> None:
        gathered: Any = self.accelerator.gather((success, has_peer))
        success, has_peer = gathered
        solved = success.reshape(-1, size).float().mean(-1)
        self._record(
            mode,
            success_rate=success.float().mean(),
            # f(p, G) of hsd.credit.coverage is the expectation of this share of all rollouts.
            coverage=(~success & has_peer).float().mean(),
            failing_with_peer=(~success & has_peer).sum() / (~success).sum(),
            mixed_groups=((solved > 0) & (solved < 1)).float().mean(),
            fallback_share=(~has_peer).float().mean(),
            demonstration_truncated=sum(truncated) / len(truncated),
        )

    # -- the loss -------------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs:
            raise ValueError("return_outputs: expected False, HSDTrainer computes no model outputs")
        policy = self.accelerator.unwrap_model(model)
        # Through the wrapper's forward, so that DDP and FSDP hooks apply. Accelerate's autocast sits in the very
        # attribute that the redirection replaces, so it is entered here.
        with self.accelerator.autocast():
            return self._redirect(model, policy, self._hsd_loss, policy, inputs)

    def _hsd_loss(self, policy: Any, batch: dict[str, Any]) -> Tensor:
        mode = self._mode
        pack = self._pack(batch)
        budget = self.args.tree_token_budget
        if pack is None:
            out = self._unshared_loss(policy, batch)
        elif budget is not None and len(pack.trie) > budget and torch.is_grad_enabled():
            out = self._loss_in_chunks(policy, batch, pack, budget)
        else:
            out = self._shared_loss(policy, batch, pack)
        self._log_loss(mode, out, batch, _student_inputs(batch)[-1])
        # As in GRPOTrainer: the mean over the micro-batches of one optimizer step.
        return out.loss / (self.current_gradient_accumulation_steps if mode == "train" else 1)

    def _pack(self, batch: dict[str, Any]) -> Pack | None:
        """None where every sequence is to be read by itself."""
        if self.prefix_sharing == "none":
            return None
        pack = pack_batch(batch, self.prefix_sharing)
        wanted = self.args.prefix_sharing != "auto" or pays(pack, batch, self._live)
        return pack if wanted and len(pack.trie) else None  # a batch whose rollouts are all masked has no nodes

    @property
    def _live(self) -> bool:
        return self.args.teacher == "live"

    def _unshared_loss(self, policy: Any, batch: dict[str, Any]) -> LossOutput:
        ids, mask, targets, loss_mask = _student_inputs(batch)
        length = targets.shape[1]
        with torch.no_grad(), in_eval_mode(policy):  # no dropout noise in the target
            teacher_ids = torch.cat([batch["teacher_prompt_ids"], targets], 1)
            teacher_mask = torch.cat([batch["teacher_prompt_mask"], batch["completion_mask"]], 1)
            teacher = self._read_teacher(policy, teacher_ids, teacher_mask, length)
            reference = self._read_initial(policy, ids, mask, length) if self.args.reference_coef > 0.0 else None
        split = split_model(policy)
        student = read_rollouts(split, ids, mask, length)
        return hsd_loss(student, split, teacher, targets, loss_mask, self.args.objective, reference)

    def _shared_loss(self, policy: Any, batch: dict[str, Any], pack: Pack) -> LossOutput:
        """One forward for the student; the teacher, live, takes the question's keys and values from it."""
        *_, targets, loss_mask = _student_inputs(batch)
        length = targets.shape[1]
        split = split_model(policy)
        hidden, keys = read_student(split.body, pack, live_teacher=self._live)
        student = pad_states(split, rows_of(hidden, pack.student_nodes, pack.student), length)
        teacher, reference = self._frozen_sides(policy, pack, length)
        if teacher is None:
            with in_eval_mode(policy):
                teacher = Side(pad_states(split, read_live_teacher(split.body, pack, hidden, keys), length))
        return hsd_loss(student, split, teacher, targets, loss_mask, self.args.objective, reference)

    @torch.no_grad()
    def _frozen_sides(self, policy: Any, pack: Pack, length: int) -> tuple[Side | None, Side | None]:
        """Teacher, unless it is live, and reference. A fixed teacher has the weights of the reference: one tree."""
        fixed, reads_reference = self.args.teacher == "fixed", self.args.reference_coef > 0.0

        def read(split: Split) -> list[Tensor]:
            sides = read_frozen(split.body, pack, student=reads_reference, teacher=fixed)
            return [pad_states(split, s, length) for s in sides if s]

        with in_eval_mode(policy):
            initial = self._initial(policy, read) if fixed or reads_reference else []
        reference = initial[0] if reads_reference else None
        if self.teacher_model is None:
            return initial[-1] if fixed else None, reference
        split = split_model(self.teacher_model)
        states = read_frozen(split.body, pack, student=False, teacher=True)[1]
        return frozen_side(split, pad_states(split, states, length)), reference

    def _loss_in_chunks(self, policy: Any, batch: dict[str, Any], pack: Pack, budget: int) -> LossOutput:
        """The same loss and gradient for a pack over the budget. Frozen policies share within a chunk only."""
        *_, targets, loss_mask = _student_inputs(batch)
        length = targets.shape[1]
        split = split_model(policy)
        outs: list[LossOutput] = []

        def chunk_loss(chunk: Sequence[int], student: list[Tensor], live: list[Tensor]) -> Tensor:
            rows = torch.tensor(list(chunk), device=targets.device)
            teacher, reference = self._frozen_sides(policy, pack_batch(batch, self.prefix_sharing, chunk), length)
            teacher = teacher or Side(pad_states(split, live, length))
            hidden = pad_states(split, student, length)
            outs.append(
                hsd_loss(hidden, split, teacher, targets[rows], loss_mask[rows], self.args.objective, reference)
            )
            return outs[-1].loss * (len(chunk) / len(targets))

        elsewhere = None if self._live else lambda chunk: []
        loss = two_phase_loss(policy, split.body, pack, chunk_loss, budget, teacher=elsewhere)
        fields = zip(*(out.stats[1:] for out in outs), strict=True)
        per_token: list[Any] = [None if field[0] is None else torch.cat(field) for field in fields]
        return LossOutput(loss, HSDKLOutput(loss.detach(), *per_token))

    def _log_loss(self, mode: str, out: LossOutput, batch: dict[str, Any], mask: Tensor) -> None:
        t = out.stats
        assert t.student_logps is not None and t.teacher_logps is not None
        a = credit(t.teacher_logps, t.student_logps)
        failing = torch.where(batch["success"], -1, batch["divergence_position"])
        tokens = mask.sum().clamp_min(1)
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
        out = Path(self._get_output_dir(trial=trial))
        if self.args.should_save and self.teacher_model is not None:
            save_policy(self.teacher_model, out / f"checkpoint-{self.state.global_step}" / EMA_TEACHER)
        if self.args.should_save and self.initial_model is not None and not self._initial_is_saved:
            save_policy(self.initial_model, out / INITIAL_POLICY)  # over that of an earlier run in this folder
            self._initial_is_saved = True
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        checkpoint = Path(resume_from_checkpoint)
        files = (
            (self.teacher_model, checkpoint / EMA_TEACHER),
            (self.initial_model, checkpoint.parent / INITIAL_POLICY),
        )
        for twin, path in files:
            if twin is not None and not path.exists():
                raise ValueError(
                    f"resume_from_checkpoint: expected {path}, which a run with teacher={self.args.teacher!r} and "
                    f"reference_coef={self.args.reference_coef} saves; the checkpoint is of another kind of run"
                )
            if twin is not None:
                load_policy_(twin, path)
        self._initial_is_saved = True


class _EMA(TrainerCallback):
    def __init__(self, trainer: HSDTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        t = self.trainer
        if t.teacher_model is not None:
            ema_update_(t.teacher_model, t.accelerator.unwrap_model(t.model), t.args.teacher_ema_rate)


def _student_inputs(batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(input ids, attention mask, rollout tokens, loss mask) of a GRPO batch; a tool's tokens carry no loss."""
    targets, completion_mask = batch["completion_ids"], batch["completion_mask"]
    ids = torch.cat([batch["prompt_ids"], targets], 1)
    mask = torch.cat([batch["prompt_mask"], completion_mask], 1)
    return ids, mask, targets, completion_mask * batch["tool_mask"] if "tool_mask" in batch else completion_mask
